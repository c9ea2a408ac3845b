"""DeepSeek-V4: sqrt(softplus) scores with a correction bias; hash routing in the first layers."""

from __future__ import annotations

from typed_moe.config import Swiglu
from typed_moe.errors import UnsupportedRouting
from typed_moe.models._family import Experts, Family, Layers, Names, every_layer, summed
from typed_moe.models._fields import OWN_STRATEGY, Fields
from typed_moe.models._spec import CheckpointLayout
from typed_moe.routing import DeepSeekV3, RoutingStrategy, SqrtSoftplus


def _layers(fields: Fields) -> Layers:
    """Every layer is an MoE layer; how it routes is `_hash_layers`' business."""
    fields.must_be("first_k_dense_replace", 0, why="DeepSeek-V4 has no dense layers")
    return every_layer(fields)


def _hash_layers(fields: Fields) -> tuple[tuple[int, ...], str]:
    """The layers that route by token id, and the field that says so."""
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    listed = fields.optional_list("mlp_layer_types")
    stated = fields.optional_integer("num_hash_layers")
    if listed is None and stated is None:
        fields.integer("the hash layers", "num_hash_layers", "mlp_layer_types")
    if listed is None:
        return tuple(range(min(count, stated or 0))), f"num_hash_layers = {stated}"
    for one in listed:
        if one not in ("hash_moe", "moe"):
            raise ValueError(
                f"mlp_layer_types has the entry {one!r} in a deepseek_v4 config; allowed: "
                "'hash_moe' or 'moe'"
            )
    hashed = tuple(i for i, one in enumerate(listed[:count]) if one == "hash_moe")
    if stated is not None and hashed != tuple(range(stated)):
        raise ValueError(
            f"num_hash_layers is {stated} and mlp_layer_types says 'hash_moe' for the layers "
            f"{list(hashed)} in a deepseek_v4 config; they must agree: keep one"
        )
    return hashed, "mlp_layer_types = 'hash_moe'"


def _routing(fields: Fields, layer_id: int) -> RoutingStrategy:
    hashed, source = _hash_layers(fields)
    if layer_id in hashed:
        count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
        others = [i for i in range(count) if i not in hashed]
        learned = f"the layers with a top-k router (the first is {others[0]})" if others else "none"
        raise UnsupportedRouting(
            f"layer {layer_id} of this deepseek_v4 config takes its experts from a table of token "
            f"ids ({source}), which no strategy computes from logits; allowed: {learned}. "
            f"For this layer, {OWN_STRATEGY}"
        )
    fields.expect("topk_method", "noaux_tc", why="the DeepSeek-V4 router selects with a bias")
    fields.expect("norm_topk_prob", True, why="the DeepSeek-V4 router always renormalises")
    rule = fields.choice("routing", "scoring_func", ("sqrtsoftplus", "sigmoid"))
    scale = fields.number("routing.routed_scaling_factor", "routed_scaling_factor")
    if rule == "sigmoid":
        fields.note("routing", "DeepSeekV3: scoring_func = sigmoid plus bias, renormalised")
        fields.note("routing.num_expert_group", "DeepSeek-V4 has no groups")
        fields.note("routing.topk_group", "DeepSeek-V4 has no groups")
        fields.note("routing.router_logits_dtype", "DeepSeek-V4's gate runs in the weights' dtype")
        return DeepSeekV3(routed_scaling_factor=scale, router_logits_dtype=None)
    fields.note("routing", "SqrtSoftplus: scoring_func = sqrtsoftplus plus bias, renormalised")
    return SqrtSoftplus(routed_scaling_factor=scale)


def _experts(fields: Fields, _: int) -> Experts:
    fields.must_be("hidden_act", "silu", why="the released experts are a clamped SwiGLU")
    width = fields.integer("intermediate_size", "moe_intermediate_size")
    limit = fields.number(
        "activation.limit", "swiglu_limit", default=10.0, owner="DeepseekV4Config"
    )
    return Experts(
        num_experts=fields.integer("num_experts", "n_routed_experts", "num_local_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=width,
        activation=Swiglu(limit=limit),
        shared=summed(fields, width=width),
    )


DEEPSEEK_V4 = Family(
    layers=_layers,
    routing=_routing,
    experts=_experts,
    names=Names(
        layout=CheckpointLayout.MIXTRAL,
        root="layers",
        block="ffn.",
        correction_bias="gate.bias",
    ),
)
