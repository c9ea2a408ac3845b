"""`typed-moe bench layer`: whole expert layers on this GPU, beside their peers and the card's limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_card import Card, Floor, floor_of
from typed_moe.cli._bench_clock import Clocks, Launch, poisoned
from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.cli._bench_weights import (
    LayerInputs,
    StoredLayer,
    draw_inputs,
    draw_layer,
    num_layers,
)
from typed_moe.cli._peer import Built, Side
from typed_moe.cli._progress import Steps
from typed_moe.cli._verify import GAIN_BOUND
from typed_moe.cli._verify_expected import as_read
from typed_moe.config import Format
from typed_moe.quantization import stored_error_bound
from typed_moe.routing import Refused
from typed_moe.testing._oracle import OracleRouting, experts_float64, route_float64

_BF16_ROUNDING = 2.0**-16 / 3  # mean square of one, at most
_SETTINGS = ("num_expert_group", "topk_group", "norm_topk_prob", "routed_scaling_factor")

Call = Callable[[], Tensor]

State = Literal["timed", "wrong", "failed", "absent"]


@final
@attrs.frozen(kw_only=True)
class Cell:
    """One side at one T.

    Attributes:
        model, format, tokens, side: whose.
        state: what became of it; only what is right is timed.
        reason: of anything but a time; and where one clock alone has none.
        graph_us: microseconds per call in a CUDA graph.
        eager_us: launched by the host.
        floor: what the card needs at least.
        experts_used: that a token went to.
        error: ||output - oracle|| / ||oracle||, on the rows whose experts float32 decides.
        bound: on that.
        peak_bytes: that a call takes, output included.
        intermediate_bytes: the larger of (T k, I) and (T k, H) in bfloat16.
        launches: the kernels of a call, where they were asked for.
    """

    model: str
    format: str
    tokens: int
    side: str
    state: State
    floor: Floor
    experts_used: int
    reason: str = ""
    graph_us: float | None = None
    eager_us: float | None = None
    error: float | None = None
    bound: float | None = None
    peak_bytes: int | None = None
    intermediate_bytes: int
    launches: tuple[Launch, ...] = ()

    @property
    def us(self) -> float | None:
        """In a graph; where a side cannot be captured, without."""
        return self.eager_us if self.graph_us is None else self.graph_us

    @property
    def share(self) -> float | None:
        """Of the floor in the time."""
        return None if self.us is None else self.floor.us / self.us


@final
@attrs.frozen(kw_only=True)
class Block:
    """One model in one format, every T and side.

    Attributes:
        shape, format: whose.
        layers: whose weights the calls go round over.
        about: what each side is, by name.
        libraries: whose kernels this package's layer calls, by side, where it calls any.
        cells: the measurements.
    """

    shape: LayerShape
    format: str
    layers: int
    about: tuple[tuple[str, str], ...]
    libraries: tuple[tuple[str, str], ...] = ()
    cells: tuple[Cell, ...]


@final
@attrs.frozen(kw_only=True, eq=False)
class LayerBench:
    """What is measured with what; `launches`: also what each kernel takes."""

    clocks: Clocks
    card: Card
    sides: tuple[Side, ...]
    launches: bool = False

    def block(self, shape: LayerShape, quant: Format, tokens: Sequence[int], steps: Steps) -> Block:
        """Every side at every T of one model in one format.

        Raises:
            ValueError: the format cannot store the shape.
        """
        first = draw_layer(shape, quant, 0, self.clocks.device)
        stored = [first]
        stored += [
            draw_layer(shape, quant, seed, self.clocks.device)
            for seed in range(1, num_layers(first))
        ]
        built = [(side.name, _built(side, stored)) for side in self.sides]
        cells: list[Cell] = []
        with steps.step(f"{shape.name}, {quant.name}", total=len(tokens) * len(built)) as step:
            for count in tokens:
                case = _Case(bench=self, stored=first, tokens=count)
                for name, side in built:
                    cells.append(case.cell(name, side))
                    step.advance()
        return Block(
            shape=shape,
            format=quant.name,
            layers=len(stored),
            about=tuple(
                (name, side.reason if isinstance(side, Refused) else side.about)
                for name, side in built
            ),
            libraries=tuple(
                (name, side.library)
                for name, side in built
                if isinstance(side, Built) and side.library is not None
            ),
            cells=tuple(cells),
        )


def _built(side: Side, stored: Sequence[StoredLayer]) -> Built | Refused:
    try:
        return side.build(stored)
    except torch.OutOfMemoryError as error:
        return Refused(f"its weights do not fit: {_first_line(error)}")


@final
class _Case:
    """One T: inputs, oracle and floor, the same for every side."""

    def __init__(self, *, bench: LayerBench, stored: StoredLayer, tokens: int) -> None:
        self._bench, self._stored, self._tokens = bench, stored, tokens
        self._inputs = draw_inputs(stored.shape, tokens, bench.clocks.device)
        self._routing = _oracle_routing(stored, self._inputs)
        self._decided = ~self._routing.undecided().to(bench.clocks.device)
        self._expected: dict[bool, Tensor] = {}

    def cell(self, name: str, built: Built | Refused) -> Cell:
        """Check, and time what is right."""
        shape, quant, ids = self._stored.shape, self._stored.quant, self._routing.ids
        used = len(set(ids.flatten().tolist()))
        moved = used * self._stored.bytes_per_expert + 2 * self._inputs.hidden_states.nbytes
        rows = self._stored.state["w13_weight"].shape[1]
        values = shape.hidden_size * (rows + shape.intermediate_size)
        widest = max(shape.hidden_size, shape.intermediate_size)
        cell = Cell(
            model=shape.name,
            format=quant.name,
            tokens=self._tokens,
            side=name,
            state="absent",
            floor=floor_of(
                self._bench.card, quant, moved_bytes=moved, flops=2.0 * ids.numel() * values
            ),
            experts_used=used,
            intermediate_bytes=ids.numel() * widest * torch.bfloat16.itemsize,
        )
        if isinstance(built, Refused):
            return attrs.evolve(cell, reason=built.reason)
        try:
            return self._timed(cell, built)
        # A peer's fault is its cell's entry, whatever it raises.
        except Exception as error:  # noqa: BLE001
            return attrs.evolve(cell, state="failed", reason=_said(error))

    def _timed(self, cell: Cell, built: Built) -> Cell:
        given = self._inputs.hidden_states, self._inputs.router_logits
        if built.tune is not None:
            built.tune(*given)
        calls = [partial(run, *given) for run in built.layers]
        cell = self._checked(cell, calls[0], built)
        if cell.state == "wrong":
            return cell
        clocks = self._bench.clocks
        graph, why_no_graph = _tried(clocks.graph, calls)
        return attrs.evolve(
            cell,
            state="timed",
            graph_us=graph,
            reason=why_no_graph,
            eager_us=clocks.eager(calls),
            peak_bytes=clocks.peak_bytes(calls[0]),
            launches=clocks.launches(calls) if self._bench.launches else (),
        )

    def _expect(self, *, rounded: bool) -> Tensor:
        """(T, H) float64, computed once for the sides that round alike in between."""
        if rounded not in self._expected:
            self._expected[rounded] = _expected(
                self._stored, self._inputs, self._routing, rounded=rounded
            )
        return self._expected[rounded]

    def _checked(self, cell: Cell, call: Call, built: Built) -> Cell:
        """The first layer's output against the oracle, on memory that was filled with NaN."""
        with poisoned():
            output = call()
        mine = output.to(torch.float64)[self._decided]
        expected = self._expect(rounded=built.rounds_intermediate)[self._decided]
        error = float((mine - expected).norm() / expected.norm())
        gain = float((mine * expected).sum() / (expected * expected).sum())
        bound = _bound(self._stored.quant, built.roundings)
        finite = bool(output.isfinite().all())
        # Written so that NaN fails.
        if finite and error <= bound and abs(gain - 1) <= GAIN_BOUND:
            return attrs.evolve(cell, error=error, bound=bound)
        said = f"the error is {error:.4g}, allowed: {bound:.4g}; the output is {gain:.4g} times "
        said += "the oracle's" if finite else "the oracle's, and not finite"
        number = error if math.isfinite(error) else None  # JSON has no NaN
        return attrs.evolve(cell, state="wrong", reason=said, error=number, bound=bound)


