"""Runners take what a host's dispatcher has routed, in the place of logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.layer.build import Build, random_experts
from typed_moe import RenormalizeNaive, Routed, RoutingForm
from typed_moe.config import Placement
from typed_moe.runners import CallBuffers, Dispatched, EpMoeRunner

TOKENS, HIDDEN, WIDTH, EXPERTS = 5, 16, 12, 8
# float32 matrices of width 16 and 12, two experts summed, against float64.
TOLERANCE = 1e-5


def _given() -> tuple[Tensor, Routed]:
    """Two experts a token, one slot skipped, and weights that no rule would give."""
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(TOKENS)]).int()
    ids[1, 0] = -1
    return torch.randn(TOKENS, HIDDEN), Routed(topk_ids=ids, topk_weights=torch.rand(TOKENS, 2) * 3)


def _build(form: RoutingForm) -> Build:
    return Build(routing=RenormalizeNaive(), routing_form=form)


def test_ids_and_weights_are_taken_as_they_are() -> None:
    experts = random_experts(EXPERTS, HIDDEN, WIDTH)
    runner = _build(RoutingForm.PRECOMPUTED).loaded(experts).prepare_weights()
    x, routed = _given()
    replay = torch.full((TOKENS, 2), -7, dtype=torch.int16)
    got = runner(x, routed, None, CallBuffers(routing_replay_out=replay))
    want = oracle.moe(experts, x, routed.topk_ids, routed.topk_weights, oracle.Act())
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=TOLERANCE)
    assert torch.equal(replay, routed.topk_ids.short())


def test_a_plan_whose_kernel_routes_takes_no_ids() -> None:
    experts = random_experts(EXPERTS, HIDDEN, WIDTH)
    runner = _build(RoutingForm.IN_KERNEL).loaded(experts).prepare_weights()
    x, routed = _given()
    with pytest.raises(ValueError, match=r"routes by itself and was given ids and weights"):
        runner(x, routed, None)


def test_ids_of_another_layer_are_refused() -> None:
    experts = random_experts(EXPERTS, HIDDEN, WIDTH)
    runner = _build(RoutingForm.PRECOMPUTED).loaded(experts).prepare_weights()
    x, routed = _given()
    beyond = Routed(topk_ids=routed.topk_ids + EXPERTS, topk_weights=routed.topk_weights)
    with pytest.raises(ValueError, match=r"expert ids from \d+ to \d+; allowed"):
        runner(x, beyond, None)


class _Unused:
    """An exchange that must not be asked."""

    name = "unused"

    def check(self, placement: Placement) -> None:
        raise AssertionError

    def dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> Dispatched:
        raise AssertionError


def test_an_exchange_sends_logits_not_ids() -> None:
    experts = random_experts(EXPERTS, HIDDEN, WIDTH)
    runner = _build(RoutingForm.PRECOMPUTED).loaded(experts).prepare_weights()
    x, routed = _given()
    with pytest.raises(TypeError, match="routed already, and this exchange sends logits"):
        EpMoeRunner(runner, _Unused())(x, routed, None)
