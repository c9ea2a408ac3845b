"""`typed-moe tune`: what is tried, what is chosen, and the file that comes of it.

The search is looked at without Triton: layers whose output and time follow from the tile. At the end
Triton's interpreter runs it on a tiny layer.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Protocol, final

import attrs
import pytest
import torch
from rich.console import Console
from torch import Tensor

from tests.cli.calls import Cli, items
from tests.cli.clocks import ToldClocks
from typed_moe.cli import _bench_weights, _tune, _tune_compile
from typed_moe.cli._bench_clock import Launch
from typed_moe.cli._bench_shapes import LayerShape, layer_shapes
from typed_moe.cli._errors import UserError
from typed_moe.cli._progress import Steps
from typed_moe.cli._tune import Point, Tuner, operand_of, tables_of
from typed_moe.cli._tune_command import tune
from typed_moe.cli._tune_grid import Grid, Limits, fits, heights, limits_of, of_height
from typed_moe.config import FORMATS, Bf16, Format, Fp8BlockScale, MxInt4
from typed_moe.kernels import TritonKernel
from typed_moe.kernels._expert_tiles import (
    ANY_CARD,
    HOPPER,
    HOPPER_NARROW,
    ExpertTile,
    GemmTile,
    Operand,
    table_of,
    tile_of,
    tile_refusal,
)
from typed_moe.kernels._tile_file import read_tile_file

CARD = "NVIDIA H100 80GB HBM3"
SHAPE = attrs.evolve(
    layer_shapes()[0], hidden_size=128, intermediate_size=128, num_experts=8, top_k=2
)
BEST_FIRST = GemmTile(block_n=64, block_k=64, warps=8, stages=5)
BEST_SECOND = GemmTile(block_n=128, block_k=128, warps=4, stages=3)


class Misfit(Exception):
    """What Triton raises of a tile that does not fit."""


class _Holder(Protocol):
    kernel: TritonKernel


def _distance(tile: GemmTile, best: GemmTile) -> float:
    """0 for the best tile, and more for every step away from it."""
    steps: float = abs(tile.block_n.bit_length() - best.block_n.bit_length())
    steps += abs(tile.block_k.bit_length() - best.block_k.bit_length())
    steps += abs(tile.group_m - best.group_m) / 8
    return steps + (tile.warps != best.warps) + abs(tile.stages - best.stages) / 2 + tile.tma


@final
class Card:
    """Layers and a clock that go by the tile that is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.holder: _Holder | None = None
        self.wrong: Callable[[ExpertTile], bool] = lambda tile: False
        self.misfit: Callable[[ExpertTile], bool] = lambda tile: False
        self.device = torch.device("cpu")
        monkeypatch.setattr(_tune, "_layer", self._layer)
        monkeypatch.setattr(_tune, "_misfits", lambda: (Misfit,))
        monkeypatch.setattr(_bench_weights, "ROTATED_BYTES", 1e5)

    @property
    def tile(self) -> ExpertTile:
        assert self.holder is not None
        tile = self.holder.kernel.tile
        assert tile is not None
        return tile

    def _layer(self, stored: object, kernel: _Holder) -> Callable[[Tensor, Tensor], Tensor]:
        self.holder = kernel
        return self._run

    def _run(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        if self.misfit(self.tile):
            raise Misfit("out of resource: shared memory")
        return hidden_states * (1.5 if self.wrong(self.tile) else 1.0)

    def graph(self, calls: Sequence[Callable[[], object]], /) -> float:
        height = abs(self.tile.block_m.bit_length() - (32).bit_length())
        first, second = self.tile.first, self.tile.second
        return 100 + height + _distance(first, BEST_FIRST) + _distance(second, BEST_SECOND)

    def eager(self, calls: Sequence[Callable[[], object]], /) -> float:
        raise AssertionError("not asked for")

    def peak_bytes(self, call: Callable[[], object], /) -> int:
        raise AssertionError("not asked for")

    def launches(self, calls: Sequence[Callable[[], object]], /) -> tuple[Launch, ...]:
        raise AssertionError("not asked for")

    def point(self, quant: Format = Bf16(), tokens: int = 64) -> Point:  # noqa: B008 - frozen
        tuner = Tuner(
            clocks=self, card=CARD, limits=Limits(shared_memory=227 << 10, tma=True), jobs=1
        )
        (point,) = tuner.points(SHAPE, quant, (tokens,), Steps())
        return point


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    return Card(monkeypatch)


# --- the search -----------------------------------------------------------------------------------


def test_half_the_rows_for_the_second_product_are_tried(card: Card) -> None:
    measure = card.graph

    def graph(calls: Sequence[Callable[[], object]], /) -> float:
        return measure(calls) - 5 * (card.tile.second_rows == 16 and card.tile.block_m == 32)

    card.graph = graph  # type: ignore[method-assign]
    assert card.point().tile == ExpertTile(
        block_m=32, second_block_m=16, first=BEST_FIRST, second=BEST_SECOND
    )


def test_it_finds_the_tile_that_is_best(card: Card) -> None:
    """Height and both products, from a built-in tile that is far from them."""
    point = card.point()
    assert point.tile == ExpertTile(block_m=32, first=BEST_FIRST, second=BEST_SECOND)
    assert point.us == 100
    built_in = tile_of(table_of(CARD, "bf16", SHAPE.hidden_size), 16)
    assert point.rows_per_expert == 16
    assert point.built_in_us > 100
    assert point.tile != built_in
    assert point.tried > 20


def test_a_tile_that_computes_something_else_is_not_chosen(card: Card) -> None:
    """However fast it is."""
    card.wrong = lambda tile: tile.first == BEST_FIRST
    point = card.point()
    assert point.tile.first != BEST_FIRST
    assert point.tile.second == BEST_SECOND
    assert point.wrong > 0


def test_a_tile_that_does_not_fit_is_left_out(card: Card) -> None:
    card.misfit = lambda tile: tile.first.stages > 4
    point = card.point()
    assert point.tile.first == attrs.evolve(BEST_FIRST, stages=4)
    assert point.left_out > 0


def test_a_compiler_that_gives_up_is_a_tile_left_out_and_another_fault_is_none(
    card: Card,
) -> None:
    """Triton says so with a RuntimeError, as PyTorch does of a broken call."""
    said = "PassManager::run failed"

    def refuse(tile: ExpertTile) -> bool:
        if tile.first.stages > 4:
            raise RuntimeError(said)
        return False

    card.misfit = refuse
    assert card.point().tile.first == attrs.evolve(BEST_FIRST, stages=4)
    said = "CUDA error: an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        card.point()


def test_fp8_steps_are_the_values_that_share_a_scale(card: Card) -> None:
    point = card.point(Fp8BlockScale())
    for gemm in (point.tile.first, point.tile.second):
        assert gemm.block_k == 128
        assert gemm.block_n <= 128
    assert point.operand == "fp8"


def test_a_card_without_tma_has_no_such_tile(card: Card) -> None:
    tuner = Tuner(
        clocks=card, card="NVIDIA A100", limits=Limits(shared_memory=163 << 10, tma=False), jobs=1
    )
    (point,) = tuner.points(SHAPE, Bf16(), (4096,), Steps())
    assert not point.tile.first.tma
    assert not point.tile.second.tma
    assert point.tile.shared_memory("bf16", gated=True) <= 163 << 10


def test_a_built_in_tile_that_does_not_run_is_a_sentence(card: Card) -> None:
    tuner = Tuner(clocks=card, card=CARD, limits=Limits(shared_memory=1024, tma=True), jobs=1)
    said = r"T = 8: the built-in tile .* does not run on this card"
    with pytest.raises(UserError, match=said):
        list(tuner.points(SHAPE, Bf16(), (8,), Steps()))
    card.misfit = lambda tile: True
    with pytest.raises(UserError, match=said):
        card.point(tokens=8)


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (0.1, (16,)),
        (4, (16,)),
        (8, (16, 32)),
        (16, (16, 32, 64)),
        (64, (16, 32, 64, 128)),
        (300, (64, 128)),
    ],
)
def test_heights_follow_the_rows_that_an_expert_has(rows: float, expected: tuple[int, ...]) -> None:
    assert heights(rows, "bf16") == expected
    least = (8,) if rows <= 64 else ()
    assert heights(rows, "fp4") == (*least, *expected)


