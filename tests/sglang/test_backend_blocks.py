"""`--moe-runner-backend typed_moe`: MoE blocks of SGLang's own models are what they mean, once scaled."""

from __future__ import annotations

import importlib

import pytest
import torch

from tests.sglang import stand_ins
from tests.sglang.blocks import CASES, HIDDEN, SCALED, BlockCase, BuiltBlock
from typed_moe.routing import ScaleOwner
from typed_moe.sglang import Plugin

pytestmark = pytest.mark.sglang

TOKENS = 13


@pytest.fixture(autouse=True)
def _backend(typed_moe: Plugin) -> None:
    stand_ins.install_qwen2_gate()


def check(built: BuiltBlock) -> None:
    x = torch.randn(TOKENS, HIDDEN)
    expected = built.expected(x)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(built(x).double(), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("case", [*CASES, *SCALED], ids=lambda case: case.id)
def test_a_block_is_what_it_means(case: BlockCase) -> None:
    torch.manual_seed(7)
    check(case.build())


@pytest.mark.parametrize("on_cuda", [False, True], ids=["off_cuda", "on_cuda"])
@pytest.mark.parametrize("case", SCALED, ids=lambda case: case.id)
def test_acceptance_22_one_owner_of_the_scale(
    case: BlockCase, on_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On CUDA SGLang's blocks leave the factor to the layer, elsewhere they multiply by themselves."""
    module = importlib.import_module(f"sglang.srt.models.{case.module}")
    monkeypatch.setattr(module, "_is_cuda", on_cuda)
    torch.manual_seed(7)
    built = case.build()
    assert built.experts.should_fuse_routed_scaling_factor_in_topk is on_cuda
    (owned,) = built.experts.quant_method.experts.owners
    assert owned.scale.factor == case.factor
    assert (owned.scale.owner is ScaleOwner.HOST) is not on_cuda
    check(built)
