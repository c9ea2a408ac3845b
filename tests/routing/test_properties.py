"""What holds for every strategy at every size: hypothesis against the float64 oracle."""

from __future__ import annotations

import pickle

import attrs
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import typed_moe
from tests import oracle
from tests.acceptance import checks
from tests.acceptance.cases import CASES, Case, loosened
from tests.acceptance.routes import direct, fused, in_kernel
from tests.routing.draws import cases, inputs
from typed_moe import RoutingShape

SEEDS = st.integers(0, 2**16)
SPREADS = st.sampled_from([0.05, 1.0, 4.0, 20.0])
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@settings(max_examples=400)
@given(case=cases(), tokens=st.integers(0, 12), seed=SEEDS, spread=SPREADS)
def test_equals_the_oracle(case: Case, tokens: int, seed: int, spread: float) -> None:
    """Same experts on decided rows, the rule's weights on every row, in either form."""
    logits, bias = inputs(case, tokens, seed, spread)
    checks.check_selection(case, direct, logits, bias, least_decided=0.0)
    if fused(case):
        checks.check_selection(case, in_kernel, logits, bias, least_decided=0.0)


@settings(max_examples=150)
@given(case=cases(grouped=True), seed=SEEDS, spread=SPREADS)
def test_equals_the_oracle_with_groups(case: Case, seed: int, spread: float) -> None:
    """The same for the strategies with groups."""
    logits, bias = inputs(case, 9, seed, spread)
    checks.check_selection(case, direct, logits, bias, least_decided=0.0)
    if fused(case):
        checks.check_selection(case, in_kernel, logits, bias, least_decided=0.0)


def permuted_groups(case: Case, generator: torch.Generator) -> Tensor:
    """An order of the experts that moves whole groups, and experts within their group."""
    groups = case.rule.num_expert_group
    size = case.num_experts // groups
    order = torch.arange(case.num_experts).reshape(groups, size)
    order = order[torch.randperm(groups, generator=generator)]
    return torch.cat([row[torch.randperm(size, generator=generator)] for row in order])


@settings(max_examples=150)
@given(case=cases(), seed=SEEDS)
def test_experts_have_no_rank_of_their_own(case: Case, seed: int) -> None:
    """Experts in another order are chosen with the same weights, where nothing ties."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 4
    spaced = torch.linspace(-3.0, 3.0, case.num_experts)
    rows = [spaced[torch.randperm(case.num_experts, generator=generator)] for _ in range(tokens)]
    logits, (_, bias) = torch.stack(rows), inputs(case, 1, seed, 1.0)
    order = permuted_groups(case, generator)
    plain = direct(case, logits, bias)
    moved = direct(case, logits[:, order], None if bias is None else bias[order])
    decided = oracle.route(case.rule, logits, bias, case.top_k).decided
    torch.testing.assert_close(
        moved.dense[decided], plain.dense[:, order][decided], atol=1e-6 * case.rule.scale, rtol=1e-6
    )


@given(case=cases(), seed=SEEDS)
def test_calls_leave_no_trace(case: Case, seed: int) -> None:
    """The same call gives the same bits whatever was called between, and touches no input."""
    logits, bias = inputs(case, 6, seed, 2.0)
    before = logits.clone()
    first = direct(case, logits, bias)
    other, _ = inputs(case, 3, seed + 1, 9.0)
    direct(case, other, bias)
    again = direct(case, logits, bias)
    assert torch.equal(first.dense, again.dense)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@every_case
def test_result_dtypes(case: Case, dtype: torch.dtype) -> None:
    """int32 ids and float32 weights from logits of every floating dtype."""
    case = loosened(case)
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    logits = torch.randn(5, case.num_experts).to(dtype)
    routed = case.strategy.select_experts(logits, case.bias(), shape=shape)

    assert routed.topk_ids.dtype is torch.int32
    assert routed.topk_weights.dtype is torch.float32
    assert routed.topk_ids.shape == routed.topk_weights.shape == (5, case.top_k)


@pytest.mark.parametrize(
    ("logits", "error", "numbers"),
    [
        (torch.zeros(3, 7), ValueError, "(3, 7)"),
        (torch.zeros(256), ValueError, "(256,)"),
        (torch.zeros(1, 3, 256), ValueError, "(1, 3, 256)"),
        (torch.zeros(3, 256, dtype=torch.int64), TypeError, "torch.int64"),
        (torch.zeros(3, 256, dtype=torch.bool), TypeError, "torch.bool"),
    ],
    ids=["experts", "1-D", "3-D", "int", "bool"],
)
@every_case
def test_logits_of_another_layer_raise(
    case: Case, logits: Tensor, error: type[Exception], numbers: str
) -> None:
    """The message has what was given and what is allowed."""
    case = attrs.evolve(case, num_experts=256)
    if case.rule.num_expert_group > 1:
        assert 256 % case.rule.num_expert_group == 0
    with pytest.raises(error) as raised:
        direct(case, logits, torch.zeros(256) if case.biased else None)
    assert numbers in str(raised.value)
    assert "allowed" in str(raised.value)


@every_case
def test_a_strategy_is_a_value(case: Case) -> None:
    """Frozen, hashable, equal to its pickle and to what its repr says."""
    strategy = case.strategy
    copied = pickle.loads(pickle.dumps(strategy))
    said = eval(repr(strategy), {**vars(typed_moe), "torch": torch})

    assert copied == strategy == said
    assert hash(copied) == hash(strategy) == hash(said)
    assert len({copied, strategy, said}) == 1
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        type(strategy).__setattr__(strategy, "routed_scaling_factor", 2.0)


def test_strategies_of_different_classes_are_not_equal() -> None:
    """Two methods that compute the same are still two strategies."""
    strategies = [case.strategy for case in CASES]
    assert len(set(strategies)) == len(strategies)
