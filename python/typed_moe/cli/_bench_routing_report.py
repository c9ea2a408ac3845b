"""What `typed-moe bench routing` prints and writes."""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import torch
from rich.console import Console
from rich.text import Text

from typed_moe.cli._bench_routing import WAYS, RoutingRow
from typed_moe.cli._machine import machine_json, machine_rows, version_of
from typed_moe.cli._output import print_facts, print_heading, print_title

_ABOUT = (
    "microseconds per call: a CUDA graph of 20 calls is replayed, the median of its replays over 20"
)
_WIDTH = 16


def print_routing_head(device: torch.device, console: Console) -> None:
    """The report's first lines: the machine, and what the columns are."""
    print_title(console, "typed-moe bench routing", "")
    print_facts(
        console,
        [
            *machine_rows(device),
            ("triton", version_of("triton") or "not installed"),
            ("times", _ABOUT),
            *WAYS,
            ("changed", "rows whose set of experts is another from bfloat16 logits"),
        ],
    )


def print_routing_row(row: RoutingRow, console: Console, *, first: bool) -> None:
    """One T; before a router's first one, what it is."""
    if first:
        print_heading(
            console, f"{row.model}: {row.strategy}, {row.num_experts} experts, top_k {row.top_k}"
        )
        columns = "".join(f"{way:>{_WIDTH}}" for way, _ in WAYS)
        console.print(Text(f"  {'T':>6}{columns}{'changed':>9}", style="dim"), soft_wrap=True)
    times = "".join(f"{_time(row, way):>{_WIDTH}}" for way, _ in WAYS)
    changed = "" if row.rows_changed_by_bf16 is None else str(row.rows_changed_by_bf16)
    console.print(f"  {row.tokens:>6}{times}{changed:>9}", soft_wrap=True)
    said: dict[str, list[str]] = {}
    for way, reason in row.reasons.items():
        said.setdefault(reason, []).append(way)
    print_facts(console, [(f"T {row.tokens}", f"{', '.join(w)}: {r}") for r, w in said.items()])


def _time(row: RoutingRow, way: str) -> str:
    for name, us in row.us.items():
        if name == way:
            return f"{us:.1f}"
    return "-"


def routing_json(
    device: torch.device, rows: Sequence[RoutingRow], command: str
) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "machine": {**machine_json(device), "triton": version_of("triton")},
        "command": command,
        "about": _ABOUT,
        "ways": dict(WAYS),
        "rows": [attrs.asdict(row) for row in rows],
    }
