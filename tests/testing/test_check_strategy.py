"""The contract check: every strategy of ours passes, and each broken one is told its fault."""

from __future__ import annotations

from typing import final

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests.acceptance.cases import CASES, Case, sized
from typed_moe import (
    BiasRule,
    InKernel,
    KernelRules,
    Refused,
    Renormalize,
    Routed,
    RoutingShape,
    RoutingStrategy,
)
from typed_moe.routing import float_logits, routed, top_k_ids
from typed_moe.testing import check_strategy

SHAPES = ((8, 2), (16, 4), (128, 8), (160, 6), (384, 8), (512, 10))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_strategy_at_its_own_shape(case: Case) -> None:
    """The published model's E and k."""
    check_strategy(case.strategy, num_experts=case.num_experts, top_k=case.top_k)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}-{shape[1]}")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_every_strategy_at_other_shapes(case: Case, shape: tuple[int, int]) -> None:
    """Small, odd and large layers, where the strategy is defined for them."""
    try:
        case.strategy.check(RoutingShape(num_experts=shape[0], top_k=shape[1]))
    except ValueError as refused:
        pytest.skip(str(refused))
    case = sized(case, *shape)
    check_strategy(case.strategy, num_experts=shape[0], top_k=shape[1], seed=1)


@final
@attrs.frozen(kw_only=True)
class Broken(RoutingStrategy):
    """Softmax over the k best, with one fault."""

    fault: str

    @property
    @override
    def name(self) -> str:
        return "" if self.fault == "name" else "Broken"

    @property
    @override
    def bias(self) -> BiasRule:
        return BiasRule.REQUIRED if self.fault == "bias" else BiasRule.NONE

    @property
    @override
    def router_logits_dtype(self) -> torch.dtype | None:
        return torch.float32 if self.fault == "precision" else None

    @override
    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        told = Renormalize().in_kernel(shape, rules)
        if self.fault == "label" and isinstance(told, InKernel):
            return attrs.evolve(told, routing_method_type="TopK")
        if self.fault == "smallest" and isinstance(told, InKernel):
            return told
        return Refused("not asked here")

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        logits, usable = float_logits(router_logits)
        ids, usable = self._ids(logits, shape), self._usable(usable)
        weights = logits.gather(1, ids).softmax(1)
        if self.fault == "overflow":
            weights = logits.gather(1, ids).exp()
        if self.fault == "neighbours":
            weights = weights * logits.shape[0]
        if self.fault == "synchronises":
            assert float(logits.sum()) == float(logits.sum())
        if self.fault == "rounds" and router_logits.dtype is torch.bfloat16:
            weights = weights.bfloat16().float()
        if self.fault == "writes":
            router_logits.add_(1.0)
        return self._result(ids, weights, usable)

    def _result(self, ids: Tensor, weights: Tensor, usable: Tensor) -> Routed:
        if self.fault == "range":
            ids = ids + 1
        if self.fault == "int64":
            return Routed(topk_ids=ids, topk_weights=weights)
        if self.fault == "bfloat16":
            return Routed(topk_ids=ids.int(), topk_weights=weights.bfloat16())
        if self.fault == "a slot too many":
            ids, weights = torch.cat((ids, ids[:, :1]), 1), torch.cat((weights, weights[:, :1]), 1)
        if self.fault in ("overflow", "padding"):
            return Routed(topk_ids=ids.int(), topk_weights=weights)
        return routed(ids, weights, usable)

    def _usable(self, usable: Tensor) -> Tensor:
        return torch.ones_like(usable) if self.fault == "padding" else usable

    def _ids(self, logits: Tensor, shape: RoutingShape) -> Tensor:
        ids = top_k_ids(logits, shape.top_k)
        match self.fault:
            case "ties":
                flipped = top_k_ids(logits.flip(1), shape.top_k)
                return shape.num_experts - 1 - flipped
            case "twice":
                return ids[:, :1].expand(-1, shape.top_k)
            case "smallest":
                return top_k_ids(-logits, shape.top_k)
            case _:
                return ids


FAULTS = {
    "name": "a strategy's name is text; got ''",
    "int64": r"topk_ids is int32; got torch\.int64",
    "bfloat16": r"topk_weights is float32; got torch\.bfloat16",
    "a slot too many": r"topk_ids is \(0, 4\); got \(0, 5\)",
    "range": r"ids are 0 to 15; got \[.*16\]",
    "twice": "the ids of a row are distinct",
    "overflow": "weights are finite for finite logits",
    "writes": "leaves its input as it was",
    "neighbours": "routes a token alone as among others",
    "padding": "a row with a NaN, or of -inf alone, has weight 0",
    "ties": "ties go to the lower id",
    "bias": "asks for a bias, so None raises ValueError",
    "precision": "asks for float32 logits, so bfloat16 raises TypeError",
    "rounds": "bfloat16 logits route as the same values in float32",
    "synchronises": "does not synchronise with the host",
    "label": "the kernel routing as TopK gives the weights",
    "smallest": "the kernel routing as Renormalize chooses the same experts",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_strategy_is_told_its_fault(fault: str) -> None:
    """The sentence names the clause of the contract that was broken."""
    with pytest.raises(AssertionError, match=FAULTS[fault]):
        check_strategy(Broken(fault=fault), num_experts=16, top_k=4)


def test_the_same_strategy_without_a_fault() -> None:
    """So each of the above fails for its fault and for nothing else."""
    check_strategy(Broken(fault="none"), num_experts=16, top_k=4)


def test_ties_may_be_left_out() -> None:
    """A rule that prefers some experts whatever the logits says so."""
    check_strategy(Broken(fault="ties"), num_experts=16, top_k=4, ties=False)
