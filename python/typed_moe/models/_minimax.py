"""MiniMax-M2 and Step: sigmoid plus bias selects, the sigmoids divided by their sum."""

from __future__ import annotations

import torch

from typed_moe.config import Activation, Swiglu, SwigluStep
from typed_moe.models._family import (
    Experts,
    Family,
    Layers,
    Names,
    Shared,
    every_layer,
    from_layer_types,
    gated,
)
from typed_moe.models._fields import Fields
from typed_moe.models._spec import CheckpointLayout, SharedCombination
from typed_moe.routing import MiniMax2, RoutingStrategy


def _m2_routing(fields: Fields, _: int) -> RoutingStrategy:
    why = "the MiniMax-M2 router selects by sigmoid plus bias and renormalises"
    fields.expect("scoring_func", "sigmoid", why=why)
    fields.expect("use_routing_bias", True, why=why)
    fields.expect("norm_topk_prob", True, why=why)
    fields.note("routing", "MiniMax2: what every minimax_m2 model does")
    fields.note("routing.routed_scaling_factor", "no such field: 1.0")
    return MiniMax2()


def _m2_experts(fields: Fields, _: int) -> Experts:
    fields.must_be("shared_intermediate_size", 0, why="MiniMax-M2 has no shared expert")
    return Experts(
        num_experts=fields.integer("num_experts", "num_local_experts", "num_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=fields.integer("intermediate_size", "intermediate_size"),
        activation=gated(fields, owner="MiniMaxM2Config"),
    )


MINIMAX_M2 = Family(
    layers=every_layer,
    routing=_m2_routing,
    experts=_m2_experts,
    names=Names(
        layout=CheckpointLayout.MIXTRAL,
        block="block_sparse_moe.",
        correction_bias="e_score_correction_bias",
    ),
)


def _step_layers(fields: Fields) -> Layers:
    """mlp_layer_types, or its published form moe_layers_enum: "3,4,5" or a list."""
    fields.must_be("use_moe", True, why="Step 3.5 and 3.7 are MoE models")
    listed = from_layer_types(fields, "mlp_layer_types", moe="sparse", others=("dense",))
    if listed is not None:
        return listed
    value = fields.values.get("moe_layers_enum")
    items: list[object] = []
    if isinstance(value, str):
        items.extend(value.split(","))
    elif isinstance(value, list | tuple):
        items.extend(value)
    numbers = [str(one).strip() for one in items if str(one).strip()]
    if not numbers or not all(one.isdecimal() for one in numbers):
        raise ValueError(
            f"moe_layers_enum (also read as mlp_layer_types) is {value!r} in a "
            f"{fields.model_type} config; allowed: layer numbers, as '3,4,5' or as a list"
        )
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    wanted = {int(one) for one in numbers}
    fields.note("layers", f"moe_layers_enum = {value}")
    moe = tuple(i for i in range(count) if i in wanted)
    return Layers(num_hidden_layers=count, moe=moe, dense="not in moe_layers_enum")


def _step_gate_fp32(fields: Fields) -> bool:
    return fields.flag(
        "router_weight_fp32", "need_fp32_gate", default=False, owner="Step3p7TopKRouter"
    )


def _step_routing(fields: Fields, _: int) -> RoutingStrategy:
    why = "the Step router selects by sigmoid plus bias and renormalises"
    fields.expect("moe_router_activation", "sigmoid", why=why)
    fields.expect("use_moe_router_bias", True, why=why)
    fields.expect("norm_expert_weight", True, why=why)
    fields.note("routing", "MiniMax2: what every Step 3.5 and 3.7 model does")
    scale = fields.number("routing.routed_scaling_factor", "moe_router_scaling_factor")
    dtype = torch.float32 if _step_gate_fp32(fields) else None
    fields.note("routing.router_logits_dtype", fields.sources["router_weight_fp32"])
    return MiniMax2(routed_scaling_factor=scale, router_logits_dtype=dtype)


def _step_activation(fields: Fields, layer_id: int) -> Activation:
    """SwigluStep where the layer has a limit; 0 and null mean no clamp."""
    limits = fields.optional_list("swiglu_limits")
    if limits is None:
        fields.note("activation", "swiglu_limits absent: no clamp")
        return Swiglu()
    if layer_id >= len(limits):
        raise ValueError(
            f"swiglu_limits has {len(limits)} entries in a {fields.model_type} config, none for "
            f"layer {layer_id}; allowed: one entry per layer"
        )
    limit = limits[layer_id]
    fields.note("activation", f"swiglu_limits[{layer_id}] = {limit}")
    if limit is None or limit == 0:
        return Swiglu()
    if isinstance(limit, bool) or not isinstance(limit, int | float):
        raise ValueError(
            f"swiglu_limits[{layer_id}] is {limit!r} in a {fields.model_type} config; allowed: a "
            "number, or null for no clamp"
        )
    return SwigluStep(limit=float(limit))


def _step_experts(fields: Fields, layer_id: int) -> Experts:
    width = fields.integer(
        "shared_expert_intermediate_size", "share_expert_dim", "share_expert_dims"
    )
    fields.note("num_shared_experts", "one in every MoE layer of a Step model")
    return Experts(
        num_experts=fields.integer(
            "num_experts", "n_routed_experts", "moe_num_experts", "num_local_experts"
        ),
        top_k=fields.integer("top_k", "num_experts_per_tok", "moe_top_k"),
        intermediate_size=fields.integer("intermediate_size", "moe_intermediate_size"),
        activation=_step_activation(fields, layer_id),
        shared=Shared(num_experts=1, intermediate_size=width, combination=SharedCombination.SUM),
        router_weight_fp32=_step_gate_fp32(fields),
    )


STEP3P5 = Family(
    layers=_step_layers,
    routing=_step_routing,
    experts=_step_experts,
    names=Names(
        layout=CheckpointLayout.STACKED,
        block="moe.",
        experts="",
        correction_bias="router_bias",
    ),
)
