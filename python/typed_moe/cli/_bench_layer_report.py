"""What `typed-moe bench layer` prints, writes and draws."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

import attrs
import torch
from rich.console import Console
from rich.text import Text

from typed_moe.cli._bench_card import Card
from typed_moe.cli._bench_layer import Block, Cell
from typed_moe.cli._machine import machine_json, machine_rows, version_of
from typed_moe.cli._output import print_facts, print_heading, print_title
from typed_moe.cli._picture import Line, Panel, draw

ABOUT = (
    "median microseconds per call of a whole layer, from float32 logits to the sum, in a CUDA "
    "graph, going round over layers of more than 100 MB; the floor is the larger of bytes over "
    "the copy's rate and operations over the product's rate"
)


def print_card(card: Card, device: torch.device, console: Console) -> None:
    """The report's first lines."""
    print_title(console, "typed-moe bench layer", "")
    print_facts(console, [*machine_rows(device), ("triton", _triton()), *_card_rows(card)])


def _card_rows(card: Card) -> list[tuple[str, str]]:
    return [
        ("copy", f"{card.bytes_per_second / 1e12:.2f} TB/s, read and written"),
        ("bf16", f"{card.bf16_flops / 1e12:.0f} TFLOP/s, {card.width} x {card.width}"),
        ("fp8", f"{card.fp8_flops / 1e12:.0f} TFLOP/s, {card.fp8_source}"),
        ("times", ABOUT),
    ]


def _triton() -> str:
    return version_of("triton") or "not installed"


def print_block(block: Block, console: Console) -> None:
    """One model in one format."""
    print_heading(console, f"{block.shape.name}, {block.format}: {block.shape.sizes}")
    print_facts(console, [*block.about, ("layers", str(block.layers))])
    if not block.cells:
        return
    names = list(dict.fromkeys(cell.side for cell in block.cells if cell.state != "absent"))
    width = max(12, *(len(name) + 2 for name in names)) if names else 12
    columns = "".join(f"{name:>{width}}" for name in names)
    header = (
        f"{'T':>7}{'floor':>10} {'by':<8}{columns}{'share':>8}{'eager':>10}{'MB':>9}{'error':>9}"
    )
    console.print(Text(f"  {header}", style="dim"), soft_wrap=True)
    for tokens in dict.fromkeys(cell.tokens for cell in block.cells):
        cells = {cell.side: cell for cell in block.cells if cell.tokens == tokens}
        console.print(f"  {_row(cells, names, width)}", soft_wrap=True)
    print_facts(
        console,
        [
            (f"T {cell.tokens}", f"{cell.side} {cell.state}: {cell.reason}")
            for cell in block.cells
            if cell.reason and cell.state != "absent"
        ],
    )
    print_facts(
        console,
        [
            (f"T {cell.tokens}, {cell.side}", _launches(cell))
            for cell in block.cells
            if cell.launches
        ],
    )


def _launches(cell: Cell) -> str:
    """The kernels of a call that take a hundredth of it or more."""
    shown = [one for one in cell.launches if one.us >= (cell.us or 0) / 100]
    return ", ".join(
        f"{one.name} {one.us:.1f}" + ("" if one.count == 1 else f" ({one.count:g} times)")
        for one in shown
    )


def _row(cells: dict[str, Cell], names: Sequence[str], width: int) -> str:
    """Every side's time; share, host-launched time, memory and error of the first."""
    first = next(iter(cells.values()))
    times = "".join(f"{_time(cells[name]):>{width}}" for name in names)
    share = "" if first.share is None else f"{first.share:.0%}"
    eager = "" if first.eager_us is None else f"{first.eager_us:.1f}"
    memory = "" if first.peak_bytes is None else f"{first.peak_bytes / 1e6:.1f}"
    error = "" if first.error is None else f"{first.error:.4f}"
    return (
        f"{first.tokens:>7}{first.floor.us:>10.1f} {first.floor.by:<8}{times}{share:>8}{eager:>10}"
        f"{memory:>9}{error:>9}"
    )


def _time(cell: Cell) -> str:
    if cell.us is None:
        return cell.state
    return f"{cell.us:.1f}" + ("" if cell.graph_us is not None else " e")


def layer_json(
    card: Card, device: torch.device, blocks: Sequence[Block], command: str
) -> dict[str, object]:
    """Everything as plain values."""
    return {
        "machine": {**machine_json(device), "triton": version_of("triton")},
        "date": datetime.now(UTC).date().isoformat(),
        "command": command,
        "about": ABOUT,
        "card": attrs.asdict(card),
        "blocks": [
            {
                "model": block.shape.name,
                "about": block.shape.about,
                "sizes": block.shape.sizes,
                "num_experts": block.shape.num_experts,
                "top_k": block.shape.top_k,
                "hidden_size": block.shape.hidden_size,
                "intermediate_size": block.shape.intermediate_size,
                "format": block.format,
                "layers": block.layers,
                "sides": dict(block.about),
                "libraries": dict(block.libraries),
            }
            for block in blocks
        ],
        "rows": [_cell_json(cell) for block in blocks for cell in block.cells],
    }


def _cell_json(cell: Cell) -> dict[str, object]:
    return {
        **attrs.asdict(cell, filter=lambda attribute, _: attribute.name != "floor"),
        "floor_us": cell.floor.us,
        "floor_by": cell.floor.by,
        "share_of_floor": cell.share,
    }


def layer_picture(blocks: Sequence[Block], device: torch.device) -> str:
    """Time against T, log-log, a panel for each model and format."""
    name = str(machine_json(device)["device_name"])
    return draw(
        [_panel(block) for block in blocks],
        title=f"One expert layer on {name}, torch {torch.__version__}",
        x_label="T, tokens",
        y_label="microseconds",
    )


def _panel(block: Block) -> Panel:
    floor = {cell.tokens: cell.floor.us for cell in block.cells}
    lines = [Line(label="floor of this card", points=tuple(floor.items()), limit=True)]
    for side in dict.fromkeys(cell.side for cell in block.cells):
        points = [
            (cell.tokens, cell.us)
            for cell in block.cells
            if cell.side == side and cell.us is not None
        ]
        if points:
            lines.append(Line(label=side, points=tuple(points)))
    return Panel(title=f"{block.shape.name}, {block.format}", lines=tuple(lines))
