"""DeepSeek V1 and V2: softmax scores."""

from __future__ import annotations

from typed_moe.models._family import (
    Experts,
    Family,
    Layers,
    Names,
    from_first_k_dense,
    gated,
    summed,
)
from typed_moe.models._fields import Fields
from typed_moe.models._softmax import softmax_top_k
from typed_moe.models._spec import CheckpointLayout
from typed_moe.routing import GroupedSoftmax, RoutingStrategy, ScaledSoftmax


def deepseek_experts(fields: Fields, *, owner: str, router_weight_fp32: bool) -> Experts:
    """The field names that DeepSeek, GLM and Mistral share."""
    width = fields.integer("intermediate_size", "moe_intermediate_size")
    return Experts(
        num_experts=fields.integer(
            "num_experts", "n_routed_experts", "num_experts", "num_local_experts"
        ),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=width,
        activation=gated(fields, owner=owner),
        shared=summed(fields, width=width),
        router_weight_fp32=router_weight_fp32,
    )


def groups(fields: Fields) -> tuple[int, int]:
    """`n_group` and `topk_group` in normal form: no grouping is (1, 1)."""
    for name in ("n_group", "topk_group"):
        if name not in fields.values:
            fields.integer(f"routing.{name}", name)
    n_group = fields.optional_integer("n_group")
    topk_group = fields.optional_integer("topk_group")
    fields.note("routing.num_expert_group", f"n_group = {n_group}")
    fields.note("routing.topk_group", f"topk_group = {topk_group}")
    return n_group or 1, topk_group or 1


def scaled_softmax(fields: Fields, *, norm_topk_prob: bool, scale: float) -> RoutingStrategy:
    """Softmax over all experts, top-k, times `scale`; the plain strategy where that is 1."""
    if scale == 1.0:
        return softmax_top_k(fields, norm_topk_prob=norm_topk_prob)
    fields.note("routing", f"ScaledSoftmax: softmax, top-k, times {scale}")
    return ScaledSoftmax(norm_topk_prob=norm_topk_prob, routed_scaling_factor=scale)


def _v1_layers(fields: Fields) -> Layers:
    layers = from_first_k_dense(fields)
    every = fields.integer(
        "layers.moe_layer_freq", "moe_layer_freq", default=1, owner="DeepseekConfig"
    )
    moe = tuple(i for i in layers.moe if i % every == 0)
    dense = f"{layers.dense}, moe_layer_freq = {every}"
    return Layers(num_hidden_layers=layers.num_hidden_layers, moe=moe, dense=dense)


def _v1_routing(fields: Fields, _: int) -> RoutingStrategy:
    fields.expect("scoring_func", "softmax", why="the published DeepSeek-MoE router has no other")
    norm = fields.flag("routing.norm_topk_prob", "norm_topk_prob")
    if norm and fields.integer("top_k", "num_experts_per_tok") == 1:
        # modeling_deepseek.py renormalises only where top_k > 1.
        norm = False
        fields.note("routing.norm_topk_prob", "num_experts_per_tok = 1: never renormalised")
    return softmax_top_k(fields, norm_topk_prob=norm)


def _v1_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="DeepseekConfig", router_weight_fp32=False)


DEEPSEEK = Family(
    layers=_v1_layers,
    routing=_v1_routing,
    experts=_v1_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)


def v2_layers(fields: Fields) -> Layers:
    """From first_k_dense_replace on; transformers ignores moe_layer_freq, so it must be 1."""
    fields.must_be("moe_layer_freq", 1, why="transformers and the published code differ on others")
    return from_first_k_dense(fields)


def _v2_routing(fields: Fields, _: int) -> RoutingStrategy:
    fields.expect("scoring_func", "softmax", why="the DeepSeek-V2 router takes a softmax")
    fields.expect(
        "norm_topk_prob",
        False,
        why="transformers ignores it, the published code renormalises and then drops the scale",
    )
    method = fields.choice("routing", "topk_method", ("greedy", "group_limited_greedy"))
    scale = fields.number("routing.routed_scaling_factor", "routed_scaling_factor")
    if method == "greedy":
        # Greedy looks at neither, whatever they say.
        fields.optional_integer("n_group")
        fields.optional_integer("topk_group")
        return scaled_softmax(fields, norm_topk_prob=False, scale=scale)
    n_group, topk_group = groups(fields)
    if n_group == 1:
        return scaled_softmax(fields, norm_topk_prob=False, scale=scale)
    fields.note("routing", "GroupedSoftmax: topk_method = group_limited_greedy, groups by maximum")
    return GroupedSoftmax(
        num_expert_group=n_group,
        topk_group=topk_group,
        group_score="max",
        norm_topk_prob=False,
        routed_scaling_factor=scale,
    )


def _v2_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="DeepseekV2Config", router_weight_fp32=True)


DEEPSEEK_V2 = Family(
    layers=v2_layers,
    routing=_v2_routing,
    experts=_v2_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)
