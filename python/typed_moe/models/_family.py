"""What the package knows about one model family, and the readings that families share."""

from __future__ import annotations

from collections.abc import Callable
from typing import final

import attrs

from typed_moe.config import Activation, Geglu, Swiglu
from typed_moe.models._fields import Fields
from typed_moe.models._spec import CheckpointLayout, SharedCombination
from typed_moe.routing import RoutingStrategy


@final
@attrs.frozen(kw_only=True)
class Layers:
    """Which decoder layers are MoE layers; `dense` is the field that makes the others dense."""

    num_hidden_layers: int
    moe: tuple[int, ...]
    dense: str


@final
@attrs.frozen(kw_only=True)
class Shared:
    """The shared expert of a layer."""

    num_experts: int = 0
    intermediate_size: int = 0
    combination: SharedCombination = SharedCombination.NONE


@final
@attrs.frozen(kw_only=True)
class Experts:
    """The experts of one layer; `hidden_size` None: the model's."""

    num_experts: int
    top_k: int
    intermediate_size: int
    activation: Activation
    shared: Shared = Shared()
    hidden_size: int | None = None
    router_weight_fp32: bool = False
    has_bias: bool = False


@final
@attrs.frozen(kw_only=True)
class Names:
    """Tensor names of the published checkpoint: `{root}.{layer_id}.{block}{name}`."""

    layout: CheckpointLayout
    root: str = "model.layers"
    block: str = "mlp."
    experts: str = "experts"
    gate: str = "gate.weight"
    gate_bias: str | None = None
    correction_bias: str | None = None


@final
@attrs.frozen(kw_only=True)
class Family:
    """One model_type: how its config is read. Each function reads from the fields it is given.

    Attributes:
        layers: which layers are MoE layers.
        routing: the routing rule of one layer.
        experts: the experts of one layer.
        names: tensor names.
    """

    layers: Callable[[Fields], Layers]
    routing: Callable[[Fields, int], RoutingStrategy]
    experts: Callable[[Fields, int], Experts]
    names: Names


def every_layer(fields: Fields) -> Layers:
    """Every decoder layer is an MoE layer."""
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    fields.note("layers", f"every layer of a {fields.model_type} model is an MoE layer")
    return Layers(num_hidden_layers=count, moe=tuple(range(count)), dense="")


def from_first_k_dense(fields: Fields, *, default: int | None = None, owner: str = "") -> Layers:
    """MoE from layer `first_k_dense_replace` on."""
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    first = fields.integer("layers", "first_k_dense_replace", default=default, owner=owner, least=0)
    dense = fields.sources["layers"]
    return Layers(num_hidden_layers=count, moe=tuple(range(first, count)), dense=dense)


def from_layer_types(
    fields: Fields, name: str, *, moe: str, others: tuple[str, ...]
) -> Layers | None:
    """MoE where the list `name` has the word `moe`; None if there is no such list."""
    listed = fields.optional_list(name)
    if listed is None:
        return None
    count = fields.integer("layers.num_hidden_layers", "num_hidden_layers")
    if len(listed) < count:
        raise ValueError(
            f"{name} has {len(listed)} entries in a {fields.model_type} config with "
            f"num_hidden_layers = {count}; allowed: one entry per layer"
        )
    for one in listed:
        if one not in (moe, *others):
            raise ValueError(
                f"{name} has the entry {one!r} in a {fields.model_type} config; allowed: "
                + " or ".join(repr(word) for word in (moe, *others))
            )
    fields.note("layers", f"{name}: MoE where it says {moe!r}")
    layers = tuple(i for i in range(count) if listed[i] == moe)
    return Layers(num_hidden_layers=count, moe=layers, dense=f"{name} does not say {moe!r}")


def gated(fields: Fields, *, owner: str) -> Activation:
    """The gated activation that `hidden_act` names."""
    name = fields.text("activation", "hidden_act", default="silu", owner=owner)
    match name:
        case "silu" | "swish":
            return Swiglu()
        case "gelu":
            return Geglu()
        case "gelu_pytorch_tanh" | "gelu_new":
            return Geglu(approximate="tanh")
        case _:
            raise ValueError(
                f"hidden_act is {name!r} in a {fields.model_type} config; allowed: 'silu', 'swish', "
                "'gelu', 'gelu_pytorch_tanh' or 'gelu_new'"
            )


def summed(fields: Fields, *, width: int) -> Shared:
    """`n_shared_experts` shared experts, each `width` wide, added to the routed output."""
    if "n_shared_experts" in fields.values and fields.values["n_shared_experts"] is None:
        fields.note("num_shared_experts", "n_shared_experts = None: no shared expert")
        return Shared()
    count = fields.integer("num_shared_experts", "n_shared_experts", least=0)
    fields.note(
        "shared_expert_intermediate_size",
        f"n_shared_experts * moe_intermediate_size = {count * width}",
    )
    if count == 0:
        return Shared()
    return Shared(
        num_experts=count, intermediate_size=count * width, combination=SharedCombination.SUM
    )
