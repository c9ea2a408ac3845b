"""A run's output and choices against the float64 oracle."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.layer import FusedMoE
from typed_moe.quantization import relative_error_bound
from typed_moe.routing import RoutingStrategy
from typed_moe.testing._oracle import (
    ORACLE_METHODS,
    OracleExperts,
    OracleRouting,
    experts_float64,
    route_float64,
)

_SETTINGS = (
    "num_expert_group",
    "topk_group",
    "group_score",
    "norm_topk_prob",
    "routed_scaling_factor",
)


@final
@attrs.frozen(kw_only=True)
class Comparison:
    """How far a run is from the oracle.

    Attributes:
        relative_error: ||output - oracle|| / ||oracle||, Frobenius; None without tokens.
        bound: what the format allows.
        rows: tokens.
        rows_with_other_experts: tokens whose expert set is not the oracle's; None: the oracle
            does not know the method, and has taken the strategy's own ids and weights.
        undecided_rows: those among them whose scores tie in float32; for these the oracle's
            output is of the strategy's experts.
    """

    relative_error: float | None
    bound: float
    rows: int
    rows_with_other_experts: int | None
    undecided_rows: int

    @property
    def passed(self) -> bool:
        """The error is within the bound."""
        return self.relative_error is None or self.relative_error <= self.bound


@final
@attrs.frozen(kw_only=True, eq=False)
class _Choice:
    ids: Tensor
    weights: Tensor
    different: int | None
    undecided: int


def compare(
    layer: FusedMoE,
    output: Tensor,
    hidden_states: Tensor,
    logits: Tensor,
    experts: OracleExperts,
) -> Comparison:
    """Compare an output with the oracle's on the unquantised weights.

    Args:
        layer: that made it.
        output: (T, H).
        hidden_states: (T, H), that it was made from.
        logits: (T, E), that it was routed by.
        experts: their unquantised weights, fused shared ones behind the routed ones.
    """
    request = layer.plan.request
    choice = _choose(layer, logits)
    ids, weights = choice.ids, choice.weights
    for shared in range(request.num_fused_shared_experts):
        extra = torch.full_like(ids[:, :1], request.shape.num_experts + shared)
        ids = torch.cat((ids, extra), dim=1)
        weights = torch.cat((weights, torch.ones_like(weights[:, :1])), dim=1)
    expected = experts_float64(
        hidden_states, ids, weights, experts, weight_on_input=layer.plan.weight_on_input
    )
    return Comparison(
        relative_error=_relative_error(output.to(torch.float64), expected),
        bound=relative_error_bound(request.quant, request.activation),
        rows=logits.shape[0],
        rows_with_other_experts=choice.different,
        undecided_rows=choice.undecided,
    )


def _relative_error(output: Tensor, expected: Tensor) -> float | None:
    if expected.numel() == 0:
        return None
    error, size = float((output - expected).norm()), float(expected.norm())
    if size == 0.0:
        return 0.0 if error == 0.0 else math.inf
    return error / size


def selected(layer: FusedMoE, logits: Tensor) -> Tensor:
    """(T, k) ids that the strategy chooses."""
    return layer.routing.select_experts(
        logits, layer.e_score_correction_bias, shape=layer.plan.request.shape
    ).topk_ids


def _choose(layer: FusedMoE, logits: Tensor) -> _Choice:
    """The oracle's experts, but where float32 cannot tell the strategy's."""
    strategy, bias = layer.routing, layer.e_score_correction_bias
    own = strategy.select_experts(logits, bias, shape=layer.plan.request.shape)
    if strategy.name not in ORACLE_METHODS:
        return _Choice(ids=own.topk_ids, weights=own.topk_weights, different=None, undecided=0)
    theirs = _oracle(strategy, logits, bias, layer.plan.request.shape.top_k)
    mine = own.topk_ids.long()
    differ = (mine.sort(dim=1).values != theirs.ids.sort(dim=1).values).any(dim=1)
    undecided = differ & theirs.undecided()
    again = _oracle(strategy, logits, bias, layer.plan.request.shape.top_k, ids=mine)
    row = undecided.unsqueeze(1)
    return _Choice(
        ids=torch.where(row, again.ids, theirs.ids),
        weights=torch.where(row, again.weights, theirs.weights),
        different=int(differ.sum()),
        undecided=int(undecided.sum()),
    )


def _oracle(
    strategy: RoutingStrategy,
    logits: Tensor,
    bias: Tensor | None,
    top_k: int,
    ids: Tensor | None = None,
) -> OracleRouting:
    settings = {name: getattr(strategy, name) for name in _SETTINGS if hasattr(strategy, name)}
    return route_float64(logits, bias, method=strategy.name, top_k=top_k, ids=ids, **settings)
