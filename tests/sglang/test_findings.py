"""Faults of SGLang 0.5.23's own routing that docs/sglang.md names, shown without a GPU.

Each fails when a release no longer has it; then the page changes.
"""

from __future__ import annotations

import sys
import types
from unittest import mock

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("sglang_host")]

EXPERTS, TOP_K = 16, 4


def test_a_softmax_routers_bias_is_dropped_on_cuda() -> None:
    """ernie4 and longcat_flash add a bias for the choice; the CUDA gate is given None for it.

    SGLang is told that it is on CUDA, and the Triton gate is one that keeps what it is given.
    """
    import sglang.srt.layers.moe.topk as topk

    given: list[Tensor | None] = []

    def gate(logits: Tensor, bias: Tensor | None, k: int, **_: object) -> tuple[Tensor, Tensor]:
        given.append(bias)
        weights, ids = logits.softmax(-1).topk(k)
        return weights, ids.int()

    module = types.ModuleType("sglang.kernels.ops.moe.moe_fused_gate")
    module.__dict__["moe_fused_gate"] = gate
    bias = torch.randn(EXPERTS) * 3
    x, logits = torch.randn(5, 8), torch.randn(5, EXPERTS)
    router = topk.TopK(TOP_K, layer_id=0, correction_bias=bias)
    router.bind_runner_backend(None)
    with (
        mock.patch.object(topk, "_is_cuda", True),
        mock.patch.dict(sys.modules, {module.__name__: module}),
    ):
        on_cuda = router.forward_cuda(x, logits)
    assert given == [None]
    elsewhere = router.forward_native(x, logits)
    chosen = (logits.softmax(-1) + bias).topk(TOP_K).indices
    assert torch.equal(elsewhere.topk_ids.sort().values, chosen.sort().values)
    assert not torch.equal(on_cuda.topk_ids.sort().values, chosen.sort().values)
