"""Adverse logits and biases, by the number of the acceptance test that they are from.

Each is a function of (case, T) to logits (T, E) float32 and a bias (E,) or None, on the CPU and
from the generator's state, so that one seed gives one table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from tests.acceptance.cases import Case, uniform

Inputs = tuple[Tensor, Tensor | None]
Draw = Callable[[Case, int], Inputs]


def normal(case: Case, tokens: int) -> Inputs:
    """As a gate gives them."""
    return 2.0 * torch.randn(tokens, case.num_experts), case.bias()


def all_negative(case: Case, tokens: int) -> Inputs:
    """-5 to -0.1 for every expert."""
    return uniform(-5.0, -0.1, tokens, case.num_experts), case.bias()


def few_positive(case: Case, tokens: int) -> Inputs:
    """Exactly p positive logits in a row, p = 0 to k in turn."""
    logits = uniform(-5.0, -0.1, tokens, case.num_experts)
    positive = torch.arange(tokens).remainder(case.top_k + 1).unsqueeze(1)
    places = torch.rand_like(logits).argsort(dim=1).argsort(dim=1)
    chosen = places < positive
    return torch.where(chosen, uniform(0.1, 5.0, *logits.shape), logits), case.bias(-0.01, 0.01)


def shifted(case: Case, tokens: int) -> Inputs:
    """A gate's logits moved by -1000, -100, 0 and +100, row by row."""
    moves = torch.tensor([-1000.0, -100.0, 0.0, 100.0])
    logits = (torch.randn(tokens, case.num_experts) * 128).round() / 64
    return logits + moves[torch.arange(tokens) % 4].unsqueeze(1), case.bias()


def all_equal(case: Case, tokens: int) -> Inputs:
    """One logit for all experts of a row: the first k win."""
    rows = torch.linspace(-6.0, 6.0, tokens).unsqueeze(1)
    bias = torch.full((case.num_experts,), 0.25) if case.biased else None
    return rows.expand(-1, case.num_experts).contiguous(), bias


def tie_at_border(case: Case, tokens: int) -> Inputs:
    """The k-th and (k+1)-th logit are equal, on the two sides of a group's border."""
    experts, top_k = case.num_experts, case.top_k
    values = torch.linspace(4.0, -4.0, experts)
    border = experts // max(case.rule.num_expert_group, 2)
    tied = [border - 1, border] if top_k < experts else []
    columns = torch.tensor([column for column in range(experts) if column not in tied])
    ranks = torch.tensor([r for r in range(experts) if not tied or r not in (top_k - 1, top_k)])
    places = columns[torch.rand(tokens, len(columns)).argsort(dim=1)]
    logits = torch.full((tokens, experts), float(values[top_k - 1]))
    logits.scatter_(1, places, values[ranks].expand(tokens, -1))
    return logits, torch.zeros(experts) if case.biased else None


def saturated(case: Case, tokens: int) -> Inputs:
    """Distinct logits in 18 to 90, where float32's sigmoid is 1."""
    values = torch.linspace(18.0, 90.0, case.num_experts).expand(tokens, -1)
    order = torch.rand(tokens, case.num_experts).argsort(dim=1)
    return values.gather(1, order), torch.zeros(case.num_experts) if case.biased else None


def high_ids(case: Case, tokens: int) -> Inputs:
    """All winners among the last experts: from 256 on, or the last quarter."""
    experts = case.num_experts
    first = 256 if experts - 256 >= case.top_k else experts - max(case.top_k, experts // 4)
    logits = uniform(-4.0, -2.0, tokens, experts)
    places = torch.rand(tokens, experts - first).argsort(dim=1)[:, : case.top_k] + first
    best = torch.linspace(1.0, 3.0, case.top_k).expand(tokens, -1)
    return logits.scatter(1, places, best), torch.zeros(experts) if case.biased else None


def negative_bias(case: Case, tokens: int) -> Inputs:
    """Every bias is negative."""
    return torch.randn(tokens, case.num_experts), case.bias(-3.0, -0.1)


def negative_scores(case: Case, tokens: int) -> Inputs:
    """Every biased score is negative."""
    return torch.randn(tokens, case.num_experts), case.bias(-3.0, -1.1)


def narrow_bias(case: Case, tokens: int) -> Inputs:
    """Distinct biases in 6.817 to 7.063, of which bfloat16 keeps eight."""
    bias = torch.linspace(6.817, 7.063, case.num_experts)[torch.randperm(case.num_experts)]
    return uniform(-5.0, -4.0, tokens, case.num_experts), bias


def large_bias(case: Case, tokens: int) -> Inputs:
    """Biases about 12 over sigmoids about 1e-8."""
    bias = torch.linspace(11.5, 12.5, case.num_experts)[torch.randperm(case.num_experts)]
    return uniform(-18.5, -17.5, tokens, case.num_experts), bias


def underflow(case: Case, tokens: int) -> Inputs:
    """Every score is nothing, or next to nothing."""
    rows = torch.tensor([-200.0, -60.0])[torch.arange(tokens) % 2].unsqueeze(1)
    bias = torch.zeros(case.num_experts) if case.biased else None
    return rows.expand(-1, case.num_experts).contiguous(), bias


EVERY: Mapping[str, Draw] = MappingProxyType(
    {
        "normal": normal,
        "01": all_negative,
        "02": few_positive,
        "03": shifted,
        "04": all_equal,
        "05": tie_at_border,
        "06": saturated,
        "09": high_ids,
        "16": underflow,
    }
)
"""For every method."""

BIASED: Mapping[str, Draw] = MappingProxyType(
    {"13a": negative_bias, "13b": negative_scores, "14": narrow_bias, "15": large_bias}
)
"""For the methods with a correction bias."""


def tied(case: Case, name: str) -> bool:
    """Whether scores are either far apart or exactly equal, where the lower id wins.

    With several groups 05 has sums of two scores that are nearly equal.
    """
    return name in ("04", "16") or (name == "05" and case.rule.num_expert_group == 1)


def draws(case: Case) -> Mapping[str, Draw]:
    """The inputs that a case is run on, by number."""
    return {**EVERY, **BIASED} if case.biased else EVERY