def _bound(quant: Format, roundings: int) -> float:
    """On a kernel's error, with more roundings to bfloat16 in between."""
    fused = stored_error_bound(quant) ** 2
    more: float = (1 + _BF16_ROUNDING) ** roundings
    return math.sqrt((1 + fused) * more - 1)


def _tried(
    clock: Callable[[Sequence[Call]], float], calls: Sequence[Call]
) -> tuple[float | None, str]:
    """A time, or why a CUDA graph of these calls cannot be had."""
    try:
        return clock(calls), ""
    except RuntimeError as error:
        return None, f"in no CUDA graph: {_said(error)}"


def _oracle_routing(stored: StoredLayer, inputs: LayerInputs) -> OracleRouting:
    strategy, bias = stored.shape.routing, stored.correction_bias
    settings = {name: getattr(strategy, name) for name in _SETTINGS if hasattr(strategy, name)}
    return route_float64(
        inputs.router_logits.cpu(),
        None if bias is None else bias.cpu(),
        method=strategy.name,
        top_k=stored.shape.top_k,
        **settings,
    )


def _expected(
    stored: StoredLayer, inputs: LayerInputs, routing: OracleRouting, *, rounded: bool
) -> Tensor:
    """(T, H) float64 on the device."""
    device = inputs.hidden_states.device
    return experts_float64(
        as_read(inputs.hidden_states, stored.quant, stored.state.get("w13_input_scale")),
        routing.ids.to(device),
        routing.weights.to(device),
        stored.oracle(rounded=rounded),
        weight_on_input=stored.shape.routing.apply_router_weight_on_input,
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


@torch.no_grad()
def bench_layer(
    bench: LayerBench,
    shapes: Sequence[LayerShape],
    formats: Sequence[Format],
    tokens: Sequence[int],
    steps: Steps,
) -> Iterator[Block]:
    """Block by block, as they are measured.

    Args:
        bench: clocks, card and sides.
        shapes: to run.
        formats: of each.
        tokens: T of each; none: each shape's own.
        steps: for progress.
    """
    for shape in shapes:
        for quant in formats:
            yield _block_or_reason(bench, shape, quant, tokens or shape.tokens, steps)
            if bench.clocks.device.type == "cuda":
                torch.cuda.empty_cache()


def _block_or_reason(
    bench: LayerBench, shape: LayerShape, quant: Format, tokens: Sequence[int], steps: Steps
) -> Block:
    """A block; empty with the reason, where the shape cannot be had in the format or on the card."""
    try:
        return bench.block(shape, quant, tokens, steps)
    except torch.OutOfMemoryError as error:
        reason = f"out of the card's memory: {_first_line(error)}"
    except ValueError as error:
        reason = f"not in this format: {error}"
    return Block(shape=shape, format=quant.name, layers=0, about=(("all", reason),), cells=())
