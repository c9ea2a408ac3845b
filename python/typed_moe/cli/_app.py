"""The commands and their options."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from typed_moe.cli._app_bench import bench, tune_command
from typed_moe.cli._explain import explain, explain_json, print_explanation
from typed_moe.cli._output import print_json, stdout
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


app.command("tune")(tune_command)


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
