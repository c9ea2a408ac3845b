"""Our experts and routing in place of a transformers model's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import override

from tests.hf._families import Call, Family
from tests.hf._models import Model
from typed_moe import FusedMoE, MoeSpec, RoutingForm, RoutingStrategy, moe_spec, strategy_for
from typed_moe.models import SharedCombination

_BIAS = "e_score_correction_bias"


class SwappedMoe(nn.Module):
    """A model's MoE block with `FusedMoE` for its experts and for its router's choice.

    The gate's matrix product and the shared expert are the model's own modules; how the shared
    expert's output is added is what the spec says.

    Args:
        block: the model's.
        family: how its parts are named and called.
        spec: of the layer.
        experts: ours, loaded.
    """

    def __init__(self, block: nn.Module, family: Family, spec: MoeSpec, experts: FusedMoE) -> None:
        super().__init__()
        self.family, self.spec = family, spec
        self.block = block
        self.experts = experts

    def router_logits(self, x: Tensor) -> Tensor:
        """(T, E) from (T, H): the model's own router, of which only the logits are used."""
        gate = self.block.get_submodule(self.family.gate)
        if self.family.call is Call.WITH_BIAS:
            outputs = gate(x, self.block.get_buffer(_BIAS))
        else:
            outputs = gate(x)
        logits: Tensor = outputs[1 if self.family.call is Call.LOGITS_SECOND else 0]
        return logits

    def routed(self, x: Tensor) -> Tensor:
        """(T, H) of the routed experts alone."""
        logits = self.router_logits(x)
        if self.spec.hidden_size == self.spec.router_hidden_size:
            return self.experts(x, logits)
        narrow: Tensor = self.block.get_submodule("fc1_latent_proj")(x)
        wide: Tensor = self.block.get_submodule("fc2_latent_proj")(self.experts(narrow, logits))
        return wide

    def shared(self, x: Tensor) -> Tensor:
        """(T, H) of the shared expert alone."""
        assert self.family.shared is not None
        output: Tensor = self.block.get_submodule(self.family.shared)(x)
        return output

    def combined(self, x: Tensor) -> Tensor:
        """(T, H) of both, put together as the spec says."""
        match self.spec.shared_expert_combination:
            case SharedCombination.NONE:
                return self.routed(x)
            case SharedCombination.SUM:
                return self.routed(x) + self.shared(x)
            case SharedCombination.AVERAGE:
                return (self.routed(x) + self.shared(x)) / 2
            case SharedCombination.SIGMOID_GATED:
                share: Tensor = self.block.get_submodule("shared_expert_gate")(x)
                return self.routed(x) + share.sigmoid() * self.shared(x)

    @override
    def forward(
        self, hidden_states: Tensor, input_ids: Tensor | None = None
    ) -> Tensor | tuple[Tensor, None]:
        del input_ids  # DeepSeek-V4 offers them to every block; only its hash layers look
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        output = self.combined(x).reshape(hidden_states.shape)
        return (output, None) if self.family.pair else output


def block_output(block: nn.Module, family: Family, x: Tensor) -> Tensor:
    """(T, H) of the model's own block."""
    outputs = block(x.unsqueeze(0))
    output: Tensor = outputs[0] if family.pair else outputs
    return output.reshape(x.shape)


def correction_bias(block: nn.Module) -> Tensor | None:
    """A block's `e_score_correction_bias`, which some keep in the router; None if it has none."""
    state: dict[str, Tensor] = block.state_dict()
    return next((tensor for name, tensor in state.items() if name.endswith(_BIAS)), None)


def expert_tensors(block: nn.Module, family: Family) -> dict[str, Tensor]:
    """What the block's experts hold, by the names that `family.layout` has for it."""
    ending = ".weight" if family.block == "mixer" else ""
    state = block.get_submodule("experts").state_dict()
    return {f"{name}{ending}": tensor for name, tensor in state.items()}


def empty_experts(
    spec: MoeSpec,
    routing: RoutingStrategy,
    *,
    form: RoutingForm | None = None,
    dtype: torch.dtype = torch.float32,
) -> FusedMoE:
    """The layer that the spec describes, without weights."""
    return FusedMoE(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        routing=routing,
        activation=spec.activation,
        has_bias=spec.has_bias,
        routing_form=form,
        prefix=spec.experts_prefix,
        dtype=dtype,
    )


def experts_of(
    block: nn.Module,
    family: Family,
    spec: MoeSpec,
    routing: RoutingStrategy,
    *,
    form: RoutingForm | None = None,
    zero_bias: bool = False,
) -> FusedMoE:
    """The layer with the block's weights."""
    tensors = expert_tensors(block, family)
    experts = empty_experts(spec, routing, form=form, dtype=next(iter(tensors.values())).dtype)
    bias = correction_bias(block)
    assert (bias is not None) == spec.has_correction_bias
    if bias is not None and experts.e_score_correction_bias is not None:
        tensors[_BIAS] = torch.zeros_like(bias) if zero_bias else bias
    read = experts.load_weights(tensors.items(), layout=family.layout)
    assert read == set(tensors)
    return experts


@contextmanager
def swapped(
    model: Model,
    *,
    routing: RoutingStrategy | None = None,
    form: RoutingForm | None = None,
    zero_bias: bool = False,
) -> Iterator[list[SwappedMoe]]:
    """The model with every MoE block replaced, until the block of code ends.

    Args:
        model: the model.
        routing: None: what `strategy_for` says.
        form: who routes; None: as the layer plans by itself.
        zero_bias: load zeros for the correction bias.
    """
    family = model.case.family
    blocks = {layer: model.module.get_submodule(model.path(layer)) for layer in model.layers}
    ours: list[SwappedMoe] = []
    try:
        for layer, block in blocks.items():
            spec = moe_spec(model.config, layer)
            rule = strategy_for(model.config, layer) if routing is None else routing
            experts = experts_of(block, family, spec, rule, form=form, zero_bias=zero_bias)
            ours.append(SwappedMoe(block, family, spec, experts))
            model.module.set_submodule(model.path(layer), ours[-1])
        yield ours
    finally:
        for layer, block in blocks.items():
            model.module.set_submodule(model.path(layer), block)