def test_every_built_in_tile_is_one_that_is_tried() -> None:
    """So that a search can come back to it."""
    for tables in (HOPPER, HOPPER_NARROW, ANY_CARD):
        for operand in ("bf16", "fp8"):
            for _, tile in tables.get(operand, ()):
                rows = tile.second_rows
                assert fits(tile.first, operand, tile.block_m), tile
                assert fits(tile.second, operand, rows), tile


@pytest.mark.parametrize("operand", ["bf16", "fp8", "mxfp8", "fp4"])
def test_a_built_in_tile_of_another_height_is_one_that_is_tried(operand: Operand) -> None:
    """Where a search starts."""
    for tables in (HOPPER, ANY_CARD):
        for most, built_in in tables[operand]:
            for height in heights(most, operand):
                tile = of_height(built_in, height, operand)
                assert tile.block_m == height
                wrong = tile_refusal(
                    tile, blocks=operand == "fp8", grouped=operand in {"mxfp8", "fp4"}
                )
                assert wrong is None, tile


def test_what_can_fit_is_compiled_ahead_once(card: Card, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it is timed; nothing twice, and nothing that is beyond the card."""
    ahead: list[ExpertTile] = []

    @contextmanager
    def recorded(
        jobs: int, shape: LayerShape, quant: Format, device: torch.device
    ) -> Iterator[Callable[[int, Sequence[ExpertTile]], None]]:
        yield lambda tokens, tiles: ahead.extend(tiles)

    monkeypatch.setattr(_tune, "compilers", recorded)
    timed: list[ExpertTile] = []
    measure = card.graph

    def graph(calls: Sequence[Callable[[], object]], /) -> float:
        timed.append(card.tile)
        return measure(calls)

    card.graph = graph  # type: ignore[method-assign]
    point = card.point()
    assert len(set(ahead)) == len(ahead)
    # The first of them is the built-in one, which everything is compared with.
    assert set(timed[1:]) <= set(ahead)
    assert point.left_out > 0
    assert all(tile.shared_memory("bf16", gated=True) <= 227 << 10 for tile in ahead)


def test_a_format_without_tiles_is_refused() -> None:
    with pytest.raises(UserError, match="--format mxint4: the Triton expert kernels have no tiles"):
        operand_of(MxInt4())
    assert {
        name: operand_of(FORMATS[name]) for name in ("bf16", "fp8_block", "mxfp8", "mxfp4")
    } == {
        "bf16": "bf16",
        "fp8_block": "fp8",
        "mxfp8": "mxfp8",
        "mxfp4": "fp4",
    }


# --- the tables -----------------------------------------------------------------------------------


def _point(rows: float, block_m: int, us: float = 10.0) -> Point:
    gemm = GemmTile(block_n=64, block_k=64, warps=4, stages=4)
    return Point(
        model="m",
        format="bf16",
        operand="bf16",
        tokens=1,
        rows_per_expert=rows,
        tile=ExpertTile(block_m=block_m, first=gemm, second=gemm),
        us=us,
        built_in_us=us,
        tried=1,
        left_out=0,
        wrong=0,
    )


def test_between_two_points_the_limit_is_their_geometric_mean() -> None:
    points = [_point(256, 128), _point(1, 16), _point(4, 16), _point(16, 32)]
    table = tables_of(points)["bf16"]
    assert [(most, tile.block_m) for most, tile in table] == [(8, 16), (64, 32), (2.0**31, 128)]


def test_of_two_layers_with_as_many_rows_the_longer_one_counts() -> None:
    table = tables_of([_point(4, 32, us=900), _point(4, 16, us=10)])["bf16"]
    assert [tile.block_m for _, tile in table] == [32]


# --- the command ----------------------------------------------------------------------------------


def test_the_file_is_what_the_kernels_read(card: Card, tmp_path: Path) -> None:
    out = tmp_path / "tiles.json"
    tuner = Tuner(clocks=card, card=CARD, limits=Limits(shared_memory=227 << 10, tma=True), jobs=1)
    with (tmp_path / "said").open("w", encoding="utf-8") as said:
        console = Console(file=said, width=200)
        tune(tuner, (SHAPE,), (Bf16(), Fp8BlockScale()), (1, 64), out, Steps(), console)
    found = read_tile_file(out)
    points = items(json.loads(out.read_text()), "points")

    assert found.card == CARD
    assert set(found.tables) == {"bf16", "fp8"}
    assert tile_of(found.tables["bf16"], 16) == ExpertTile(
        block_m=32, first=BEST_FIRST, second=BEST_SECOND
    )
    assert [(point["format"], point["tokens"]) for point in points] == [
        ("bf16", 1),
        ("bf16", 64),
        ("fp8_block", 1),
        ("fp8_block", 64),
    ]
    text = (tmp_path / "said").read_text()
    assert "T 64  100.0 us, the built-in tile" in text
    assert f"TYPED_MOE_TILES={out}" in text


def test_out_of_memory_is_a_sentence_and_what_was_found_stays(
    card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "tiles.json"
    draw = _bench_weights.draw_layer

    def full(shape: LayerShape, quant: Format, seed: int, device: torch.device) -> object:
        if isinstance(quant, Fp8BlockScale):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.75 GiB.\nmore")
        return draw(shape, quant, seed, device)

    monkeypatch.setattr(_tune, "draw_layer", full)
    tuner = Tuner(clocks=card, card=CARD, limits=Limits(shared_memory=227 << 10, tma=True), jobs=1)
    console = Console(quiet=True)
    with pytest.raises(UserError, match=r"fp8_block does not fit .* 2.75 GiB.*found before is in"):
        tune(tuner, (SHAPE,), (Bf16(), Fp8BlockScale()), (1,), out, Steps(), console)
    assert set(read_tile_file(out).tables) == {"bf16"}


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--model", "qwen"), "--model is 'qwen'; allowed: qwen3-30b-a3b"),
        (("--format", "mxint4"), "--format mxint4: the Triton expert kernels have no tiles for it"),
        (("--tokens", "0"), "--tokens is 0; allowed: 1 to"),
        (("--jobs", "0"), "--jobs is 0; allowed: 1 or more"),
        (("--out", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
    ],
)
def test_a_mistake_is_a_sentence(cli: Cli, argv: tuple[str, ...], said: str) -> None:
    done = cli("tune", *argv)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


def test_it_does_not_measure_beside_tiles_of_its_own(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TYPED_MOE_TILES", "tiles.json")
    done = cli("tune")
    assert done.status == 2
    assert done.err.startswith("error: unset TYPED_MOE_TILES")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(cli: Cli) -> None:
    done = cli("tune")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: tune runs on a CUDA device; this torch (")


# --- with Triton's interpreter --------------------------------------------------------------------


interpreted = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="Triton is not installed, or its interpreter is not on",
)


@interpreted
def test_the_kernels_run_with_every_tile_that_is_tried(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And give what the built-in one gives: none is wrong, none is left out."""
    quant = Fp8BlockScale()
    monkeypatch.setattr(_bench_weights, "ROTATED_BYTES", 1)
    grid = Grid(block_n=(64, 128), block_k=(64, 128), warps=(4,), stages=(3,), tma=(False,))
    tuner = Tuner(
        clocks=ToldClocks(),
        card="interpreter",
        limits=limits_of(torch.device("cpu")),
        grid=grid,
        jobs=1,
    )
    shape = attrs.evolve(SHAPE, num_experts=2)
    out = tmp_path / "tiles.json"
    run = partial(tune, tuner, (shape,), (quant,), (2,))
    run(out, Steps(), Console(quiet=True))
    points = items(json.loads(out.read_text()), "points")
    assert [(point["wrong"], point["left_out"]) for point in points] == [(0, 0)]
    assert all(isinstance(point["tried"], int) and point["tried"] > 3 for point in points)
    assert read_tile_file(out).card == "interpreter"


@interpreted
def test_tiles_are_called_in_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with a layer of its own; a tile that cannot be is left to the search to say."""
    shape = attrs.evolve(SHAPE, num_experts=4)
    good = ANY_CARD["bf16"][0][1]
    bad = attrs.evolve(good, first=attrs.evolve(good.first, block_k=48))
    cpu = torch.device("cpu")
    with _tune_compile.compilers(2, shape, Bf16(), cpu) as compiled:
        compiled(2, [good, bad])

    monkeypatch.setattr(_tune_compile, "_started", [])
    _tune_compile._start(shape, Bf16(), "cpu")
    assert _tune_compile._run(2, good) == ""
    assert _tune_compile._run(2, bad) != ""
