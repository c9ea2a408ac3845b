"""The acceptance list's routing tests as functions of (case, route).

The tests run them over every strategy and every way of routing; `test_mutants.py` runs the same
functions over twelve faulty implementations. Each raises AssertionError and names its number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import Case, loosened, sized, uniform
from tests.acceptance.routes import Chosen, Route

Check = Callable[[Case, Route], None]
_GRID = 64.0  # logits on a grid of 1/64 stay exact when moved by +-1000


def check_selection(
    case: Case, route: Route, logits: Tensor, bias: Tensor | None, *, least_decided: float = 0.5
) -> Chosen:
    """The route's experts and weights are the oracle's.

    On decided rows the same experts; on every row valid and distinct ids, with the weights that
    the rule gives these ids.
    """
    expected = oracle.route(case.rule, logits, bias, case.top_k)
    chosen = route(case, logits, bias)
    atol, rtol = 1e-6 * max(1.0, case.rule.scale), 2e-6
    assert chosen.dense.isfinite().all()
    if chosen.ids is not None:
        check_ids(chosen.ids, case)
        weights = oracle.weights_of(case.rule, logits, chosen.ids)
        own = oracle.dense(chosen.ids, weights, case.num_experts)
        torch.testing.assert_close(chosen.dense, own, atol=atol, rtol=rtol)
        same = (chosen.ids.sort(1).values == expected.ids.sort(1).values).all(1)
        assert bool(same[expected.decided].all()), "a decided row has other experts"
    whole = oracle.dense(expected.ids, expected.weights, case.num_experts)
    rows = expected.decided
    torch.testing.assert_close(chosen.dense[rows], whole[rows], atol=atol, rtol=rtol)
    assert len(rows) == 0 or float(rows.double().mean()) >= least_decided, (
        "the inputs decide little"
    )
    return chosen


def check_ids(ids: Tensor, case: Case) -> None:
    """Ids are of experts that exist, and distinct within a row."""
    assert ids.shape[1] == case.top_k
    assert bool(((ids >= 0) & (ids < case.num_experts)).all())
    ordered = ids.sort(1).values
    assert bool((ordered[:, 1:] > ordered[:, :-1]).all())


def distinct_logits(case: Case, tokens: int, low: float, high: float) -> Tensor:
    """(T, E) rows whose values are evenly spaced and shuffled: no near ties."""
    values = torch.linspace(low, high, case.num_experts)
    return torch.stack([values[torch.randperm(case.num_experts)] for _ in range(tokens)])


def normal_logits(case: Case, tokens: int) -> Tensor:
    """(T, E) as a gate gives them, on a grid of 1/64."""
    return (torch.randn(tokens, case.num_experts) * 2 * _GRID).round() / _GRID


def check_01_all_negative(case: Case, route: Route) -> None:
    """Logits of -5 to -0.1 for every expert."""
    logits = uniform(-5.0, -0.1, 32, case.num_experts)
    check_selection(case, route, logits, case.bias())


def check_02_few_positive(case: Case, route: Route) -> None:
    """Exactly p positive logits, p = 0 to k."""
    rows = []
    for positive in range(case.top_k + 1):
        row = uniform(-5.0, -0.1, case.num_experts)
        row[torch.randperm(case.num_experts)[:positive]] = uniform(0.1, 5.0, positive)
        rows.append(row)
    check_selection(case, route, torch.stack(rows), case.bias(-0.01, 0.01), least_decided=0.4)


def check_03_shifted(case: Case, route: Route) -> None:
    """Logits moved by -1000, -100 and +100: softmax does not notice, the others stay finite."""
    logits = normal_logits(case, 16)
    bias = case.bias()
    still = route(case, logits, bias)
    for shift in (-1000.0, -100.0, 0.0, 100.0):
        moved = route(case, logits + shift, bias)
        assert moved.dense.isfinite().all()
        if moved.ids is not None:
            check_ids(moved.ids, case)
        if case.rule.weigh == "softmax":
            torch.testing.assert_close(moved.dense, still.dense, atol=1e-6, rtol=1e-6)


def check_04_all_equal(case: Case, route: Route) -> None:
    """All logits equal: experts 0 to k - 1 with one weight."""
    for value in (0.0, -3.0, 2.5):
        check_equal_row(case, route, torch.full((4, case.num_experts), value))


def check_equal_row(case: Case, route: Route, logits: Tensor) -> None:
    """The first k experts win, and the biases, if any, are equal too."""
    bias = torch.full((case.num_experts,), 0.25) if case.biased else None
    chosen = route(case, logits, bias)
    first = torch.arange(case.top_k)
    if chosen.ids is not None:
        assert torch.equal(chosen.ids.sort(1).values, first.expand(logits.shape[0], -1))
    weights = oracle.weights_of(case.rule, logits, first.expand(logits.shape[0], -1))
    expected = oracle.dense(first.expand(logits.shape[0], -1), weights, case.num_experts)
    torch.testing.assert_close(chosen.dense, expected, atol=1e-6, rtol=2e-6)
    if case.rule.divide:
        each = torch.full_like(weights, case.rule.scale / case.top_k)
        torch.testing.assert_close(chosen.dense[:, : case.top_k], each, atol=1e-6, rtol=2e-6)


def check_05_tie_at_group_border(case: Case, route: Route) -> None:
    """The k-th and (k+1)-th are equal, on the two sides of a group border: the lower id wins."""
    size = case.num_experts // max(case.rule.num_expert_group, 4)
    logits = torch.full((1, case.num_experts), -6.0)
    before = torch.arange(case.top_k - 1) if case.top_k <= size else torch.arange(size)
    logits[0, before] = torch.linspace(3.0, 2.0, len(before))
    if case.rule.num_expert_group > 1:
        # Every kept group has two good experts, so that the border's two groups are both kept.
        for group in range(case.rule.topk_group):
            logits[0, group * size : group * size + 2] = 4.0
        before = (logits[0] > -6.0).nonzero().flatten()
    free = case.top_k - len(before)
    if free < 0:
        logits[0, before] = -6.0
        before, free = before[:0], case.top_k
    winners = [size - 1 - step for step in range(free)]
    logits[0, winners] = 1.0
    logits[0, size] = 1.0 if size not in before else logits[0, size]
    logits[0, size + 2] = 1.0
    bias = torch.zeros(case.num_experts) if case.biased else None
    chosen = route(case, logits, bias)
    expected = sorted([*before.tolist(), *winners])[: case.top_k]
    assert chosen.dense.isfinite().all()
    if chosen.ids is not None:
        assert chosen.ids.sort(1).values.tolist() == [expected]
    got = (chosen.dense[0] != 0).nonzero().flatten().tolist()
    assert got == expected


def check_06_saturated(sigmoid: Case, topk_sigmoid: Case, route: Route) -> None:
    """Distinct logits of 18 to 90: sigmoids tie at 1, logits do not."""
    logits = torch.linspace(18.0, 90.0, 256)[torch.randperm(256)].unsqueeze(0)
    for case in (sigmoid, topk_sigmoid):
        expected = oracle.route(case.rule, logits, None, case.top_k)
        chosen = route(case, logits, None)
        assert chosen.ids is not None
        assert torch.equal(chosen.ids.sort(1).values, expected.ids.sort(1).values)
        whole = oracle.dense(expected.ids, expected.weights, 256)
        torch.testing.assert_close(chosen.dense, whole, atol=1e-6, rtol=0)
    first, second = route(sigmoid, logits, None).ids, route(topk_sigmoid, logits, None).ids
    assert first is not None
    assert second is not None
    assert first.sort(1).values.tolist() == [list(range(8))]
    assert not torch.equal(first.sort(1).values, second.sort(1).values)


def check_07_08_both_ends(case: Case, route: Route, low: float, high: float) -> None:
    """sqrt(softplus) where float32's softplus underflows, and where its exponential overflows."""
    for row in range(8):
        width = 0.5 if high - low > 2 else 0.01
        start = low + (high - low - width) * row / 7
        logits = torch.linspace(start, start + width, 256)[torch.randperm(256)].unsqueeze(0)
        chosen = route(case, logits, torch.zeros(256))
        expected = logits[0].argsort(descending=True)[:6]
        assert chosen.ids is not None
        if width == 0.5:
            assert set(chosen.ids[0].tolist()) == set(expected.tolist())
        softplus = torch.nn.functional.softplus(logits.double(), threshold=1e4)
        scores = softplus.sqrt()[0][chosen.ids[0]]
        weights = 1.5 * scores / (scores.sum() + 1e-20)
        got = chosen.dense[0][chosen.ids[0]]
        torch.testing.assert_close(got, weights, atol=0, rtol=1e-5)
        if low > -80:
            torch.testing.assert_close(got.sum(), torch.tensor(1.5).double(), atol=0, rtol=1e-5)


