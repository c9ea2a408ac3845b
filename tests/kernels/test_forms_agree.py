"""The two routing forms on the rows where float32 runs out: the plan's choice is not the user's."""

from __future__ import annotations

import math

import pytest
import torch

from tests.acceptance.cases import CASES, Case, find, sized
from tests.acceptance.routes import direct, fused, in_kernel

FUSED = [case for case in CASES if fused(case)]


@pytest.mark.parametrize("logit", [-47.0, -46.5, -46.0])
def test_sigmoid_renorm_of_sums_near_its_floor(logit: float) -> None:
    """Sums of about 1e-20, where adding it and taking the larger differ by a factor of two."""
    case = sized(find("SigmoidRenorm"), 8, 2)
    logits = torch.full((1, 8), logit)
    strategy, kernel = direct(case, logits, None), in_kernel(case, logits, None)

    torch.testing.assert_close(kernel.dense, strategy.dense, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
def test_a_row_with_plus_infinity(case: Case) -> None:
    """An overflowed bfloat16 gate gives +inf: both forms answer with finite, equal weights."""
    logits = torch.randn(3, case.num_experts)
    logits[1, 5] = math.inf
    bias = torch.zeros(case.num_experts) if case.biased else None
    strategy, kernel = direct(case, logits, bias), in_kernel(case, logits, bias)

    assert bool(strategy.dense.isfinite().all())
    assert bool(kernel.dense.isfinite().all())
    torch.testing.assert_close(kernel.dense, strategy.dense, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", FUSED, ids=lambda case: case.id)
def test_fewer_finite_logits_than_experts_to_choose(case: Case) -> None:
    """Masked experts (-inf) are chosen only for lack of others, and then weigh nothing."""
    kept = max(1, case.top_k - 2)
    logits = torch.full((2, case.num_experts), -math.inf)
    logits[:, :kept] = torch.linspace(1.0, 2.0, kept)
    bias = torch.zeros(case.num_experts) if case.biased else None
    strategy, kernel = direct(case, logits, bias), in_kernel(case, logits, bias)

    assert bool(strategy.dense.isfinite().all())
    assert bool(kernel.dense.isfinite().all())
    torch.testing.assert_close(kernel.dense, strategy.dense, atol=1e-6, rtol=1e-5)
    assert bool((strategy.dense[:, kept:] == 0).all())
