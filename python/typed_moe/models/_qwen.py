"""The Qwen families: softmax over all experts, top-k, renormalised if the config says so."""

from __future__ import annotations

from typed_moe.models._family import (
    Experts,
    Family,
    Layers,
    Names,
    Shared,
    every_layer,
    gated,
)
from typed_moe.models._fields import Fields
from typed_moe.models._softmax import softmax_top_k
from typed_moe.models._spec import CheckpointLayout, SharedCombination
from typed_moe.routing import RoutingStrategy


def _sparse_steps(fields: Fields, owner: str) -> Layers:
    """MoE where (layer + 1) is a multiple of decoder_sparse_step, outside mlp_only_layers."""
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    step = fields.integer("layers", "decoder_sparse_step", default=1, owner=owner)
    dense = fields.optional_list("mlp_only_layers") or ()
    fields.note("layers", f"{fields.sources['layers']}, mlp_only_layers = {list(dense)}")
    moe = tuple(i for i in range(count) if i not in dense and (i + 1) % step == 0)
    return Layers(num_hidden_layers=count, moe=moe, dense=fields.sources["layers"])


def _gated_shared(fields: Fields) -> Shared:
    width = fields.integer(
        "shared_expert_intermediate_size", "shared_expert_intermediate_size", least=0
    )
    if width == 0:
        return Shared()
    fields.note("num_shared_experts", "one, as shared_expert_intermediate_size is not 0")
    return Shared(
        num_experts=1, intermediate_size=width, combination=SharedCombination.SIGMOID_GATED
    )


def _experts(fields: Fields, owner: str, shared: Shared) -> Experts:
    return Experts(
        num_experts=fields.integer("num_experts", "num_experts", "num_local_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=fields.integer("intermediate_size", "moe_intermediate_size"),
        activation=gated(fields, owner=owner),
        shared=shared,
    )


def _qwen2_layers(fields: Fields) -> Layers:
    return _sparse_steps(fields, "Qwen2MoeConfig")


def _qwen2_routing(fields: Fields, _: int) -> RoutingStrategy:
    norm = fields.flag(
        "routing.norm_topk_prob", "norm_topk_prob", default=False, owner="Qwen2MoeConfig"
    )
    return softmax_top_k(fields, norm_topk_prob=norm)


def _qwen2_experts(fields: Fields, _: int) -> Experts:
    return _experts(fields, "Qwen2MoeConfig", _gated_shared(fields))


QWEN2_MOE = Family(
    layers=_qwen2_layers,
    routing=_qwen2_routing,
    experts=_qwen2_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)


def _qwen3_layers(fields: Fields) -> Layers:
    return _sparse_steps(fields, "Qwen3MoeConfig")


def _qwen3_routing(fields: Fields, _: int) -> RoutingStrategy:
    # No default: the class says False, every released Qwen3 model says True.
    norm = fields.flag("routing.norm_topk_prob", "norm_topk_prob")
    return softmax_top_k(fields, norm_topk_prob=norm)


def _qwen3_experts(fields: Fields, _: int) -> Experts:
    fields.must_be("shared_expert_intermediate_size", 0, why="Qwen3 MoE has no shared expert")
    return _experts(fields, "Qwen3MoeConfig", Shared())


QWEN3_MOE = Family(
    layers=_qwen3_layers,
    routing=_qwen3_routing,
    experts=_qwen3_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)


def _qwen3_next_layers(fields: Fields) -> Layers:
    return _sparse_steps(fields, "Qwen3NextConfig")


def _qwen3_next_routing(fields: Fields, _: int) -> RoutingStrategy:
    norm = fields.flag(
        "routing.norm_topk_prob", "norm_topk_prob", default=True, owner="Qwen3NextConfig"
    )
    return softmax_top_k(fields, norm_topk_prob=norm)


def _qwen3_next_experts(fields: Fields, _: int) -> Experts:
    return _experts(fields, "Qwen3NextConfig", _gated_shared(fields))


QWEN3_NEXT = Family(
    layers=_qwen3_next_layers,
    routing=_qwen3_next_routing,
    experts=_qwen3_next_experts,
    names=Names(layout=CheckpointLayout.SEPARATE),
)


def _qwen3_5_layers(fields: Fields) -> Layers:
    why = "Qwen3.5 MoE has no dense layers"
    fields.must_be("mlp_only_layers", [], (), why=why)
    fields.must_be("decoder_sparse_step", 1, why=why)
    return every_layer(fields)


def _qwen3_5_routing(fields: Fields, _: int) -> RoutingStrategy:
    fields.expect("norm_topk_prob", True, why="the Qwen3.5 router always renormalises")
    return softmax_top_k(fields, norm_topk_prob=True)


def _qwen3_5_experts(fields: Fields, _: int) -> Experts:
    return _experts(fields, "Qwen3_5MoeTextConfig", _gated_shared(fields))


QWEN3_5_MOE = Family(
    layers=_qwen3_5_layers,
    routing=_qwen3_5_routing,
    experts=_qwen3_5_experts,
    names=Names(layout=CheckpointLayout.FUSED),
)
