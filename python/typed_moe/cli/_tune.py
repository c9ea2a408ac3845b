"""`typed-moe tune`: the Triton expert kernels' tiles for this card, measured.

Whole layers are timed, one product's tile changed at a time: the height of a block first, then the
first product's tile, then the second's. A tile that does not fit the card, or whose output is not the
built-in tile's, is left out.
"""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import final

import attrs
from torch import Tensor

from typed_moe.cli._bench_clock import Clocks, poisoned
from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.cli._bench_weights import (
    LayerInputs,
    StoredLayer,
    draw_inputs,
    draw_layer,
    make_layer,
    num_layers,
)
from typed_moe.cli._errors import UserError
from typed_moe.cli._progress import Steps
from typed_moe.cli._tune_compile import AnyTile, Compilers, compilers, jobs_for
from typed_moe.cli._tune_grid import ROUNDS, Grid, Limits, fits, heights, of_height
from typed_moe.config import Format, FormatName, is_gated
from typed_moe.kernels import TritonKernel
from typed_moe.kernels._expert_tiles import ANY_CARD, ExpertTile, Operand, Table, table_of, tile_of
from typed_moe.layer import FusedMoE
from typed_moe.quantization import stored_error_bound

_OPERANDS: Mapping[FormatName, str] = MappingProxyType(
    {
        "unquantized": "bf16",
        "bf16": "bf16",
        "fp8_block": "fp8",
        "fp8_per_tensor": "fp8",
        "mxfp8": "mxfp8",
        "mxfp4": "fp4",
        "nvfp4": "fp4",
    }
)
"""Whose table a format's tiles are in."""
_LAST = 2.0**31
_GAVE_UP = "PassManager::run failed"  # what Triton's compiler says, in a RuntimeError


@final
@attrs.frozen(kw_only=True)
class Point:
    """The best tile for one shape, format and T.

    Attributes:
        model, format, operand, tokens: whose.
        rows_per_expert: T k / E.
        tile: the best.
        us: its whole layer's time.
        built_in_us: the built-in table's.
        tried: tiles that were timed.
        left_out: tiles that do not fit the card, by what was said.
        wrong: tiles whose output is not the built-in tile's.
    """

    model: str
    format: str
    operand: Operand
    tokens: int
    rows_per_expert: float
    tile: ExpertTile
    us: float
    built_in_us: float
    tried: int
    left_out: int
    wrong: int


@final
@attrs.frozen(kw_only=True)
class Tuner:
    """What is tried, and with what it is timed.

    Attributes:
        clocks: of the device.
        card: its name.
        limits: of a program on it.
        grid: the values that are tried.
        jobs: processes that compile; None: as many as there is room for.
    """

    clocks: Clocks
    card: str
    limits: Limits
    grid: Grid = attrs.field(factory=Grid)
    jobs: int | None = None

    def points(
        self, shape: LayerShape, quant: Format, tokens: Sequence[int], steps: Steps
    ) -> Iterator[Point]:
        """T by T, of one shape and format.

        Raises:
            UserError: the Triton kernels do not take the format, or the shape in it.
        """
        operand = operand_of(quant)
        first = draw_layer(shape, quant, 0, self.clocks.device)
        stored = [first]
        stored += [
            draw_layer(shape, quant, seed, self.clocks.device)
            for seed in range(1, num_layers(first))
        ]
        kernel = AnyTile()
        layers = [_layer(one, kernel) for one in stored]
        jobs = self.jobs or jobs_for(first)
        del stored
        with (
            compilers(jobs, shape, quant, self.clocks.device) as compiled,
            steps.step(f"tune {shape.name}, {quant.name}", total=len(tokens)) as step,
        ):
            for count in tokens:
                inputs = draw_inputs(shape, count, self.clocks.device)
                search = _Search(self, kernel, layers, inputs, operand, compiled)
                yield search.point(shape, quant)
                step.advance()


def operand_of(quant: Format) -> Operand:
    """Whose tiles a format takes.

    Raises:
        UserError: none: the Triton kernels do not multiply it.
    """
    wanted = _OPERANDS.get(quant.name)
    for operand in ANY_CARD:
        if operand == wanted:
            return operand
    raise UserError(f"--format {quant.name}: the Triton expert kernels have no tiles for it")


def _layer(stored: StoredLayer, kernel: AnyTile) -> FusedMoE:
    try:
        return make_layer(stored, kernel)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise UserError(f"{stored.shape.name}, {stored.quant.name}: {said}") from error


