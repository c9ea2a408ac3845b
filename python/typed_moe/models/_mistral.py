"""Mistral 4 and Mistral Large 4: softmax, groups ranked by their two best, renormalised."""

from __future__ import annotations

from typed_moe.models._deepseek import deepseek_experts, groups, scaled_softmax
from typed_moe.models._family import (
    Experts,
    Family,
    Layers,
    Names,
    from_first_k_dense,
    from_layer_types,
)
from typed_moe.models._fields import Fields
from typed_moe.models._spec import CheckpointLayout
from typed_moe.routing import GroupedSoftmax, RoutingStrategy


def _grouped_softmax(fields: Fields, *, norm_topk_prob: bool) -> RoutingStrategy:
    fields.expect("scoring_func", "softmax", why="the Mistral router takes a softmax")
    n_group, topk_group = groups(fields)
    scale = fields.number("routing.routed_scaling_factor", "routed_scaling_factor")
    if n_group == 1:
        return scaled_softmax(fields, norm_topk_prob=norm_topk_prob, scale=scale)
    fields.note("routing", "GroupedSoftmax: n_group > 1, groups by the sum of their two best")
    return GroupedSoftmax(
        num_expert_group=n_group,
        topk_group=topk_group,
        group_score="top2_sum",
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=scale,
    )


def _mistral4_layers(fields: Fields) -> Layers:
    fields.must_be("moe_layer_freq", 1, why="transformers ignores it")
    return from_first_k_dense(fields)


def _mistral4_routing(fields: Fields, _: int) -> RoutingStrategy:
    norm = fields.flag("routing.norm_topk_prob", "norm_topk_prob")
    return _grouped_softmax(fields, norm_topk_prob=norm)


def _mistral4_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="Mistral4Config", router_weight_fp32=False)


MISTRAL4 = Family(
    layers=_mistral4_layers,
    routing=_mistral4_routing,
    experts=_mistral4_experts,
    names=Names(layout=CheckpointLayout.FUSED),
)


def _large4_layers(fields: Fields) -> Layers:
    listed = from_layer_types(fields, "mlp_layer_types", moe="sparse", others=("dense",))
    return listed or from_first_k_dense(fields)


def _large4_routing(fields: Fields, _: int) -> RoutingStrategy:
    fields.expect("norm_topk_prob", True, why="the Mistral Large 4 router always renormalises")
    return _grouped_softmax(fields, norm_topk_prob=True)


def _large4_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="MistralLarge4TextConfig", router_weight_fp32=True)


MISTRAL_LARGE4 = Family(
    layers=_large4_layers,
    routing=_large4_routing,
    experts=_large4_experts,
    names=Names(layout=CheckpointLayout.MIXTRAL, root="layers", block=""),
)
