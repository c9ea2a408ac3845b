"""Acceptance test 58: twelve seeded faults, each killed by a named check.

`route_with` is a plain float32 implementation of every rule with a place for each fault. Without
a fault it passes every check of `checks.py`, so a mutant dies of its fault and of nothing else.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import CASES, Case, find
from tests.acceptance.checks import Check, checks_for
from tests.acceptance.routes import Chosen, Route

Fault = Literal[
    "none",
    "groups masked with 0",
    "groups ranked by max",
    "bias in the weights",
    "no epsilon",
    "scale twice",
    "no renormalisation",
    "uninitialised slots hold 0",
    "bias in bfloat16",
    "one expert too few",
    "softmax for sigmoid",
    "ties to the higher id",
    "expert k + 1 for expert k",
]
FAULTS: tuple[Fault, ...] = tuple(fault for fault in get_args(Fault) if fault != "none")


def route_with(fault: Fault) -> Route:
    """A route with one fault."""

    def route(case: Case, logits: Tensor, bias: Tensor | None) -> Chosen:
        rule = case.rule
        x = logits.double()
        broken = x.isnan().any(1, keepdim=True) | (x == -math.inf).all(1, keepdim=True)
        x = x.masked_fill(broken, 0.0)
        kind = "softmax" if fault == "softmax for sigmoid" and rule.rank == "sigmoid" else rule.rank
        # Softmax is ranked by its logits, whose order it keeps.
        plain = kind == "softmax" and rule.num_expert_group == 1
        scores = (x if plain else oracle.score(kind, x)).float()
        ranking = scores + _bias(bias, fault) if rule.biased else scores
        ranking = _groups(case, ranking, fault)
        ids = _pick(ranking, case.top_k, fault)
        weights = _weights(case, x, ranking, ids, fault).masked_fill(broken, 0.0)
        return Chosen(dense=oracle.dense(ids, weights, case.num_experts), ids=ids)

    return route


def _bias(bias: Tensor | None, fault: Fault) -> Tensor:
    assert bias is not None
    return bias.bfloat16().float() if fault == "bias in bfloat16" else bias.float()


def _groups(case: Case, ranking: Tensor, fault: Fault) -> Tensor:
    rule = case.rule
    if rule.num_expert_group == 1:
        return ranking
    groups = ranking.reshape(len(ranking), rule.num_expert_group, -1)
    two = rule.group_score == "top2_sum" and fault != "groups ranked by max"
    best = groups.sort(dim=2, descending=True).values[:, :, : 2 if two else 1].sum(2)
    kept = best.sort(dim=1, descending=True, stable=True).indices[:, : rule.topk_group]
    outside = torch.ones_like(best, dtype=torch.bool).scatter(1, kept, value=False)
    fill = 0.0 if fault == "groups masked with 0" else -math.inf
    return groups.masked_fill(outside.unsqueeze(2), fill).reshape(ranking.shape)


def _pick(ranking: Tensor, top_k: int, fault: Fault) -> Tensor:
    if fault == "uninitialised slots hold 0":
        # The reduction of FlashInfer 0.6.6: empty slots of value 0 and expert 0 take part.
        padded = torch.cat((ranking, torch.zeros(len(ranking), 2)), dim=1)
        ids = padded.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
        return torch.where(ids < ranking.shape[1], ids, 0)
    if fault == "ties to the higher id":
        order = ranking.flip(1).sort(dim=1, descending=True, stable=True).indices
        return ranking.shape[1] - 1 - order[:, :top_k]
    order = ranking.sort(dim=1, descending=True, stable=True).indices
    if fault == "expert k + 1 for expert k" and top_k < ranking.shape[1]:
        return torch.cat((order[:, : top_k - 1], order[:, top_k : top_k + 1]), dim=1)
    return order[:, :top_k]


def _weights(case: Case, x: Tensor, ranking: Tensor, ids: Tensor, fault: Fault) -> Tensor:
    rule = case.rule
    kind = "softmax" if fault == "softmax for sigmoid" and rule.weigh == "sigmoid" else rule.weigh
    if rule.weigh == "softmax" and rule.divide and fault != "no renormalisation":
        chosen = x.gather(1, ids)
        weights = oracle.score("softmax", chosen)
    else:
        weights = oracle.score(kind, x).gather(1, ids)
        if fault == "bias in the weights" and rule.biased:
            weights = ranking.double().gather(1, ids)
        if rule.divide and fault != "no renormalisation":
            total = weights.float().sum(1, keepdim=True).double()
            epsilon = 0.0 if fault == "no epsilon" else max(rule.epsilon, rule.floor)
            weights = weights.float().double() / (total + epsilon)
    if fault == "one expert too few":
        weights[:, -1] = 0.0
    factor = rule.scale**2 if fault == "scale twice" else rule.scale
    return weights * factor


def _failing(route: Route) -> list[str]:
    """`case: check` of every check that the route fails."""
    failing = []
    for case in CASES:
        for number, check in checks_for(case).items():
            if not _passes(check, case, route):
                failing.append(f"{case.id}: {number}")
    return failing


def _passes(check: Check, case: Case, route: Route) -> bool:
    torch.manual_seed(58)
    try:
        check(case, route)
    except AssertionError:
        return False
    return True


def test_acceptance_58_the_implementation_without_a_fault_passes() -> None:
    """The control: what the mutants are made from is right."""
    assert _failing(route_with("none")) == []


KILLERS: dict[Fault, tuple[str, str]] = {
    "groups masked with 0": ("DeepSeekV3-8of4", "13"),
    "groups ranked by max": ("DeepSeekV3-8of4", "30"),
    "bias in the weights": ("MiniMax2", "17"),
    "no epsilon": ("DeepSeekV3-8of4", "16"),
    "scale twice": ("DeepSeekV3-Kimi", "21"),
    "no renormalisation": ("RenormalizeNaive", "21"),
    "uninitialised slots hold 0": ("Renormalize", "01"),
    "bias in bfloat16": ("MiniMax2", "14"),
    "one expert too few": ("Default", "01"),
    "softmax for sigmoid": ("SigmoidRenorm", "21"),
    "ties to the higher id": ("Default", "04"),
    "expert k + 1 for expert k": ("Default", "02"),
}
"""For each fault one case and check that has to kill it; others do too."""


@pytest.mark.parametrize("fault", FAULTS)
def test_acceptance_58_every_seeded_fault_is_killed(fault: Fault) -> None:
    """flashinfer#4639, #4082: a suite that a faulty router passes is no suite."""
    case_id, number = KILLERS[fault]
    case = find(case_id)

    assert not _passes(checks_for(case)[number], case, route_with(fault))


def test_acceptance_58_there_are_twelve() -> None:
    """The twelve faults of the list, each with the check that has to kill it."""
    assert len(FAULTS) == 12
    assert set(KILLERS) == set(FAULTS)
