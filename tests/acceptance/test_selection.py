"""Acceptance tests 01 to 12: selection under adverse logits, in every way of routing."""

from __future__ import annotations

import pytest
import torch

from tests.acceptance import checks
from tests.acceptance.cases import CASES, Case, find, sized
from tests.acceptance.routes import Route, direct, fused, in_kernel, routes

every = pytest.mark.parametrize(
    ("case", "route"), [pytest.param(case, route, id=name) for name, case, route in routes()]
)
SIZES = ((8, 2), (60, 4), (128, 6), (160, 6), (257, 8), (384, 10), (512, 10), (512, 22))
FLAT = tuple(case for case in CASES if case.rule.num_expert_group == 1 and case.id != "Llama4")
by_size = pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
flat = pytest.mark.parametrize("case", FLAT, ids=lambda case: case.id)


@every
def test_acceptance_01_all_logits_negative(case: Case, route: Route) -> None:
    """flashinfer#2822, vllm#37605: uninitialised slots of 0 beat negative logits."""
    checks.check_01_all_negative(case, route)


@by_size
@flat
def test_acceptance_01_all_logits_negative_at_every_size(
    case: Case, num_experts: int, top_k: int
) -> None:
    """flashinfer#2822: the bug depended on the expert count and on k."""
    checks.check_01_all_negative(sized(case, num_experts, top_k), direct)
    if fused(case):
        checks.check_01_all_negative(sized(case, num_experts, top_k), in_kernel)


@every
def test_acceptance_02_few_positive_logits(case: Case, route: Route) -> None:
    """flashinfer#2822, sharper: every row with fewer than k positive logits was wrong."""
    checks.check_02_few_positive(case, route)


@every
def test_acceptance_03_shifted_logits(case: Case, route: Route) -> None:
    """flashinfer#3803: sigmoids that all underflow gave 0 / 0."""
    checks.check_03_shifted(case, route)


@every
def test_acceptance_04_equal_logits_go_to_the_first_experts(case: Case, route: Route) -> None:
    """sglang#30989: exact ties at the top-8 boundary gave NaN."""
    checks.check_04_all_equal(case, route)


@pytest.mark.parametrize("route", [direct, in_kernel], ids=["strategy", "kernel"])
@pytest.mark.parametrize("case_id", ["Sigmoid", "SigmoidRenorm", "MiniMax2", "DeepSeekV3-Kimi"])
def test_acceptance_04_equal_logits_of_any_value(case_id: str, route: Route) -> None:
    """sglang#30989 again: a tie stays one whatever the logits' value and place in memory."""
    case = sized(find(case_id), 61, 4)
    for value in torch.linspace(-6.0, 6.0, 300).tolist():
        checks.check_equal_row(case, route, torch.full((3, 61), value))


@pytest.mark.parametrize("route", [direct], ids=["strategy"])
@pytest.mark.parametrize("case_id", ["BiasedSigmoid", "SqrtSoftplus"])
def test_acceptance_04_equal_logits_of_any_value_without_a_kernel(
    case_id: str, route: Route
) -> None:
    """The same for the strategies that no kernel knows."""
    test_acceptance_04_equal_logits_of_any_value(case_id, route)


@pytest.mark.parametrize(
    ("case", "route"),
    [pytest.param(c, r, id=name) for name, c, r in routes() if c.id != "Llama4"],
)
def test_acceptance_05_tie_at_a_group_border(case: Case, route: Route) -> None:
    """sglang#30989, flashinfer#5.5: equal k-th and (k+1)-th scores beside a group border."""
    checks.check_05_tie_at_group_border(case, route)


@pytest.mark.parametrize("route", [direct, in_kernel], ids=["strategy", "kernel"])
def test_acceptance_06_saturated_sigmoids(route: Route) -> None:
    """flashinfer#4404: Sigmoid and TopKSigmoid differ where float32's sigmoid is 1 for many."""
    checks.check_06_saturated(find("Sigmoid"), find("TopKSigmoid"), route)


@pytest.mark.parametrize(
    ("low", "high"), [(-104.0, -16.0), (88.0, 200.0), (-20.5, -19.5)], ids=["07", "08", "seam"]
)
def test_acceptance_07_08_sqrt_softplus_at_both_ends(low: float, high: float) -> None:
    """flashinfer#5211: float32's softplus underflows below -88 and overflows above 88."""
    checks.check_07_08_both_ends(find("SqrtSoftplus"), direct, low, high)


@every
def test_acceptance_09_winners_above_255(case: Case, route: Route) -> None:
    """kekzl/imp#2056: ids above 255 were never chosen."""
    checks.check_09_high_ids(case, route)


@every
def test_acceptance_10_nan_and_minus_infinity_rows(case: Case, route: Route) -> None:
    """flashinfer#2168 and padded rows of CUDA graphs: a broken row spoils no other."""
    checks.check_10_broken_rows(case, route)


@every
def test_acceptance_11_logits_dtypes_agree(case: Case, route: Route) -> None:
    """flashinfer#2796, #2889, #1573, vllm#36931: bf16 bytes read as float32, or the reverse."""
    checks.check_11_dtypes(case, route)


@every
def test_acceptance_12_strided_logits(case: Case, route: Route) -> None:
    """A kernel that assumed contiguous logits read the padding of a wider gate."""
    checks.check_12_strides(case, route)
