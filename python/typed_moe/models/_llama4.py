"""Llama 4: one expert per token, its input multiplied by the sigmoid of its logit."""

from __future__ import annotations

from typed_moe.errors import UnsupportedRouting
from typed_moe.models._family import Experts, Family, Layers, Names, Shared, gated
from typed_moe.models._fields import OWN_STRATEGY, Fields
from typed_moe.models._spec import CheckpointLayout, SharedCombination
from typed_moe.routing import Llama4, RoutingStrategy


def _layers(fields: Fields) -> Layers:
    """`moe_layers` where the config lists them, else every interleave_moe_layer_step-th."""
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    listed = fields.optional_list("moe_layers")
    if listed is not None:
        fields.note("layers", f"moe_layers = {list(listed)}")
        moe = tuple(i for i in range(count) if i in listed)
        return Layers(num_hidden_layers=count, moe=moe, dense="not in moe_layers")
    step = fields.integer("layers", "interleave_moe_layer_step", "moe_layers")
    moe = tuple(range(step - 1, count, step))
    return Layers(num_hidden_layers=count, moe=moe, dense=fields.sources["layers"])


def _routing(fields: Fields, _: int) -> RoutingStrategy:
    top_k = fields.integer("top_k", "num_experts_per_tok")
    if top_k != 1:
        raise UnsupportedRouting(
            f"num_experts_per_tok is {top_k} in a {fields.model_type} config; allowed: 1, as in "
            "every released Llama 4: with more, each expert's input is weighted and the outputs "
            f"are summed, which no built-in strategy does. If the model does mean it, {OWN_STRATEGY}"
        )
    fields.note("routing", "Llama4: top-1, sigmoid, the weight on the expert's input")
    return Llama4()


def _experts(fields: Fields, _: int) -> Experts:
    width = fields.integer("intermediate_size", "intermediate_size")
    fields.note("num_shared_experts", "one in every MoE layer of a Llama 4 model")
    fields.note("shared_expert_intermediate_size", f"intermediate_size = {width}")
    return Experts(
        num_experts=fields.integer("num_experts", "num_local_experts", "num_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        intermediate_size=width,
        activation=gated(fields, owner="Llama4TextConfig"),
        shared=Shared(num_experts=1, intermediate_size=width, combination=SharedCombination.SUM),
    )


LLAMA4 = Family(
    layers=_layers,
    routing=_routing,
    experts=_experts,
    names=Names(
        layout=CheckpointLayout.FUSED_TRANSPOSED, block="feed_forward.", gate="router.weight"
    ),
)
