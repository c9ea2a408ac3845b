"""Rows of a batch on a CUDA device: equal ones, and none at all. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.test_triton_experts import EXPERTS, FORMATS, FORMS, HIDDEN, layer_on_card, pytestmark
from typed_moe import Format, RoutingForm

__all__ = ["pytestmark"]


@FORMATS
@FORMS
@pytest.mark.parametrize("tokens", [2, 8, 300])
def test_acceptance_52_identical_rows(quant: Format, form: RoutingForm, tokens: int) -> None:
    """A row that a batch has twice, anywhere among others, comes out with the same bits twice."""
    layer = layer_on_card(quant, form)
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    twice = torch.randperm(tokens)
    first, second = twice[: tokens // 2].cuda(), twice[tokens // 2 : tokens // 2 * 2].cuda()
    x[second], logits[second] = x[first], logits[first]
    out = layer(x, logits)
    assert bool(out.isfinite().all())
    assert torch.equal(out[first], out[second])


@FORMATS
@FORMS
def test_acceptance_42_no_tokens(quant: Format, form: RoutingForm) -> None:
    """An empty batch is an empty result, before a call with rows and after it."""
    layer = layer_on_card(quant, form)
    for tokens in (0, 5, 0):
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        out = layer(x, torch.randn(tokens, EXPERTS, device="cuda"))
        assert out.shape == (tokens, HIDDEN)
        assert out.dtype is torch.bfloat16
