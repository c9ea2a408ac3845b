"""Softmax families without groups or scale: Mixtral, OLMoE, gpt-oss, Cohere2 MoE."""

from __future__ import annotations

from typed_moe.config import Swiglu
from typed_moe.errors import UnsupportedRouting
from typed_moe.models._family import (
    Experts,
    Family,
    Layers,
    Names,
    Shared,
    every_layer,
    from_first_k_dense,
    from_layer_types,
    gated,
)
from typed_moe.models._fields import OWN_STRATEGY, Fields
from typed_moe.models._spec import CheckpointLayout, SharedCombination
from typed_moe.routing import (
    Default,
    Renormalize,
    RenormalizeNaive,
    RoutingStrategy,
    SigmoidRenorm,
    TopKSigmoid,
)


def softmax_top_k(fields: Fields, *, norm_topk_prob: bool) -> RoutingStrategy:
    """Softmax over all experts, then top-k, then division by the sum if `norm_topk_prob`."""
    if norm_topk_prob:
        fields.note("routing", "RenormalizeNaive: softmax over all experts, top-k, divide by sum")
        return RenormalizeNaive()
    fields.note("routing", "Default: softmax over all experts, top-k, not renormalised")
    return Default()


def _mixtral_routing(fields: Fields, _: int) -> RoutingStrategy:
    fields.expect("norm_topk_prob", True, why="the Mixtral router always renormalises")
    return softmax_top_k(fields, norm_topk_prob=True)


def _mixtral_experts(fields: Fields, _: int) -> Experts:
    return Experts(
        num_experts=fields.integer("num_experts", "num_local_experts", "num_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=fields.integer("intermediate_size", "intermediate_size"),
        activation=gated(fields, owner="MixtralConfig"),
    )


MIXTRAL = Family(
    layers=every_layer,
    routing=_mixtral_routing,
    experts=_mixtral_experts,
    names=Names(layout=CheckpointLayout.MIXTRAL, block="block_sparse_moe."),
)


def _olmoe_routing(fields: Fields, _: int) -> RoutingStrategy:
    norm = fields.flag(
        "routing.norm_topk_prob", "norm_topk_prob", default=False, owner="OlmoeConfig"
    )
    return softmax_top_k(fields, norm_topk_prob=norm)


def _olmoe_experts(fields: Fields, _: int) -> Experts:
    return Experts(
        num_experts=fields.integer("num_experts", "num_experts", "num_local_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=fields.integer("intermediate_size", "intermediate_size"),
        activation=gated(fields, owner="OlmoeConfig"),
    )


OLMOE = Family(
    layers=every_layer,
    routing=_olmoe_routing,
    experts=_olmoe_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)


def _gpt_oss_routing(fields: Fields, _: int) -> RoutingStrategy:
    fields.expect("norm_topk_prob", True, why="the gpt-oss router takes the softmax over the top-k")
    fields.note("routing", "Renormalize: top-k of the logits, softmax over the chosen")
    return Renormalize()


def _gpt_oss_experts(fields: Fields, _: int) -> Experts:
    fields.must_be("hidden_act", "silu", why="the experts apply gate * sigmoid(alpha * gate)")
    owner = "GptOssConfig"
    return Experts(
        num_experts=fields.integer("num_experts", "num_local_experts", "num_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok", "experts_per_token"),
        intermediate_size=fields.integer("intermediate_size", "intermediate_size"),
        activation=Swiglu(
            alpha=fields.number("activation.alpha", "swiglu_alpha", default=1.702, owner=owner),
            beta=1.0,
            limit=fields.number("activation.limit", "swiglu_limit", default=7.0, owner=owner),
        ),
        has_bias=True,
    )


GPT_OSS = Family(
    layers=every_layer,
    routing=_gpt_oss_routing,
    experts=_gpt_oss_experts,
    names=Names(
        layout=CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED,
        gate="router.weight",
        gate_bias="router.bias",
    ),
)


def _cohere2_layers(fields: Fields) -> Layers:
    listed = from_layer_types(fields, "mlp_layer_types", moe="sparse", others=("dense",))
    return listed or from_first_k_dense(fields, default=0, owner="Cohere2MoeConfig")


def _cohere2_routing(fields: Fields, _: int) -> RoutingStrategy:
    rule = fields.choice("routing", "expert_selection_fn", ("softmax", "sigmoid"))
    if rule == "softmax":
        fields.expect(
            "norm_topk_prob", True, why="a softmax over the chosen experts always sums to 1"
        )
        fields.note("routing", "Renormalize: expert_selection_fn = softmax over the chosen experts")
        return Renormalize()
    if fields.flag("routing.norm_topk_prob", "norm_topk_prob"):
        fields.note("routing", "SigmoidRenorm: expert_selection_fn = sigmoid, divided by the sum")
        return SigmoidRenorm()
    fields.note("routing", "TopKSigmoid: expert_selection_fn = sigmoid, not renormalised")
    return TopKSigmoid()


def _cohere2_shared(fields: Fields, width: int) -> Shared:
    count = fields.integer(
        "num_shared_experts", "num_shared_experts", default=0, owner="Cohere2MoeConfig", least=0
    )
    if count == 0:
        return Shared()
    name = "shared_expert_combination_strategy"
    how = fields.text("shared_expert_combination", name)
    ways = {"sum": SharedCombination.SUM, "average": SharedCombination.AVERAGE}
    if how not in ways:
        raise UnsupportedRouting(
            f"{name} is {how!r} in a {fields.model_type} config; allowed: 'sum' or 'average'. "
            f"For another, {OWN_STRATEGY}"
        )
    return Shared(num_experts=count, intermediate_size=count * width, combination=ways[how])


def _cohere2_experts(fields: Fields, _: int) -> Experts:
    width = fields.integer("intermediate_size", "intermediate_size")
    return Experts(
        num_experts=fields.integer("num_experts", "num_experts", "num_local_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=width,
        activation=gated(fields, owner="Cohere2MoeConfig"),
        shared=_cohere2_shared(fields, width),
    )


COHERE2_MOE = Family(
    layers=_cohere2_layers,
    routing=_cohere2_routing,
    experts=_cohere2_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)
