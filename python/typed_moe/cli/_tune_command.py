"""`typed-moe tune`: options in, a file of tiles out, point by point."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import final

import attrs
import torch
from rich.console import Console

from typed_moe.cli._bench_clock import cuda_clocks
from typed_moe.cli._bench_options import check_writable, read_formats, read_tokens, write_json
from typed_moe.cli._bench_shapes import ALL_TOKENS, LayerShape, chosen_shapes
from typed_moe.cli._errors import UserError
from typed_moe.cli._machine import machine_json, machine_rows, version_of
from typed_moe.cli._output import print_facts, print_heading, print_title
from typed_moe.cli._progress import Steps
from typed_moe.cli._tune import Point, Tuner, operand_of, tables_of
from typed_moe.cli._tune_grid import limits_of
from typed_moe.config import Bf16, Format, Fp8BlockScale
from typed_moe.kernels import fused_routing_refusal
from typed_moe.kernels._expert_tiles import ExpertTile, GemmTile
from typed_moe.kernels._tile_file import TILES_VARIABLE, tile_file, tile_file_json

_MODELS = ("qwen3-30b-a3b", "deepseek-v3-32")


@final
@attrs.frozen(kw_only=True)
class TuneOptions:
    """The command's options; an empty tuple is the default."""

    out: Path
    models: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    tokens: tuple[int, ...] = ()
    jobs: int | None = None


def run_tune(options: TuneOptions, steps: Steps, console: Console) -> None:
    """Search, print each point when it is found, and write the file after each.

    Raises:
        UserError: an option is wrong, there is no CUDA device, or it is out of memory.
    """
    shapes = chosen_shapes(options.models or _MODELS)
    formats = read_formats(options.formats, (Bf16(), Fp8BlockScale()))
    for quant in formats:
        operand_of(quant)
    tokens = read_tokens(options.tokens) or ALL_TOKENS
    check_writable(options.out)
    if options.jobs is not None and options.jobs < 1:
        raise UserError(f"--jobs is {options.jobs}; allowed: 1 or more")
    if tile_file() is not None:
        raise UserError(f"unset {TILES_VARIABLE}: tiles are measured beside the built-in ones")
    clocks = cuda_clocks("tune")
    refused = fused_routing_refusal(clocks.device)
    if refused is not None:
        raise UserError(f"tune: {refused.reason}")
    tuner = Tuner(
        clocks=clocks,
        card=torch.cuda.get_device_name(clocks.device),
        limits=limits_of(clocks.device),
        jobs=options.jobs,
    )
    tune(tuner, shapes, formats, tokens, options.out, steps, console)


@torch.no_grad()
def tune(
    tuner: Tuner,
    shapes: Sequence[LayerShape],
    formats: Sequence[Format],
    tokens: Sequence[int],
    out: Path,
    steps: Steps,
    console: Console,
) -> None:
    """Search every shape and format, and write the file after each point.

    Raises:
        UserError: the card is out of memory, or a format is not the kernels'.
    """
    print_title(console, "typed-moe tune", "")
    print_facts(
        console,
        [
            *machine_rows(tuner.clocks.device),
            ("triton", version_of("triton") or "not installed"),
            ("times", "microseconds of a whole layer in a CUDA graph"),
        ],
    )
    points: list[Point] = []
    for shape in shapes:
        for quant in formats:
            print_heading(console, f"{shape.name}, {quant.name}: {shape.sizes}")
            try:
                for point in tuner.points(shape, quant, tokens, steps):
                    points.append(point)
                    print_facts(console, [(f"T {point.tokens}", _said(point))])
                    _write(out, tuner, points)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{shape.name} in {quant.name} does not fit the card's memory "
                    f"({str(error).splitlines()[0]}); choose another --model or --format. What was "
                    f"found before is in {out}"
                    if points
                    else f"{shape.name} in {quant.name} does not fit the card's memory; choose "
                    "another --model or --format"
                ) from error
    print_heading(console, f"{out}: use it with {TILES_VARIABLE}={out}")


def _said(point: Point) -> str:
    gain = point.built_in_us / point.us - 1
    left_out = f"{point.left_out} do not fit, {point.wrong} wrong"
    return (
        f"{point.us:.1f} us, the built-in tile {point.built_in_us:.1f} ({gain:+.0%}); "
        f"{point.rows_per_expert:g} rows per expert: {_tile(point.tile)}; {point.tried} tried, "
        f"{left_out}"
    )


def _tile(tile: ExpertTile) -> str:
    rows = (
        f"{tile.block_m}" if tile.second_block_m is None else f"{tile.block_m}/{tile.second_rows}"
    )
    return f"{rows} rows, first {_gemm(tile.first)}, second {_gemm(tile.second)}"


def _gemm(tile: GemmTile) -> str:
    tma = ", tma" if tile.tma else ""
    return f"{tile.block_n}x{tile.block_k}, {tile.warps} warps, {tile.stages} stages{tma}"


def _write(out: Path, tuner: Tuner, points: Sequence[Point]) -> None:
    """Tables for `TYPED_MOE_TILES`, and what they were made from."""
    write_json(
        out,
        {
            **tile_file_json(tuner.card, tables_of(points)),
            "command": shlex.join(["typed-moe", *sys.argv[1:]]),
            "machine": {**machine_json(tuner.clocks.device), "triton": version_of("triton")},
            "points": [attrs.asdict(point) for point in points],
        },
    )
