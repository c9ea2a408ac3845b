"""The commands and their options."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from typed_moe.cli._bench import bench_overhead
from typed_moe.cli._bench_layer_command import LayerOptions, run_bench_layer
from typed_moe.cli._bench_report import bench_json, print_bench
from typed_moe.cli._bench_routing import ROUTER_NAMES
from typed_moe.cli._bench_routing_command import RoutingOptions, run_bench_routing
from typed_moe.cli._bench_shapes import SHAPE_NAMES
from typed_moe.cli._explain import explain, explain_json, print_explanation
from typed_moe.cli._output import print_json, stdout
from typed_moe.cli._peer import PEERS
from typed_moe.cli._progress import Steps
from typed_moe.cli._run import RunOptions, run
from typed_moe.cli._run_report import print_run, run_json
from typed_moe.cli._sglang import diagnosis_json, doctor, print_diagnosis
from typed_moe.cli._strategies import (
    configs,
    configs_json,
    print_configs,
    print_strategies,
    strategies,
    strategies_json,
)
from typed_moe.cli._tune_command import TuneOptions, run_tune
from typed_moe.cli._verify import read_device, verify
from typed_moe.cli._verify_kernels import KERNELS
from typed_moe.cli._verify_report import print_verify, verify_json
from typed_moe.config import FORMATS
from typed_moe.sglang import Verdict

app = typer.Typer(
    name="typed-moe",
    help="Run and explain the mixture-of-experts layers of real models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(
    name="bench", help="Time what this package adds, and what it runs.", no_args_is_help=True
)
app.add_typer(bench)
sglang = typer.Typer(name="sglang", help="Look at an installed SGLang.", no_args_is_help=True)
app.add_typer(sglang)

_Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A shipped config's name, a config.json, or a folder that has one.",
        show_default=False,
    ),
]
_Quant = Annotated[
    str,
    typer.Option(
        "--quant",
        help=f"Format of weights and activations: {', '.join(FORMATS)}.",
    ),
]
_Layer = Annotated[
    int | None,
    typer.Option("--layer", help="Decoder layer from 0; the first MoE layer.", show_default=False),
]
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


@app.command("run")
def run_command(
    model: _Model,
    quant: _Quant = "bf16",
    tokens: Annotated[int, typer.Option("--tokens", help="Tokens to run; 0 works.")] = 64,
    layer_scale: Annotated[
        float,
        typer.Option(
            "--layer-scale",
            help="Shrink the widths by this, to multiples of 128; routing stays whole.",
        ),
    ] = 1.0,
    layer: _Layer = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--checkpoint",
            help="Folder with the model's safetensors; drawn weights without.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of drawn weights and tokens.")] = 0,
    fused_shared: Annotated[
        bool, typer.Option("--fused-shared", help="Run the shared experts as extra experts.")
    ] = False,
    as_json: _Json = False,
) -> None:
    """Build one MoE layer of a model, run tokens, compare with a float64 oracle.

    Exit status 1 when the error is beyond what the format allows.
    """
    options = RunOptions(
        model=model,
        quant=quant,
        tokens=tokens,
        layer_scale=layer_scale,
        layer=layer,
        checkpoint=checkpoint,
        seed=seed,
        fused_shared=fused_shared,
    )
    report = run(options, Steps())
    if as_json:
        print_json(run_json(report))
    else:
        print_run(report, stdout())
    if not report.comparison.passed:
        raise typer.Exit(1)


@app.command("explain")
def explain_command(model: _Model, quant: _Quant = "bf16", as_json: _Json = False) -> None:
    """Say how a model routes, layer by layer, where each setting is from, and what would run it."""
    explanation = explain(model, quant)
    if as_json:
        print_json(explain_json(explanation))
    else:
        print_explanation(explanation, stdout())


@app.command("strategies")
def strategies_command(as_json: _Json = False) -> None:
    """List every routing strategy: maths, settings, models that use it."""
    found = strategies()
    if as_json:
        print_json(strategies_json(found))
    else:
        print_strategies(found, stdout())


@app.command("configs")
def configs_command(as_json: _Json = False) -> None:
    """List the configs that ship with the package, with their sources."""
    found = configs()
    if as_json:
        print_json(configs_json(found))
    else:
        print_configs(found, stdout())


@app.command("verify")
def verify_command(
    device: Annotated[
        str | None,
        typer.Option(
            "--device", help="cpu, cuda or cuda:N; the GPU where there is one.", show_default=False
        ),
    ] = None,
    kernel: Annotated[
        list[str] | None,
        typer.Option(
            "--kernel",
            help=f"Repeatable: {', '.join(KERNELS)}; all that the device has without.",
            show_default=False,
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Run every strategy, format, routing form and placement that this machine can, and check each.

    Small layers (hidden 256, intermediate 256, 16 experts, 6 tokens), whole and as two tensor- or
    expert-parallel shards in one process, against float64 on the stored weights. On a GPU through
    FlashInfer's kernels and the Triton ones; on a CPU through the reference kernel and, where
    flashinfer is installed, through FlashInfer's own references. About a minute on two CPU cores.

    Exit status 1 when anything is beyond its bound, and when nothing could be run.
    """
    report = verify(read_device(device), Steps(), tuple(kernel or ()))
    if as_json:
        print_json(verify_json(report))
    else:
        print_verify(report, stdout())
    if not report.passed:
        raise typer.Exit(1)


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


@app.command("tune")
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
) -> None:
    """Search the Triton expert kernels' tiles for this GPU, and write them to a file.

    Whole layers are timed over the shapes, formats and T that are asked for. A tile that does not fit the
    card is left out, and so is one whose output is another than the built-in tile's. The file is used
    where TYPED_MOE_TILES names it. Minutes for each T, most of them compiling.
    """
    options = TuneOptions(
        out=out,
        models=tuple(model or ()),
        formats=tuple(quant or ()),
        tokens=tuple(tokens or ()),
    )
    run_tune(options, Steps(), stdout())


@sglang.command("doctor")
def sglang_doctor_command(
    model_path: Annotated[
        Path | None,
        typer.Option(
            "--model-path",
            help="A config.json or a folder with one: that model alone, with its values.",
            show_default=False,
        ),
    ] = None,
    as_json: _Json = False,
) -> None:
    """Say what every model of the installed SGLang routes by, and whether its number agrees.

    Reads SGLang's source files: no GPU, no import of SGLang, a few seconds. Exit status 1 when a
    number is wrong for every config, or for the one that is given.
    """
    found = doctor(model_path)
    if as_json:
        print_json(diagnosis_json(found))
    else:
        print_diagnosis(found, stdout())
    if any(block.verdict is Verdict.WRONG for block in found.blocks):
        raise typer.Exit(1)


def _version(asked: bool) -> None:
    if not asked:
        return
    try:
        version = importlib.metadata.version("typed-moe")
    except importlib.metadata.PackageNotFoundError:
        version = "(from a checkout, not installed)"
    typer.echo(f"typed-moe {version}")
    raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    del version


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point `typed-moe`.

    Args:
        argv: the arguments; None: the process's.

    Returns:
        The exit status: 0, 1 for an error beyond the bound, 2 for the user's mistakes, 130 when
        interrupted.
    """
    try:
        status: object = app(args=argv, prog_name="typed-moe", standalone_mode=False)
    except typer.TyperException as error:
        message = error.format_message()
        if message:
            sys.stderr.write(f"error: {message}\n")
        return error.exit_code
    return status if isinstance(status, int) else 0
