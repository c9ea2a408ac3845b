"""The error of every format against float64, as the table in docs/formats.md shows it.

    python docs/examples/format_table.py qwen3-30b-a3b 1.0 deepseek-v3 0.25

Arguments: models, each with the scale of its widths. Every figure is what `typed-moe run` says.
"""

from __future__ import annotations

import json
import subprocess
import sys

FORMATS = (
    "bf16",
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_block",
    "mxfp8",
    "nvfp4",
    "mxfp4",
    "mxint4",
)


def report(model: str, scale: str, quant: str) -> str:
    """One row: the layer, and its error beside what the format allows."""
    command = [sys.executable, "-m", "typed_moe", "run", model, "--layer-scale", scale]
    command += ["--quant", quant, "--tokens", "64", "--json"]
    told = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    accuracy, shape = told["accuracy"], f"{told['num_experts']} / {told['top_k']}"
    widths = f"{told['hidden_size']} / {told['intermediate_size']}"
    return (
        f"| {model} | {shape} | {widths} | {quant} | {accuracy['relative_error']:.4f} | "
        f"{accuracy['bound']:.4f} | {accuracy['rows_with_other_experts']} |"
    )


def main() -> None:
    """Run every format on every model named."""
    print("| model | E / top_k | H / I | format | relative error | bound | rows routed otherwise |")
    print("|---|---|---|---|---|---|---|")
    for model, scale in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        for quant in FORMATS:
            print(report(model, scale, quant), flush=True)


if __name__ == "__main__":
    main()
