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
import torch
from torch import Tensor

from typed_moe.cli._bench_clock import Clocks, poisoned
from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.cli._bench_weights import (
    LayerInputs,
    StoredLayer,
    draw_inputs,
    draw_layer,
    num_layers,
)
from typed_moe.cli._errors import UserError
from typed_moe.cli._progress import Steps
from typed_moe.config import Format, FormatName, is_gated
from typed_moe.kernels import ExpertWeights, KernelRequest, MoeArgs, TritonKernel
from typed_moe.kernels._expert_tiles import ExpertTile, GemmTile, Operand, Table, table_of, tile_of
from typed_moe.layer import FusedMoE
from typed_moe.quantization import Quantized, stored_error_bound
from typed_moe.routing import KernelRules, Refused

_OPERANDS: Mapping[FormatName, str] = MappingProxyType(
    {
        "unquantized": "bf16",
        "bf16": "bf16",
        "fp8_block": "fp8",
        "fp8_per_tensor": "fp8",
        "fp8_per_channel": "fp8",
        "mxfp8": "mxfp8",
        "mxfp4": "fp4",
        "nvfp4": "fp4",
    }
)
"""Whose table a format's tiles are in."""
_HEIGHTS = (16, 32, 64, 128)
_VALUES_PER_WARP = (4 * 32, 64 * 128)
"""Of a result tile: with fewer lanes idle, with more they do not fit the registers."""
_GROUPED = 8
_GAVE_UP = "PassManager::run failed"  # what Triton's compiler says, in a RuntimeError
_LEAST_SHARED_MEMORY = 99 << 10  # bytes: what every card from compute capability 8.0 on has
_LAST = 2.0**31


@final
@attrs.frozen(kw_only=True)
class Grid:
    """The values that are tried for one product."""

    block_n: tuple[int, ...] = (32, 64, 128, 256)
    block_k: tuple[int, ...] = (64, 128)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (3, 4, 5)
    tma: tuple[bool, ...] = (False, True)

    def round(self, number: int, start: GemmTile) -> list[GemmTile]:
        """What is tried from a tile on: width and warps, then depth, then how it is copied.

        Three rounds of a few tiles, each from the best of the one before: all of them together would be a
        hundred to compile for each product and height.
        """
        match number:
            case 0:
                return [
                    attrs.evolve(start, block_n=n, warps=warps)
                    for n, warps in itertools.product(self.block_n, self.warps)
                ]
            case 1:
                return [
                    attrs.evolve(start, block_k=k, stages=stages)
                    for k, stages in itertools.product(self.block_k, self.stages)
                ]
            case _:
                return [attrs.evolve(start, tma=tma) for tma in self.tma]


_ROUNDS = 3


def fits(tile: GemmTile, operand: Operand, height: int) -> bool:
    """Whether a block of this height can have a tile in this operand at all."""
    least, most = _VALUES_PER_WARP
    if operand == "fp8" and (tile.block_k != 128 or tile.block_n > 128):
        return False  # a step of a product is the 128 values that share a scale
    if tile.tma and height < 64:
        return False
    return least <= height * tile.block_n // tile.warps <= most


@final
@attrs.frozen(kw_only=True)
class Limits:
    """What the card gives a program.

    Attributes:
        shared_memory: bytes.
        tma: whether it has a tensor memory accelerator.
    """

    shared_memory: int
    tma: bool


def limits_of(device: torch.device) -> Limits:
    """The card's; what Triton's interpreter takes on a CPU, which is anything."""
    if device.type != "cuda":
        return Limits(shared_memory=1 << 30, tma=False)
    properties = torch.cuda.get_device_properties(device)
    # PyTorch's stub does not have it.
    shared = int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED_MEMORY))
    return Limits(shared_memory=shared, tma=properties.major >= 9)


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
class _AnyTile:
    """`TritonKernel` with a tile that is changed between calls."""

    def __init__(self) -> None:
        self.kernel = TritonKernel()

    @property
    def name(self) -> str:
        """For plans."""
        return self.kernel.name

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """As the kernel's."""
        return self.kernel.rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As the kernel's."""
        return self.kernel.prepare(weights, request)

    def quantize(self, hidden_states: Tensor, quant: Format) -> Quantized:
        """As the kernel's."""
        return self.kernel.quantize(hidden_states, quant)

    def __call__(self, args: MoeArgs, /) -> Tensor:
        return self.kernel(args)


