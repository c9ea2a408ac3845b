"""How a call is timed on a CUDA device, checked on garbage, and what memory it takes."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, final

import attrs
import torch
from torch.profiler import ProfilerActivity

from typed_moe.cli._errors import UserError

Call = Callable[[], object]
"""One call of whatever is timed."""

_WARM_CALLS = 2
_NAME = 60  # characters of a kernel's name
_LEAST_REPLAYS, _MOST_REPLAYS = 5, 30
_SECONDS = 1.0
"""Of replays per time: a long call is repeated less often."""


@final
@attrs.frozen(kw_only=True)
class Launch:
    """One kernel's part of a call.

    Attributes:
        name: of the kernel, cut short.
        us: microseconds per call, all its launches together.
        count: launches per call.
    """

    name: str
    us: float
    count: float


class Clocks(Protocol):
    """**Protocol:** a device's two clocks, and what its memory did."""

    @property
    def device(self) -> torch.device:
        """That they time."""
        ...

    def graph(self, calls: Sequence[Call], /) -> float:
        """Median microseconds per call in a CUDA graph: the device's time alone."""
        ...

    def eager(self, calls: Sequence[Call], /) -> float:
        """The same, each call launched by the host."""
        ...

    def peak_bytes(self, call: Call, /) -> int:
        """Memory that a call takes beyond what was there before, its result included."""
        ...

    def launches(self, calls: Sequence[Call], /) -> tuple[Launch, ...]:
        """The device's time in each kernel, the longest first."""
        ...


@final
@attrs.frozen(kw_only=True)
class CudaClocks:
    """CUDA's events around CUDA's graphs."""

    device: torch.device

    def graph(self, calls: Sequence[Call], /) -> float:
        """A graph of all calls, replayed; the median of its replays over the number of calls."""
        with torch.cuda.device(self.device):
            _warm(calls)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
            return _median(graph.replay, len(calls))

    def eager(self, calls: Sequence[Call], /) -> float:
        """The calls one after the other, as a program without graphs makes them."""
        with torch.cuda.device(self.device):
            _warm(calls)

            def all_of_them() -> None:
                for call in calls:
                    call()

            return _median(all_of_them, len(calls))

    def peak_bytes(self, call: Call, /) -> int:
        """By PyTorch's allocator, after one call that has warmed up."""
        _warm((call,))
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        kept = call()
        torch.cuda.synchronize(self.device)
        peak = torch.cuda.max_memory_allocated(self.device) - before
        del kept
        return peak

    def launches(self, calls: Sequence[Call], /) -> tuple[Launch, ...]:
        """By PyTorch's profiler, of calls that the host launches: without the gaps in between."""
        _warm(calls)
        with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for call in calls:
                call()
            torch.cuda.synchronize(self.device)
        found = [
            Launch(
                name=event.key[:_NAME],
                us=float(event.self_device_time_total) / len(calls),
                count=event.count / len(calls),
            )
            for event in profiler.key_averages()
            if event.self_device_time_total > 0
        ]
        return tuple(sorted(found, key=lambda launch: -launch.us))


def _warm(calls: Sequence[Call]) -> None:
    """What a first call compiles or allocates is no part of a time."""
    for call in (*calls, *calls[:_WARM_CALLS]):
        call()
    torch.cuda.synchronize()


def _median(run: Callable[[], None], calls: int) -> float:
    """Median microseconds per call of a run of so many."""
    first = _milliseconds(run)
    replays = round(_SECONDS * 1000 / max(first, 1e-3))
    replays = min(max(replays, _LEAST_REPLAYS), _MOST_REPLAYS)
    return statistics.median(_milliseconds(run) for _ in range(replays)) * 1000 / calls


def _milliseconds(run: Callable[[], None]) -> float:
    start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill with NaN what `torch.empty` gives, so that nothing left over passes for a result."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    # Fills are part of it; that some operator has no deterministic form is nothing to say here.
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(mode=before, warn_only=only_warned)


def cuda_clocks(command: str) -> CudaClocks:
    """The current CUDA device's.

    Raises:
        UserError: there is none.
    """
    if not torch.cuda.is_available():
        raise UserError(
            f"{command} runs on a CUDA device; this torch ({torch.__version__}) sees none. Run it "
            "on a machine with a GPU and a torch build for it"
        )
    return CudaClocks(device=torch.device("cuda", torch.cuda.current_device()))
