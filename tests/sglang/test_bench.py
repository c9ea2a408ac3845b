"""What `bench_h100` checks and times, on a CPU and small: the same layers, all but SGLang's FP8."""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.sglang import bench_h100
from tests.sglang.bench_h100 import BOUNDS, FORMATS, WAYS, Format, Shape

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("typed_moe")]

SMALL = Shape(num_experts=16, top_k=4, hidden_size=256, intermediate_size=128)


@pytest.mark.parametrize("quant", FORMATS)
def test_every_way_is_within_the_bound(quant: Format) -> None:
    weights = bench_h100.stored(SMALL, quant, 0, "cpu")
    built = bench_h100.blocks(weights, 0, "cpu")
    # Off CUDA SGLang's FP8 layers have no kernel, and its bfloat16 ones are plain PyTorch.
    ways = [way for way in WAYS if way != "sglang" or quant == "bf16"]
    for tokens in (1, 33):
        row = bench_h100.errors(weights, {way: built[way] for way in ways}, tokens, "cpu")
        assert row["decided_rows"] == tokens
        assert all(0.0 < float(row[f"{way}: error"]) < BOUNDS[quant] for way in ways), row


def test_another_rule_is_out_of_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: against weights that are not renormalised."""
    weights = bench_h100.stored(SMALL, "bf16", 0, "cpu")
    built = bench_h100.blocks(weights, 0, "cpu")
    monkeypatch.setattr(bench_h100, "RULE", oracle.RULES["Default"])
    row = bench_h100.errors(weights, built, 33, "cpu")
    assert all(float(row[f"{way}: error"]) > BOUNDS["bf16"] for way in WAYS)


def test_a_bias_is_counted() -> None:
    """Off CUDA SGLang adds it (`test_findings.py` has the other side)."""
    row = bench_h100.bias_on_this_device("cpu", tokens=64)
    assert row["softmax plus bias"] == 64
    assert int(row["softmax alone"]) < 64
    assert torch.get_default_dtype() is torch.float32
