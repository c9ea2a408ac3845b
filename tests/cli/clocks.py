"""Clocks that make every call and say what they are told to, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch

from typed_moe.cli._bench_clock import Call, Launch

GRAPH_US, EAGER_US, PEAK_BYTES = 100.0, 250.0, 12345
LAUNCHES = (
    Launch(name="first_kernel", us=60.0, count=1),
    Launch(name="fill", us=30.0, count=2),
    Launch(name="small", us=0.1, count=1),
)


@attrs.define(kw_only=True)
class ToldClocks:
    """Every call takes 100 microseconds in a graph, and 250 without."""

    device: torch.device = attrs.field(factory=lambda: torch.device("cpu"))
    graphs: int = 0
    no_graph: str | None = None

    def graph(self, calls: Sequence[Call], /) -> float:
        for call in calls:
            call()
        if self.no_graph is not None and len(calls) > 4:
            raise RuntimeError(self.no_graph)
        self.graphs += 1
        return GRAPH_US

    def eager(self, calls: Sequence[Call], /) -> float:
        for call in calls:
            call()
        return EAGER_US

    def peak_bytes(self, call: Call, /) -> int:
        call()
        return PEAK_BYTES

    def launches(self, calls: Sequence[Call], /) -> tuple[Launch, ...]:
        return LAUNCHES
