"""Acceptance tests 01 to 12: selection under adverse logits, in every way of routing."""

from __future__ import annotations

import pytest

from tests.acceptance import checks
from tests.acceptance.cases import Case
from tests.acceptance.routes import Route, routes

EVERY = [pytest.param(case, route, id=name) for name, case, route in routes()]
every = pytest.mark.parametrize(("case", "route"), EVERY)


@every
def test_acceptance_01_all_logits_negative(case: Case, route: Route) -> None:
    """flashinfer#2822, vllm#37605: uninitialised slots of 0 beat negative logits."""
    checks.check_01_all_negative(case, route)

@every
def test_acc_02(case: Case, route: Route) -> None:
    checks.check_02_few_positive(case, route)
@every
def test_acc_rest(case: Case, route: Route) -> None:
    import torch
    for n, c in checks.checks_for(case).items():
        torch.manual_seed(0)
        try:
            c(case, route)
        except AssertionError as e:
            print("FAIL", n, str(e)[:300])
            fail=True
    assert "fail" not in dir()