def check_09_high_ids(case: Case, route: Route) -> None:
    """The winners are all among the experts from 256 on."""
    case = sized(case, 512, min(10, case.top_k + 2) if case.top_k > 1 else 1)
    logits = uniform(-4.0, -2.0, 16, 512)
    for row in logits:
        row[256 + torch.randperm(256)[: case.top_k]] = torch.linspace(1.0, 3.0, case.top_k)
    bias = torch.zeros(512) if case.biased else None
    chosen = check_selection(case, route, logits, bias)
    if case.rule.num_expert_group == 1:
        assert bool((chosen.dense[:, :256] == 0).all())


def check_10_broken_rows(case: Case, route: Route) -> None:
    """NaN and -inf rows get weight 0, and the rows beside them what they get alone."""
    logits = normal_logits(case, 7)
    bias = case.bias()
    alone = route(case, logits, bias)
    logits = logits.clone()
    logits[1] = math.nan
    logits[3] = -math.inf
    logits[5, case.num_experts // 2] = math.nan
    among = route(case, logits, bias)
    good, bad = [0, 2, 4, 6], [1, 3, 5]
    assert bool((among.dense[bad] == 0).all())
    assert torch.equal(among.dense[good], alone.dense[good])
    if among.ids is not None and alone.ids is not None:
        check_ids(among.ids, case)
        assert torch.equal(among.ids[good], alone.ids[good])


def check_11_dtypes(case: Case, route: Route) -> None:
    """float32 and bfloat16 logits of the same values give the same experts and weights."""
    case = loosened(case)
    logits = distinct_logits(case, 8, -3.0, 3.0).bfloat16()
    bias = case.bias(-0.01, 0.01)
    wide, narrow = route(case, logits.float(), bias), route(case, logits, bias)
    torch.testing.assert_close(wide.dense, narrow.dense, atol=1e-7, rtol=0.0)
    if wide.ids is not None and narrow.ids is not None:
        assert torch.equal(wide.ids, narrow.ids)


def check_12_strides(case: Case, route: Route) -> None:
    """A view with a longer row stride gives what its contiguous copy gives."""
    for experts, stride in ((60, 64), (64, 72)):
        if experts % case.rule.num_expert_group:
            continue
        small = sized(case, experts, min(case.top_k, 4))
        wide = torch.full((9, stride), 50.0)
        wide[:, :experts] = normal_logits(small, 9)
        view = wide[:, :experts]
        bias = small.bias()
        strided, contiguous = route(small, view, bias), route(small, view.contiguous(), bias)
        assert not view.is_contiguous()
        torch.testing.assert_close(strided.dense, contiguous.dense, atol=1e-6, rtol=1e-6)
        check_selection(small, route, view, bias)


def check_13_negative_bias(case: Case, route: Route) -> None:
    """Every bias is negative: some biased scores are below 0, then all of them are."""
    for high in (-0.1, -1.1):
        bias = uniform(-3.0, high, case.num_experts)
        check_selection(case, route, torch.randn(32, case.num_experts), bias)


def check_14_narrow_bias(case: Case, route: Route) -> None:
    """Distinct biases in 6.817 to 7.063, of which bfloat16 keeps eight (sglang#37133)."""
    bias = torch.linspace(6.817, 7.063, case.num_experts)[torch.randperm(case.num_experts)]
    check_selection(case, route, uniform(-5.0, -4.0, 32, case.num_experts), bias)


def check_15_large_bias(case: Case, route: Route) -> None:
    """Bias about 12, sigmoids about 1e-8: the weights are not biased score minus bias."""
    bias = torch.linspace(11.5, 12.5, case.num_experts)[torch.randperm(case.num_experts)]
    logits = uniform(-18.5, -17.5, 32, case.num_experts)
    chosen = check_selection(case, route, logits, bias)
    if case.rule.divide:
        sums = chosen.dense.sum(1)
        torch.testing.assert_close(sums, torch.full_like(sums, case.rule.scale), atol=0, rtol=1e-4)


def check_16_underflow(case: Case, route: Route) -> None:
    """Every chosen score is nothing, or next to nothing: 0 / (0 + 1e-20), not NaN."""
    for value in (-200.0, -60.0):
        logits = torch.full((2, case.num_experts), value)
        bias = torch.zeros(case.num_experts) if case.biased else None
        chosen = route(case, logits, bias)
        ids = torch.arange(case.top_k).expand(2, -1)
        expected = oracle.dense(
            ids, oracle.weights_of(case.rule, logits, ids), case.num_experts
        ).sum(1)
        assert chosen.dense.isfinite().all()
        torch.testing.assert_close(chosen.dense.sum(1), expected, atol=1e-9, rtol=1e-4)


def check_17_bias_selects_only(case: Case, route: Route) -> None:
    """A bias that changes the set leaves the weights to the unbiased scores."""
    logits = distinct_logits(case, 8, -2.0, 2.0)
    bias = uniform(-2.0, 2.0, case.num_experts)
    biased = check_selection(case, route, logits, bias)
    plain = route(case, logits, torch.zeros(case.num_experts))
    assert bool(((biased.dense != 0) != (plain.dense != 0)).any(1).all())


def check_21_scale_once(case: Case, route: Route) -> None:
    """The weights sum to the scale exactly once."""
    chosen = check_selection(case, route, torch.randn(16, case.num_experts), case.bias())
    if case.rule.divide:
        sums = chosen.dense.sum(1)
        torch.testing.assert_close(sums, torch.full_like(sums, case.rule.scale), atol=0, rtol=2e-6)


def check_24_one_expert(case: Case, route: Route) -> None:
    """k = 1 gives the rule's weight: scale if divided, the score if not."""
    one = sized(case, case.num_experts, 1)
    logits = distinct_logits(one, 16, -3.0, 3.0)
    check_selection(one, route, logits, one.bias(-0.001, 0.001))


def check_30_group_rule(case: Case, route: Route) -> None:
    """The best expert is in the worst group by top-2 sum: which group is kept is the rule's."""
    rule = case.rule
    size = case.num_experts // rule.num_expert_group
    logits = torch.full((1, case.num_experts), -4.0)
    for group in range(rule.num_expert_group):
        logits[0, group * size] = 1.0 + 0.01 * group
        logits[0, group * size + 1] = 0.9 + 0.01 * group
        rest = torch.linspace(-1.0, -2.0, size - 2) + 0.001 * group
        logits[0, group * size + 2 : (group + 1) * size] = rest
    last = (rule.num_expert_group - 1) * size
    logits[0, last : last + size] = -4.0
    logits[0, last] = 1.5
    bias = torch.zeros(case.num_experts) if case.biased else None
    chosen = check_selection(case, route, logits, bias)
    kept = bool(chosen.dense[0, last] != 0)
    assert kept == (rule.group_score == "max")


def check_52_identical_rows(case: Case, route: Route) -> None:
    """Equal rows of one batch give equal results."""
    row = normal_logits(case, 1)
    chosen = route(case, row.expand(6, -1).contiguous(), case.bias())
    assert bool((chosen.dense == chosen.dense[:1]).all())


ALL: Mapping[str, Check] = MappingProxyType(
    {
        "01": check_01_all_negative,
        "02": check_02_few_positive,
        "03": check_03_shifted,
        "04": check_04_all_equal,
        "05": check_05_tie_at_group_border,
        "09": check_09_high_ids,
        "10": check_10_broken_rows,
        "11": check_11_dtypes,
        "12": check_12_strides,
        "21": check_21_scale_once,
        "24": check_24_one_expert,
        "52": check_52_identical_rows,
    }
)
"""Checks for every strategy."""

BIASED: Mapping[str, Check] = MappingProxyType(
    {
        "13": check_13_negative_bias,
        "14": check_14_narrow_bias,
        "15": check_15_large_bias,
        "16": check_16_underflow,
        "17": check_17_bias_selects_only,
    }
)
"""Checks for the strategies with a correction bias; 16 also for `SigmoidRenorm`."""

GROUPED: Mapping[str, Check] = MappingProxyType({"30": check_30_group_rule})
"""Checks for the strategies with groups."""


def checks_for(case: Case) -> Mapping[str, Check]:
    """The checks that a case has to pass, by number."""
    chosen = dict(ALL)
    if case.biased:
        chosen |= BIASED
    elif case.id == "SigmoidRenorm":
        chosen["16"] = check_16_underflow
    if case.rule.num_expert_group > 1:
        chosen |= GROUPED
    if case.id == "Llama4":
        chosen.pop("05")
    return chosen
