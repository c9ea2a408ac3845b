"""`typed-moe bench routing`: options in, report out, row by row."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import final

import attrs
import torch
from rich.console import Console

from typed_moe.cli._bench_clock import Call, Launch, cuda_clocks
from typed_moe.cli._bench_options import check_writable, read_tokens, write_json
from typed_moe.cli._bench_routing import TOKENS, RoutingRow, bench_routing, chosen_routers
from typed_moe.cli._bench_routing_report import (
    print_routing_head,
    print_routing_row,
    routing_json,
)
from typed_moe.cli._progress import Steps
from typed_moe.cli._routing_library import FlashInferRouting


@final
@attrs.frozen(kw_only=True)
class RoutingOptions:
    """The command's options; an empty tuple is the default."""

    models: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    json_file: Path | None = None
    flashinfer_library: Path | None = None


def run_bench_routing(options: RoutingOptions, steps: Steps, console: Console) -> bool:
    """Measure, and print each row when it is done.

    Returns:
        Whether the fused kernel was right everywhere.

    Raises:
        UserError: an option is wrong, or there is no CUDA device.
    """
    routers = chosen_routers(options.models)
    tokens = read_tokens(options.tokens) or TOKENS
    check_writable(options.json_file)
    clocks = cuda_clocks("bench routing")
    library = None
    if options.flashinfer_library is not None:
        library = FlashInferRouting(options.flashinfer_library)
    with steps.step("compile"):
        compile_first(tuple(router.name for router in routers), tokens)
    print_routing_head(clocks.device, console)
    rows: list[RoutingRow] = []
    for row in bench_routing(clocks, routers, tokens, library, steps):
        print_routing_row(row, console, first=not rows or rows[-1].model != row.model)
        rows.append(row)
        if options.json_file is not None:
            command = shlex.join(["typed-moe", *sys.argv[1:]])
            write_json(options.json_file, routing_json(clocks.device, rows, command))
    return not any("route" in row.reasons for row in rows)


def compile_first(names: tuple[str, ...], tokens: tuple[int, ...]) -> None:
    """Call every kernel once in processes side by side, so that Triton finds it on disk later."""
    jobs = min(len(names), max(1, (os.cpu_count() or 1) // 2))
    if jobs == 1:
        return
    with ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        list(pool.map(partial(_compile, tokens=tokens), names))


@final
@attrs.frozen(kw_only=True)
class _Once:
    """No clock: a call is made for what it compiles."""

    device: torch.device

    def graph(self, calls: Sequence[Call], /) -> float:
        """The first call."""
        calls[0]()
        return 0.0

    def eager(self, calls: Sequence[Call], /) -> float:
        """The first call."""
        return self.graph(calls)

    def peak_bytes(self, call: Call, /) -> int:
        """The call."""
        call()
        return 0

    def launches(self, calls: Sequence[Call], /) -> tuple[Launch, ...]:
        """The first call."""
        self.graph(calls)
        return ()


def _compile(name: str, *, tokens: tuple[int, ...]) -> None:
    once = _Once(device=torch.device("cuda"))
    for _ in bench_routing(once, chosen_routers((name,)), tokens, None, Steps()):
        pass