@final
@attrs.frozen(kw_only=True)
class Tuner:
    """What is tried, and with what it is timed."""

    clocks: Clocks
    card: str
    limits: Limits
    grid: Grid = Grid()

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
        kernel = _AnyTile()
        layers = [_layer(one, kernel) for one in stored]
        with steps.step(f"tune {shape.name}, {quant.name}", total=len(tokens)) as step:
            for count in tokens:
                inputs = draw_inputs(shape, count, self.clocks.device)
                yield _Search(self, kernel, layers, inputs, operand).point(shape, quant)
                step.advance()


def operand_of(quant: Format) -> Operand:
    """Whose tiles a format takes.

    Raises:
        UserError: none: the Triton kernels do not multiply it.
    """
    wanted = _OPERANDS.get(quant.name)
    for operand in _known():
        if operand == wanted:
            return operand
    raise UserError(f"--format {quant.name}: the Triton expert kernels have no tiles for it")


def _known() -> tuple[Operand, ...]:
    """The operands of the built-in tables."""
    from typed_moe.kernels._expert_tiles import ANY_CARD  # noqa: PLC0415 - data

    return tuple(ANY_CARD)


def _layer(stored: StoredLayer, kernel: _AnyTile) -> FusedMoE:
    shape = stored.shape
    try:
        layer = FusedMoE(
            num_experts=shape.num_experts,
            top_k=shape.top_k,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            routing=shape.routing,
            quant=stored.quant,
            activation=shape.activation,
            has_bias=shape.has_bias,
            kernel=kernel,
            device=stored.state["w13_weight"].device,
            dtype=torch.bfloat16,
        )
    except ValueError as error:
        raise UserError(
            f"{shape.name}, {stored.quant.name}: {' '.join(str(error).split())}"
        ) from error
    layer.load_state_dict(stored.state)
    layer.prepare_weights()
    return layer


@final
class _Search:
    """One T: the built-in tile, and from it one product's tile at a time."""

    def __init__(
        self,
        tuner: Tuner,
        kernel: _AnyTile,
        layers: Sequence[FusedMoE],
        inputs: LayerInputs,
        operand: Operand,
    ) -> None:
        self._tuner, self._kernel, self._layers = tuner, kernel, layers
        self._inputs, self._operand = inputs, operand
        self._tried, self._left_out, self._wrong = 0, 0, 0
        self._times: dict[ExpertTile, float | None] = {}

    def point(self, shape: LayerShape, quant: Format) -> Point:
        """The search."""
        tokens = self._inputs.hidden_states.shape[0]
        rows = tokens * shape.top_k / shape.num_experts
        built_in = tile_of(table_of(self._tuner.card, self._operand), rows)
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
        for height in heights(rows):
            start = _of_height(built_in, height)
            for product in (0, 1):
                for number in range(_ROUNDS):
                    tiles = [start, *self._changed(start, product, number)]
                    timed = [(tile, self._time(tile)) for tile in tiles]
                    fitting = [(tile, us) for tile, us in timed if us is not None]
                    if fitting:
                        start, us = min(fitting, key=lambda found: found[1])
                        yield start, us

    def _changed(self, start: ExpertTile, product: int, number: int) -> Iterator[ExpertTile]:
        """The start with other tiles for one of its products: 0 the first, 1 the second."""
        gemm = start.second if product else start.first
        for tile in self._tuner.grid.round(number, gemm):
            if fits(tile, self._operand, start.block_m):
                if product:
                    yield attrs.evolve(start, second=tile)
                else:
                    yield attrs.evolve(start, first=tile)

    def _time(self, tile: ExpertTile) -> float | None:
        """Microseconds of a whole layer; None where the tile does not fit or is wrong."""
        if tile not in self._times:
            self._times[tile] = self._measured(tile)
        return self._times[tile]

    def _measured(self, tile: ExpertTile) -> float | None:
        limits = self._tuner.limits
        too_much = tile.shared_memory(self._operand, gated=self._gated) > limits.shared_memory
        if too_much or (not limits.tma and (tile.first.tma or tile.second.tma)):
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


def _of_height(tile: ExpertTile, height: int) -> ExpertTile:
    """The same products on blocks of another height; copied by descriptor in high ones alone."""
    if tile.block_m == height:
        return tile
    group = _GROUPED if height >= 64 else 1
    first, second = (
        attrs.evolve(gemm, group_m=group, tma=gemm.tma and height >= 64)
        for gemm in (tile.first, tile.second)
    )
    return ExpertTile(block_m=height, first=first, second=second)


def heights(rows: float) -> tuple[int, ...]:
    """Blocks that experts with so many rows on average can want: not far above, nor far below."""
    return tuple(
        height
        for height in _HEIGHTS
        if height <= max(_HEIGHTS[0], 4 * rows) and (rows <= 64 or height >= 64)
    )


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
