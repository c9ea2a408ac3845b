"""`typed-moe bench overhead`: what a call costs on the host beyond the same call by hand."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_by_hand import EXPERTS, HIDDEN, Call
from typed_moe.cli._bench_calls import Pair, open_library, pairs
from typed_moe.cli._progress import Steps

TOKENS = (1, 8, 32, 256)
_ROUNDS = 60
_ROUND_SECONDS = 0.003


@final
@attrs.frozen(kw_only=True)
class Measured:
    """One format, form and number of tokens.

    Attributes:
        format: of the layer.
        form: who routes.
        tokens: T.
        ratio: median over the rounds of (runner's time / time by hand).
        runner_us: median microseconds per call through the runner.
        by_hand_us: the same by hand.
        rounds: how many.
        calls: per side and round.
    """

    format: str
    form: str
    tokens: int
    ratio: float
    runner_us: float
    by_hand_us: float
    rounds: int
    calls: int

    @property
    def difference_us(self) -> float:
        """Microseconds that the runner adds to a call."""
        return self.runner_us - self.by_hand_us


@final
@attrs.frozen(kw_only=True)
class BenchReport:
    """Everything that `bench overhead` prints."""

    flashinfer: str
    measured: tuple[Measured, ...]

    def ratio(self, quant: str | None = None) -> float:
        """The median over the measurements, of a format or of all."""
        return statistics.median(
            one.ratio for one in self.measured if quant is None or one.format == quant
        )

    def ratio_at(self, tokens: int) -> float:
        """The median over the measurements at T tokens."""
        return statistics.median(one.ratio for one in self.measured if one.tokens == tokens)

    @property
    def difference_us(self) -> float:
        """The median of what the runner adds to a call, in microseconds."""
        return statistics.median(one.difference_us for one in self.measured)


@torch.no_grad()
def bench_overhead(steps: Steps, rounds: int = _ROUNDS) -> BenchReport:
    """Time every pair at every T.

    Raises:
        UserError: flashinfer is not installed.
    """
    library = open_library()
    made = pairs(library)
    with steps.step("bench", total=len(made) * len(TOKENS)) as step:
        measured = []
        for pair in made:
            for tokens in TOKENS:
                measured.append(_measure(pair, tokens, rounds))
                step.advance()
    return BenchReport(flashinfer=library.version, measured=tuple(measured))


def inputs(tokens: int) -> tuple[Tensor, Tensor]:
    """Hidden states (T, H) in bfloat16 and logits (T, E) in float32."""
    generator = torch.Generator().manual_seed(tokens)
    hidden_states = torch.randn(tokens, HIDDEN, generator=generator).bfloat16()
    return hidden_states, torch.randn(tokens, EXPERTS, generator=generator)


def recorded(pair: Pair, call: Call, tokens: int) -> list[tuple[str, Mapping[str, object]]]:
    """What one side calls, entry point and keywords."""
    seen: list[tuple[str, Mapping[str, object]]] = []
    pair.library.keep = lambda entry, arguments: seen.append((entry, arguments))
    call(*inputs(tokens))
    pair.library.keep = None
    return seen


def _measure(pair: Pair, tokens: int, rounds: int) -> Measured:
    """Rounds in turn, each side first in every other one."""
    hidden_states, logits = inputs(tokens)
    calls = _calls_per_round(pair.by_hand, hidden_states, logits)
    ours: list[float] = []
    theirs: list[float] = []
    with _no_collection():
        for number in range(rounds):
            sides = ((pair.runner, ours), (pair.by_hand, theirs))
            for call, times in sides if number % 2 else reversed(sides):
                times.append(_time(call, hidden_states, logits, calls))
    return Measured(
        format=pair.quant.name,
        form=pair.form.value,
        tokens=tokens,
        ratio=statistics.median(a / b for a, b in zip(ours, theirs, strict=True)),
        runner_us=1e6 * statistics.median(ours),
        by_hand_us=1e6 * statistics.median(theirs),
        rounds=rounds,
        calls=calls,
    )


def _calls_per_round(call: Call, hidden_states: Tensor, logits: Tensor) -> int:
    """As many as fill a round's time, after warming up."""
    _time(call, hidden_states, logits, 20)
    once = _time(call, hidden_states, logits, 20)
    return max(5, round(_ROUND_SECONDS / once))


def _time(call: Call, hidden_states: Tensor, logits: Tensor, calls: int) -> float:
    """Seconds per call."""
    begin = time.perf_counter()
    for _ in range(calls):
        call(hidden_states, logits)
    return (time.perf_counter() - begin) / calls


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without the garbage collector, which would stop one side for the other's garbage."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
