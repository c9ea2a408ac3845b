"""The float64 oracle on what a layer has stored, rank by rank."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._verify_cases import EXPERTS, HIDDEN, INTERMEDIATE, Inputs
from typed_moe.config import Activation, Format, Placement, SwigluStep, Unquantized
from typed_moe.kernels import MoeKernel, ReferenceKernel
from typed_moe.layer import FusedMoE
from typed_moe.quantization import (
    Quantized,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
)
from typed_moe.routing import Renormalize, RoutingForm, RoutingStrategy
from typed_moe.testing._oracle import OracleExperts, OracleRouting, experts_float64, route_float64

_SETTINGS = (
    "num_expert_group",
    "topk_group",
    "group_score",
    "norm_topk_prob",
    "routed_scaling_factor",
)


def make_layer(
    strategy: RoutingStrategy,
    *,
    top_k: int,
    quant: Format,
    activation: Activation,
    placement: Placement,
    kernel: MoeKernel,
    form: RoutingForm | None,
    device: torch.device,
) -> FusedMoE:
    """An empty layer of the size that is verified.

    Raises:
        UnsupportedRouting: the kernel does not serve it.
    """
    return FusedMoE(
        num_experts=EXPERTS,
        top_k=top_k,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        routing=strategy,
        quant=quant,
        activation=activation,
        placement=placement,
        kernel=kernel,
        routing_form=form,
        device=device,
        dtype=dtype_of(quant),
    )


def dtype_of(quant: Format) -> torch.dtype:
    """Of activations: what unquantised layers alone can have is float32."""
    return torch.float32 if isinstance(quant, Unquantized) else torch.bfloat16


@final
@attrs.frozen(kw_only=True, eq=False)
class StoredRank:
    """One rank's share of the experts.

    Attributes:
        state: its stored tensors by parameter name.
        experts: the same dequantised, in float64, for the oracle.
        first: global id of its first expert.
        count: its experts.
        input_scale: of the input, where the format has a static one.
    """

    state: Mapping[str, Tensor]
    experts: OracleExperts
    first: int
    count: int
    input_scale: Tensor | None


def store(
    quant: Format, activation: Activation, placements: tuple[Placement, ...], inputs: Inputs
) -> tuple[StoredRank, ...]:
    """Quantise the weights once for all strategies; the static scales are the whole layer's."""
    scales = _static_scales(quant, activation, inputs)
    return tuple(_rank(quant, activation, placement, inputs, scales) for placement in placements)


def _loaded(
    quant: Format, activation: Activation, placement: Placement, inputs: Inputs
) -> FusedMoE:
    layer = make_layer(
        Renormalize(),
        top_k=2,
        quant=quant,
        activation=activation,
        placement=placement,
        kernel=ReferenceKernel(),
        form=None,
        device=torch.device("cpu"),
    )
    layer.load_weights(inputs.weights)
    return layer


def _static_scales(quant: Format, activation: Activation, inputs: Inputs) -> dict[str, Tensor]:
    layer = _loaded(quant, activation, Placement(), inputs)
    layer.calibrate(inputs.hidden_states.to(dtype_of(quant)), inputs.logits)
    return {
        name: parameter.data
        for name, parameter in layer.named_parameters()
        if name.endswith("input_scale")
    }


def _rank(
    quant: Format,
    activation: Activation,
    placement: Placement,
    inputs: Inputs,
    scales: Mapping[str, Tensor],
) -> StoredRank:
    layer = _loaded(quant, activation, placement, inputs)
    state = {name: parameter.data for name, parameter in layer.named_parameters()} | dict(scales)
    limit = activation.limit if isinstance(activation, SwigluStep) else None
    experts = OracleExperts(
        w13=_dequantised(state, "w13", quant),
        w2=_dequantised(state, "w2", quant),
        activation=activation.name,
        limit=limit,
    )
    return StoredRank(
        state=state,
        experts=experts,
        first=placement.local_expert_offset(EXPERTS),
        count=placement.num_local_experts(EXPERTS),
        input_scale=scales.get("w13_input_scale"),
    )


def _dequantised(state: Mapping[str, Tensor], prefix: str, quant: Format) -> Tensor:
    stored = Quantized(
        data=state[f"{prefix}_weight"],
        scale=state.get(f"{prefix}_weight_scale_inv", state.get(f"{prefix}_weight_scale")),
        global_scale=state.get(f"{prefix}_weight_scale_2"),
    )
    return dequantize_weight(stored, quant).to(torch.float64)


def as_read(x: Tensor, quant: Format, scale: Tensor | None) -> Tensor:
    """(n, K) float64: what a matrix of the format reads of an activation."""
    stored = quantize_activation(x.to(torch.float32), quant, input_scale=scale)
    return dequantize_activation(stored, quant).to(torch.float64)


def oracle_routing(strategy: RoutingStrategy, inputs: Inputs, top_k: int) -> OracleRouting:
    """The strategy's method in float64."""
    settings = {name: getattr(strategy, name) for name in _SETTINGS if hasattr(strategy, name)}
    return route_float64(inputs.logits, inputs.bias, method=strategy.name, top_k=top_k, **settings)


def expected_output(
    ranks: tuple[StoredRank, ...],
    quant: Format,
    inputs: Inputs,
    routing: OracleRouting,
    *,
    weigh_input: RoutingForm | None,
    uniform: bool,
    rounded: bool,
) -> Tensor:
    """(T, H) float64, the sum over the ranks.

    Args:
        ranks: that hold all experts between them.
        quant: their format.
        inputs: of the layer.
        routing: the oracle's.
        weigh_input: the form of a layer whose weight goes on the input, where the weight is
            applied before or after the input is quantised; None: it goes on the output.
        uniform: weigh every slot with 1 / top_k instead.
        rounded: the second matrix reads the intermediate as the format stores it.
    """
    x, weights = inputs.hidden_states, routing.weights
    if uniform:
        weights = torch.full_like(weights, 1 / weights.shape[1])
    if weigh_input is RoutingForm.PRECOMPUTED:
        # One expert per token; the product is rounded to the layer's dtype.
        x = (x.float() * weights.float()).to(dtype_of(quant))
        weights = torch.ones_like(weights)
    total = torch.zeros(x.shape, dtype=torch.float64)
    for rank in ranks:
        experts = rank.experts
        if rounded:
            scale = rank.state.get("w2_input_scale")
            experts = attrs.evolve(
                experts, round_intermediate=partial(as_read, quant=quant, scale=scale)
            )
        local = routing.ids - rank.first
        total += experts_float64(
            as_read(x, quant, rank.input_scale),
            torch.where((local >= 0) & (local < rank.count), local, -1),
            weights,
            experts,
            weight_on_input=weigh_input is RoutingForm.IN_KERNEL,
        )
    return total
