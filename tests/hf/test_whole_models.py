"""Whole models: transformers' own code, and the same model with our experts and routing.

Oracle: transformers 5.23.0, which nobody here wrote.
"""

from __future__ import annotations

import pytest
import torch

from tests.hf._cases import CASES, Case
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

NO_KERNEL = (BiasedSigmoid, GroupedSoftmax, ScaledSoftmax, SqrtSoftplus)
"""The strategies that no fused kernel knows: they are always routed before the call."""

FORMS = [
    (case, form)
    for case in CASES
    for form in RoutingForm
    if form is RoutingForm.PRECOMPUTED or not isinstance(case.routing, NO_KERNEL)
]


@pytest.mark.parametrize(("case", "form"), FORMS, ids=str)
def test_same_logits(case: Case, form: RoutingForm) -> None:
    model, tokens = model_of(case), prompt_of()
    expected = model.logits(tokens)
    assert 0.3 < expected.std() < 10.0, "of order 1"
    with swapped(model, form=form) as blocks:
        assert len(blocks) == 2
        assert all(one.experts.routing == case.routing for one in blocks)
        assert all(one.experts.plan.form is form for one in blocks)
        got = model.logits(tokens)
    print('DIFF', case, form.value, float(expected.std()), float((got - expected).abs().max()))
    assert (got - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if isinstance(c.routing, NO_KERNEL)], ids=str)
def test_no_kernel_is_told_what_none_knows(case: Case) -> None:
    with (
        pytest.raises(UnsupportedRouting, match=case.routing.name),
        swapped(model_of(case), form=RoutingForm.IN_KERNEL),
    ):
        pass


@pytest.mark.parametrize("case", CASES, ids=str)
def test_same_greedy_tokens(case: Case) -> None:
    model, prompt = model_of(case), prompt_of()
    expected = model.greedy(prompt)
    with swapped(model):
        got = model.greedy(prompt)
    print('TOK', case, expected.unique().numel())
    assert torch.equal(got, expected)


@pytest.mark.parametrize(
    ("case", "drop"), [(c, d) for c in CASES for d in c.drops], ids=str
)
def test_bites(case, drop) -> None:
    model, tokens = model_of(case), prompt_of()
    expected = model.logits(tokens)
    with swapped(model, routing=drop.routing, zero_bias=drop.routing is None):
        got = model.logits(tokens)
    print('BITE', case, drop.what, float((got - expected).abs().max()))
    assert (got - expected).abs().max() > 1e-2
