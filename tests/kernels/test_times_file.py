"""TYPED_MOE_TIMES: a report of `typed-moe bench layer` by which plans choose, and what is wrong with others."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import attrs
import pytest
import torch

from tests.cli.calls import items
from typed_moe.cli._bench_card import Card, Floor
from typed_moe.cli._bench_layer import Block, Cell
from typed_moe.cli._bench_layer_report import layer_json
from typed_moe.cli._bench_shapes import chosen_shapes
from typed_moe.kernels import _times_file
from typed_moe.kernels._times_file import BUILT_IN, built_in, measured_layers, read_times_file

CPU = torch.device("cpu")
CARD = Card(bytes_per_second=2e12, bf16_flops=5e14, fp8_flops=1e15, fp8_source="told", width=64)
CELL = Cell(
    model="qwen3-30b-a3b",
    format="fp8_block",
    tokens=512,
    side="triton",
    state="timed",
    floor=Floor(memory_us=10.0, compute_us=1.0),
    experts_used=8,
    intermediate_bytes=1,
    graph_us=100.0,
)


def report(*cells: Cell) -> dict[str, object]:
    """As `bench layer --json` writes it, of one model in one format."""
    (shape,) = chosen_shapes(("qwen3-30b-a3b",))
    block = Block(
        shape=shape,
        format="fp8_block",
        layers=3,
        about=(("triton", "FusedMoE, kernel triton"),),
        libraries=(("deep_gemm", "sgl-deep-gemm 0.1.5"),),
        cells=cells,
    )
    made = layer_json(CARD, CPU, [block], "typed-moe bench layer --kernel triton")
    back: dict[str, object] = json.loads(json.dumps(made))
    return back


def cells() -> tuple[Cell, ...]:
    """Two sizes with both kernels, one with ours alone, and a peer that no plan takes."""
    theirs = attrs.evolve(CELL, side="deep_gemm", graph_us=90.0)
    return (
        CELL,
        theirs,
        attrs.evolve(CELL, tokens=4096, graph_us=800.0),
        attrs.evolve(theirs, tokens=4096, graph_us=600.0),
        attrs.evolve(CELL, tokens=1, graph_us=20.0),
        attrs.evolve(theirs, tokens=1, state="wrong", graph_us=None),
        attrs.evolve(CELL, side="torch", graph_us=1.0),
    )


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing read before, no variable."""
    monkeypatch.delenv("TYPED_MOE_TIMES", raising=False)
    _times_file._read.cache_clear()
    yield
    _times_file._read.cache_clear()


@pytest.fixture
def written(tmp_path: Path) -> Callable[[object], Path]:
    """Writes a file."""

    def write(data: object) -> Path:
        path = tmp_path / "times.json"
        path.write_text(json.dumps(data), encoding="utf-8")
        return path

    return write


def test_what_the_bench_writes_is_read(written: Callable[[object], Path]) -> None:
    """Sizes of the layer, times by T and kernel where both are right, and where they are from."""
    made = report(*cells())
    (layer,) = read_times_file(written(made))
    assert (layer.num_experts, layer.top_k) == (128, 8)
    assert (layer.hidden_size, layer.intermediate_size) == (2048, 768)
    assert (layer.format, layer.model) == ("fp8_block", "qwen3-30b-a3b")
    # Wrong at T = 1: never there, and nowhere below.
    assert layer.microseconds == {
        1: {"triton": 20.0, "deep_gemm": math.inf},
        512: {"triton": 100.0, "deep_gemm": 90.0},
        4096: {"triton": 800.0, "deep_gemm": 600.0},
    }
    assert layer.source == f"sgl-deep-gemm 0.1.5, {made['date']}"


def test_the_variable_names_it(
    written: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the built-in times; and only on the card that it was measured on."""
    assert measured_layers("any card") == built_in()
    path = written(report(*cells()))
    monkeypatch.setenv("TYPED_MOE_TIMES", str(path))
    (layer,) = read_times_file(path)
    assert measured_layers(layer.card) == (layer, *built_in())
    with pytest.raises(ValueError, match=rf"was measured on {layer.card}, and this card is other"):
        measured_layers("other")


def without(name: str) -> dict[str, object]:
    """A report that lacks something."""
    made = report(*cells())
    del made[name]
    return made


def bent(place: str, name: str, value: object) -> dict[str, object]:
    """A report with another value in the first of its blocks or rows."""
    made = report(*cells())
    items(made, place)[0][name] = value
    return made


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "the file is a JSON list; allowed: an object"),
        ({}, "the file lacks 'machine'"),
        (without("date"), "the file lacks 'date'"),
        ({**report(*cells()), "rows": {}}, "rows is a JSON dict; allowed: a list"),
        (
            bent("blocks", "top_k", 0),
            "a block's top_k is 0; allowed: a whole number from 1 on",
        ),
        (
            bent("rows", "graph_us", -1.0),
            "graph_us is -1.0; allowed: microseconds above 0, or null",
        ),
        (
            bent("rows", "graph_us", True),
            "graph_us is True; allowed: microseconds above 0, or null",
        ),
        (report(CELL), "has no time of triton beside one of deep_gemm; they are timed by"),
    ],
    ids=["list", "empty", "undated", "rows", "top_k", "negative", "bool", "one kernel alone"],
)
def test_what_is_wrong_is_said(data: object, said: str, written: Callable[[object], Path]) -> None:
    """A sentence with the variable, the file and what is allowed."""
    path = written(data)
    with pytest.raises(ValueError, match="TYPED_MOE_TIMES=") as raised:
        read_times_file(path)
    assert said in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Nor is a misspelt name taken for no file."""
    with pytest.raises(ValueError, match=r"gone\.json cannot be read as JSON"):
        read_times_file(tmp_path / "gone.json")


def test_the_shipped_reports_are_read(
    written: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them, and no layer of one card, format and widths twice: the first one would hide the other."""
    found = [
        (layer.card, layer.format, layer.hidden_size, layer.intermediate_size)
        for file in BUILT_IN.glob("*.json")
        for layer in read_times_file(file)
    ]
    assert len(found) == len(set(found)) == len(built_in())
    # The folder is what is read: another one's report is another choice.
    monkeypatch.setattr(_times_file, "BUILT_IN", written(report(*cells())).parent)
    built_in.cache_clear()
    try:
        assert [layer.model for layer in built_in()] == ["qwen3-30b-a3b"]
    finally:
        built_in.cache_clear()


def test_what_is_wrong_with_a_shipped_report_is_not_the_variables(
    written: Callable[[object], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sentence names the package's own file, which no variable has named."""
    path = written({})
    monkeypatch.setattr(_times_file, "BUILT_IN", path.parent)
    built_in.cache_clear()
    try:
        with pytest.raises(ValueError, match="lacks 'machine'") as raised:
            measured_layers("any card")
        assert f"typed_moe's own {path}" in str(raised.value)
        assert "TYPED_MOE_TIMES" not in str(raised.value)
    finally:
        built_in.cache_clear()