@final
class _Search:
    """One T: the built-in tile, and from it one product's tile at a time."""

    def __init__(
        self,
        tuner: Tuner,
        kernel: AnyTile,
        layers: Sequence[FusedMoE],
        inputs: LayerInputs,
        operand: Operand,
        compiled: Compilers,
    ) -> None:
        self._compiled = compiled
        self._tuner, self._kernel, self._layers = tuner, kernel, layers
        self._inputs, self._operand = inputs, operand
        self._tried, self._left_out, self._wrong = 0, 0, 0
        self._times: dict[ExpertTile, float | None] = {}

    def point(self, shape: LayerShape, quant: Format) -> Point:
        """The search."""
        tokens = self._inputs.hidden_states.shape[0]
        rows = tokens * shape.top_k / shape.num_experts
        built_in = tile_of(table_of(self._tuner.card, self._operand, shape.hidden_size), rows)
        self._gated = is_gated(shape.activation)
        self._bound = 2 * stored_error_bound(quant)
        try:
            self._expected = self._output(built_in)
            before = self._time(built_in)
        except _misfits():
            before = None
        if before is None:
            raise UserError(
                f"{shape.name}, {quant.name}, T = {tokens}: the built-in tile {built_in} does not run "
                "on this card, so that there is nothing to compare with; please report it"
            )
        best = min(self._finished(rows, built_in), key=lambda found: found[1])
        return Point(
            model=shape.name,
            format=quant.name,
            operand=self._operand,
            tokens=tokens,
            rows_per_expert=rows,
            tile=best[0],
            us=best[1],
            built_in_us=before,
            tried=self._tried,
            left_out=self._left_out,
            wrong=self._wrong,
        )

    def _finished(self, rows: float, built_in: ExpertTile) -> Iterator[tuple[ExpertTile, float]]:
        """The best of each height, and the built-in one."""
        before = self._time(built_in)
        assert before is not None, "looked at before"
        yield built_in, before
        for height in heights(rows, self._operand):
            start = of_height(built_in, height, self._operand)
            for product in (0, 1):
                for number in range(ROUNDS):
                    tiles = [start, *self._changed(start, product, number)]
                    self._ahead(tiles)
                    timed = [(tile, self._time(tile)) for tile in tiles]
                    fitting = [(tile, us) for tile, us in timed if us is not None]
                    if fitting:
                        start, us = min(fitting, key=lambda found: found[1])
                        yield start, us

    def _changed(self, start: ExpertTile, product: int, number: int) -> Iterator[ExpertTile]:
        """The start with other tiles for one of its products: 0 the first, 1 the second."""
        gemm, rows = (
            (start.first, start.block_m) if product == 0 else (start.second, start.second_rows)
        )
        for tile in self._tuner.grid.round(number, gemm, rows):
            if fits(tile, self._operand, rows):
                if product:
                    yield attrs.evolve(start, second=tile)
                else:
                    yield attrs.evolve(start, first=tile)
        # Last, half the rows for the second product.
        half = start.block_m // 2
        if product and number == ROUNDS - 1 and half >= 16 and fits(gemm, self._operand, half):
            yield attrs.evolve(start, second_block_m=half)

    def _ahead(self, tiles: Sequence[ExpertTile]) -> None:
        """Have those compiled that are new and can fit."""
        new = dict.fromkeys(
            tile for tile in tiles if tile not in self._times and self._can_fit(tile)
        )
        self._compiled(self._inputs.hidden_states.shape[0], tuple(new))

    def _can_fit(self, tile: ExpertTile) -> bool:
        limits = self._tuner.limits
        needed = tile.shared_memory(self._operand, gated=self._gated)
        copied = any(gemm.tma or gemm.persistent for gemm in (tile.first, tile.second))
        return needed <= limits.shared_memory and (limits.tma or not copied)

    def _time(self, tile: ExpertTile) -> float | None:
        """Microseconds of a whole layer; None where the tile does not fit or is wrong."""
        if tile not in self._times:
            self._times[tile] = self._measured(tile)
        return self._times[tile]

    def _measured(self, tile: ExpertTile) -> float | None:
        if not self._can_fit(tile):
            self._left_out += 1
            return None
        try:
            output = self._output(tile)
            off = float((output - self._expected).norm() / self._expected.norm())
            # Written so that NaN fails.
            if not off <= self._bound:
                self._wrong += 1
                return None
            us = self._tuner.clocks.graph(self._calls())
        except _misfits():
            self._left_out += 1
            return None
        except RuntimeError as error:
            if _GAVE_UP not in str(error):
                raise
            self._left_out += 1
            return None
        self._tried += 1
        return us

    def _output(self, tile: ExpertTile) -> Tensor:
        self._kernel.kernel = TritonKernel(tile=tile)
        with poisoned():
            return self._calls()[0]().double()

    def _calls(self) -> list[Callable[[], Tensor]]:
        given = self._inputs.hidden_states, self._inputs.router_logits
        return [partial(layer, *given) for layer in self._layers]


def _misfits() -> tuple[type[Exception], ...]:
    """What Triton says of a tile that the card or the compiler cannot do."""
    errors = importlib.import_module("triton.runtime.errors")
    compiler = importlib.import_module("triton.compiler.errors")
    return (errors.OutOfResources, errors.PTXASError, compiler.CompilationError)


def tables_of(points: Sequence[Point]) -> dict[Operand, Table]:
    """One table per operand: between two points the limit is their geometric mean.

    Of points with the same rows per expert, the one whose layer takes longest counts.
    """
    tables: dict[Operand, Table] = {}
    for operand in dict.fromkeys(point.operand for point in points):
        mine = sorted(
            (point for point in points if point.operand == operand),
            key=lambda point: (point.rows_per_expert, point.us),
        )
        by_rows = {point.rows_per_expert: point.tile for point in mine}
        rows = list(by_rows)
        limits = [(low * high) ** 0.5 for low, high in itertools.pairwise(rows)] + [_LAST]
        table: list[tuple[float, ExpertTile]] = []
        for limit, tile in zip(limits, by_rows.values(), strict=True):
            if table and table[-1][1] == tile:
                table.pop()
            table.append((limit, tile))
        tables[operand] = tuple(table)
    return tables
