"""`typed-moe bench`, `tune` and `verify` on a CUDA device: the clocks, and a short run of each."""

from __future__ import annotations

import json
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from tests.cli.calls import items, part
from typed_moe.cli import main
from typed_moe.cli._bench_card import measure_card
from typed_moe.cli._bench_clock import CudaClocks, cuda_clocks, poisoned
from typed_moe.cli._bench_shapes import layer_shapes
from typed_moe.cli._progress import Steps
from typed_moe.cli._tune import Tuner
from typed_moe.cli._tune_grid import Grid, limits_of
from typed_moe.config import Bf16

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

MIB = 1 << 20


@pytest.fixture
def clocks() -> CudaClocks:
    return cuda_clocks("this test")


def _inverted(source: Tensor, target: Tensor) -> object:
    """A kernel, not a copy: the driver copies exactly 512 MiB at four fifths of its other sizes' rate."""
    return torch.bitwise_not(source, out=target)


def test_a_graph_times_each_call_and_not_the_graph(clocks: CudaClocks) -> None:
    """Twice the bytes take about twice the time, however many calls a graph has."""
    source = torch.zeros(512 * MIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    half = 256 * MIB
    few = clocks.graph([lambda: _inverted(source, target)] * 2)
    many = clocks.graph([lambda: _inverted(source, target)] * 8)
    small = clocks.graph([lambda: _inverted(source[:half], target[:half])] * 4)
    assert many == pytest.approx(few, rel=0.15)
    assert few / small == pytest.approx(2, rel=0.2)
    # Between 100 GB/s and 20 TB/s, read and written.
    assert 2 * 512 * MIB / 20e12 * 1e6 < few < 2 * 512 * MIB / 100e9 * 1e6


def test_memory_is_what_a_call_allocates(clocks: CudaClocks) -> None:
    def call() -> Tensor:
        gone = torch.empty(8 * MIB, dtype=torch.uint8, device="cuda")
        del gone
        return torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")

    assert clocks.peak_bytes(call) == 8 * MIB


def test_the_launches_are_a_calls_kernels(clocks: CudaClocks) -> None:
    x = torch.randn(4096, 4096, device="cuda")
    found = clocks.launches([lambda: torch.sigmoid(x), lambda: torch.sigmoid(x)])
    assert len(found) == 1
    assert found[0].count == 1
    assert 0 < found[0].us <= clocks.eager([lambda: torch.sigmoid(x)] * 8) * 1.5


def test_memory_is_poisoned() -> None:
    with poisoned():
        assert bool(torch.empty(64, device="cuda").isnan().all())
        assert bool(torch.empty(64, device="cuda", dtype=torch.bfloat16).isnan().all())


def test_a_cards_rates(clocks: CudaClocks) -> None:
    card = measure_card(clocks)
    assert 1e11 < card.bytes_per_second < 2e13
    assert 1e13 < card.bf16_flops < 1e16
    assert card.bf16_flops < card.fp8_flops < 4 * card.bf16_flops


def test_a_layer_is_right_and_above_its_floor(tmp_path: Path) -> None:
    """The whole command; a tenth of room, for a floor that is a measurement itself."""
    report, picture = tmp_path / "layers.json", tmp_path / "layers.svg"
    argv = ["bench", "layer", "--model", "qwen3-30b-a3b", "--tokens", "8", "--tokens", "512"]
    argv += ["--peer", "torch", "--launches", "--json", str(report), "--picture", str(picture)]
    assert main(argv) == 0
    rows = items(json.loads(report.read_text()), "rows")
    mine = [row for row in rows if row["side"] == "typed-moe"]
    assert [row["state"] for row in mine] == ["timed"] * 4
    for row in mine:
        share = row["share_of_floor"]
        assert isinstance(share, float)
        assert 0.02 < share < 1.1
        assert items(row, "launches")
    assert "<polyline" in picture.read_text()


def test_routing_is_right_and_timed(tmp_path: Path) -> None:
    report = tmp_path / "routing.json"
    argv = ["bench", "routing", "--model", "deepseek-v3", "--model", "llama4-scout"]
    assert main([*argv, "--tokens", "1", "--tokens", "64", "--json", str(report)]) == 0
    for row in items(json.loads(report.read_text()), "rows"):
        assert row["reasons"] == {}
        us = part(row, "us")
        assert all(isinstance(time, float) and time > 0 for time in us.values())


def test_tiles_are_found_beside_the_built_in_one(clocks: CudaClocks) -> None:
    """No tile is wrong, and the best is not slower than the built-in one."""
    shape = attrs.evolve(layer_shapes()[0], hidden_size=1024, num_experts=16)
    grid = Grid(block_n=(32, 64), block_k=(64, 128), warps=(4,), stages=(3, 4), tma=(False,))
    tuner = Tuner(
        clocks=clocks,
        card=torch.cuda.get_device_name(),
        limits=limits_of(clocks.device),
        grid=grid,
    )
    (point,) = tuner.points(shape, Bf16(), (8,), Steps())
    assert point.us <= point.built_in_us
    assert point.tried > 3
    assert point.wrong == 0


def test_verify_runs_the_triton_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cuda", "--kernel", "triton", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    formats = {row["format"] for row in items(data, "rows") if row["verdict"] == "pass"}
    assert {"bf16", "fp8_block"} <= formats
