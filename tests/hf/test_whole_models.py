"""Whole models: transformers' own code, and the same model with our experts and routing.

Oracle: transformers 5.23.0, which nobody here wrote.
"""

from __future__ import annotations

import pytest
import torch

from tests.hf._cases import CASES, Case, Drop
from tests.hf._models import model_of, prompt_of
from tests.hf._swap import swapped
from typed_moe import (
    BiasedSigmoid,
    GroupedSoftmax,
    RoutingForm,
    ScaledSoftmax,
    SqrtSoftplus,
    UnsupportedRouting,
)

TOLERANCE = 1e-5
"""Largest allowed difference of a logit; the logits are of order 1, computed in float32."""
VISIBLE = 0.1
"""What every ingredient of a rule changes some logit by, at least."""

OURS_ALONE = (BiasedSigmoid, GroupedSoftmax, ScaledSoftmax, SqrtSoftplus)
"""The strategies that no fused kernel knows: they are always routed before the call."""

FORMS = [
    pytest.param(case, form, id=f"{case}-{form.value}")
    for case in CASES
    for form in RoutingForm
    if form is RoutingForm.PRECOMPUTED or not isinstance(case.routing, OURS_ALONE)
]
DROPS = [
    pytest.param(case, drop, id=f"{case}-{drop.what}") for case in CASES for drop in case.drops
]


@pytest.mark.parametrize(("case", "form"), FORMS)
def test_same_logits(case: Case, form: RoutingForm) -> None:
    model, tokens = model_of(case), prompt_of()
    expected = model.logits(tokens)
    assert 0.5 < expected.std() < 2.0, "of order 1"
    with swapped(model, form=form) as blocks:
        assert [one.experts.routing for one in blocks] == [case.routing, case.routing]
        assert {one.experts.plan.form for one in blocks} == {form}
        got = model.logits(tokens)
    assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_32_greedy_tokens(case: Case) -> None:
    model, prompt = model_of(case), prompt_of()
    expected = model.greedy(prompt)
    assert len(set(expected.flatten().tolist())) > 5, "no repetition of one token"
    with swapped(model):
        got = model.greedy(prompt)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("case", "drop"), DROPS)
def test_a_dropped_ingredient_shows(case: Case, drop: Drop) -> None:
    """The comparison bites: without one ingredient of the rule the logits are far off."""
    model, tokens = model_of(case), prompt_of()
    with swapped(model, routing=drop.routing, zero_bias=drop.routing is None):
        got = model.logits(tokens)
    assert (got - model.logits(tokens)).abs().max() > VISIBLE


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.routing, OURS_ALONE)], ids=str)
def test_no_kernel_is_told_what_none_knows(case: Case) -> None:
    with (
        pytest.raises(UnsupportedRouting, match=case.routing.name),
        swapped(model_of(case), form=RoutingForm.IN_KERNEL),
    ):
        pass
