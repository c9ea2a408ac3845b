"""The commands that measure: `bench` and `tune`, and their options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from typed_moe.cli._bench import bench_overhead
from typed_moe.cli._bench_layer_command import LayerOptions, run_bench_layer
from typed_moe.cli._bench_report import bench_json, print_bench
from typed_moe.cli._bench_routing import ROUTER_NAMES
from typed_moe.cli._bench_routing_command import RoutingOptions, run_bench_routing
from typed_moe.cli._bench_shapes import SHAPE_NAMES
from typed_moe.cli._output import print_json, stdout
from typed_moe.cli._peer import KERNELS, PEERS
from typed_moe.cli._progress import Steps
from typed_moe.cli._tune_command import TuneOptions, run_tune
from typed_moe.config import FORMATS

bench = typer.Typer(
    name="bench", help="Time what this package adds, and what it runs.", no_args_is_help=True
)

_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
_JsonFile = Annotated[
    Path | None,
    typer.Option("--json", help="Write the report there, as JSON.", show_default=False),
]
_Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        help=f"Repeatable: {', '.join(SHAPE_NAMES)}; all without.",
        show_default=False,
    ),
]
_Tokens = Annotated[
    list[int] | None,
    typer.Option("--tokens", help="T, repeatable; each model's own without.", show_default=False),
]


@bench.command("overhead")
def bench_overhead_command(as_json: _Json = False) -> None:
    """Time a call through a runner and the same call to FlashInfer written out by hand.

    On the host alone: both call the same function, which does nothing, in turns, for T of 1, 8,
    32 and 256 tokens. FlashInfer has to be installed, and needs no GPU. About 20 seconds.
    """
    report = bench_overhead(Steps())
    if as_json:
        print_json(bench_json(report))
    else:
        print_bench(report, stdout())


@bench.command("layer")
def bench_layer_command(
    model: _Shapes = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"Repeatable: {', '.join(FORMATS)}; bf16 and fp8_block without.",
            show_default=False,
        ),
    ] = None,
    tokens: _Tokens = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(
            "--peer",
            help=f"Repeatable: {', '.join(PEERS)}, or none; all without.",
            show_default=False,
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            help=f"Repeatable: {', '.join(KERNELS)}; the plan's choice without. The report of several, "
            "named in TYPED_MOE_TIMES, makes plans choose by it.",
            show_default=False,
        ),
    ] = None,
    json_file: _JsonFile = None,
    picture: Annotated[
        Path | None,
        typer.Option("--picture", help="Draw time against T there, as SVG.", show_default=False),
    ] = None,
    launches: Annotated[
        bool,
        typer.Option("--launches", help="Also the time of each kernel, by PyTorch's profiler."),
    ] = False,
) -> None:
    """Time whole expert layers on this GPU, beside their peers and what the card could do.

    From router logits to the combined output, in CUDA graphs, going round over more than 100 MB of
    weights. Every side is first compared with a float64 oracle; one that is wrong is not timed. The
    floor is from this card's own copy and matrix product, measured first.

    Exit status 1 when this package's layer is wrong or fails anywhere.
    """
    fine = run_bench_layer(
        LayerOptions(
            models=tuple(model or ()),
            formats=tuple(quant or ()),
            tokens=tuple(tokens or ()),
            peers=tuple(peer or ()),
            kernels=tuple(kernel or ()),
            json_file=json_file,
            picture=picture,
            launches=launches,
        ),
        Steps(),
        stdout(),
    )
    if not fine:
        raise typer.Exit(1)


@bench.command("routing")
def bench_routing_command(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help=f"Repeatable: {', '.join(ROUTER_NAMES)}; all without.",
            show_default=False,
        ),
    ] = None,
    tokens: _Tokens = None,
    json_file: _JsonFile = None,
    flashinfer_library: Annotated[
        Path | None,
        typer.Option(
            "--flashinfer-library",
            help="FlashInfer's routing kernels for this card, by python -m tests.conformance.build.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Time the fused routing kernel on this GPU, beside PyTorch's operators and FlashInfer's kernels.

    From logits to ids and weights, and to the slots sorted by expert, in CUDA graphs; with it, what
    float32 logits cost in time and bfloat16 ones in rows whose experts change. Every choice is first
    compared with a float64 oracle on the rows that float32 decides.

    Exit status 1 when the fused kernel is wrong anywhere.
    """
    options = RoutingOptions(
        models=tuple(model or ()),
        tokens=tuple(tokens or ()),
        json_file=json_file,
        flashinfer_library=flashinfer_library,
    )
    if not run_bench_routing(options, Steps(), stdout()):
        raise typer.Exit(1)


def tune_command(
    out: Annotated[Path, typer.Option("--out", help="The file to write.")] = Path("tiles.json"),
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            help=f"Repeatable: {', '.join(SHAPE_NAMES)}; the first two without.",
            show_default=False,
        ),
    ] = None,
    quant: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            help=f"Repeatable: {', '.join(FORMATS)}; bf16 and fp8_block without.",
            show_default=False,
        ),
    ] = None,
    tokens: _Tokens = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            help="Processes that compile; as many as cores and the card's memory have room for.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Search the Triton expert kernels' tiles for this GPU, and write them to a file.

    Whole layers are timed over the shapes, formats and T that are asked for. A tile that does not fit the
    card is left out, and so is one whose output is another than the built-in tile's. The file is used
    where TYPED_MOE_TILES names it. A minute or more for each T,
    most of it compiling.
    """
    options = TuneOptions(
        out=out,
        models=tuple(model or ()),
        formats=tuple(quant or ()),
        tokens=tuple(tokens or ()),
        jobs=jobs,
    )
    run_tune(options, Steps(), stdout())
