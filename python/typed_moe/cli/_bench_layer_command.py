"""`typed-moe bench layer`: options in, report out, block by block."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import final

import attrs
from rich.console import Console

from typed_moe.cli._bench_card import Card, measure_card
from typed_moe.cli._bench_clock import CudaClocks, cuda_clocks
from typed_moe.cli._bench_layer import Block, LayerBench, bench_layer
from typed_moe.cli._bench_layer_report import layer_json, layer_picture, print_block, print_card
from typed_moe.cli._bench_options import check_writable, read_formats, read_tokens, write_json
from typed_moe.cli._bench_shapes import chosen_shapes
from typed_moe.cli._errors import user_errors
from typed_moe.cli._peer import Ours, sides
from typed_moe.cli._progress import Steps
from typed_moe.config import Bf16, Fp8BlockScale


@final
@attrs.frozen(kw_only=True)
class LayerOptions:
    """The command's options; an empty tuple is the default."""

    models: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    peers: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    json_file: Path | None = None
    picture: Path | None = None
    launches: bool = False


def run_bench_layer(options: LayerOptions, steps: Steps, console: Console) -> bool:
    """Measure, and print each block when it is done.

    Returns:
        Whether this package's layer was right wherever it ran.

    Raises:
        UserError: an option is wrong, or there is no CUDA device.
    """
    shapes = chosen_shapes(options.models)
    formats = read_formats(options.formats, (Bf16(), Fp8BlockScale()))
    tokens = read_tokens(options.tokens)
    named = sides(options.peers, options.kernels)
    check_writable(options.json_file, options.picture)
    clocks = cuda_clocks("bench layer")
    with steps.step("measure the card"):
        card = measure_card(clocks)
    print_card(card, clocks.device, console)
    bench = LayerBench(clocks=clocks, card=card, sides=named, launches=options.launches)
    blocks: list[Block] = []
    for block in bench_layer(bench, shapes, formats, tokens, steps):
        blocks.append(block)
        print_block(block, console)
        # After each: a run that is cut short leaves what it measured.
        _write(options, card, clocks, blocks)
    ours = {Ours().name, *options.kernels}
    return not any(
        cell.side in ours and cell.state in {"wrong", "failed"}
        for block in blocks
        for cell in block.cells
    )


def _write(options: LayerOptions, card: Card, clocks: CudaClocks, blocks: list[Block]) -> None:
    if options.json_file is not None:
        command = shlex.join(["typed-moe", *sys.argv[1:]])
        write_json(options.json_file, layer_json(card, clocks.device, blocks, command))
    if options.picture is not None:
        with user_errors("the picture could not be drawn: "):
            options.picture.write_text(layer_picture(blocks, clocks.device), encoding="utf-8")
