"""SGLang's FusedMoE on this machine's GPU: SGLang's Triton runner beside `--moe-runner-backend typed_moe`.

    python -m tests.sglang.bench_h100 [--json FILE] [--tokens T ...] [--formats bf16 fp8_block]

One process, SGLang's own layer, quantisation methods and TopK, Qwen3-30B-A3B's shape. Three ways of
one block, from router logits to the sum over a token's experts:

* `sglang`: its TopK, and its Triton runner;
* `typed_moe`: its TopK hands the logits on, and our layer routes;
* `typed_moe, ids`: its TopK routes, as in the first, and our layer is given ids and weights.

First all of them against float64 on the stored values (relative error, and the format's bound for it),
then microseconds per call in a CUDA graph, going round over layers whose weights the L2 cache does not
hold. Beside it: whether a softmax router's correction bias reaches SGLang's gate on CUDA.

Exits with 1 where one of ours is out of the bound.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

import attrs
import torch
from torch import Tensor

from tests import oracle
from tests.layer.build import relative_error
from tests.quantization import grids
from tests.sglang import host
from typed_moe import Bf16, Fp8BlockScale
from typed_moe.cli._bench_clock import cuda_clocks
from typed_moe.cli._bench_weights import ROTATED_BYTES
from typed_moe.quantization import stored_error_bound
from typed_moe.sglang import plans_of

Format = Literal["bf16", "fp8_block"]
Way = Literal["sglang", "typed_moe", "typed_moe, ids"]
Sglang = Any  # type: ignore[explicit-any]  # SGLang's objects, which are not typed here
Row = dict[str, float | int | str]

FORMATS: tuple[Format, ...] = ("bf16", "fp8_block")
WAYS: tuple[Way, ...] = ("sglang", "typed_moe", "typed_moe, ids")
BACKENDS: Mapping[Way, str] = {
    "sglang": "triton",
    "typed_moe": "typed_moe",
    "typed_moe, ids": "typed_moe",
}
"""`--moe-runner-backend` of each."""
TOKENS = (1, 8, 64, 512, 4096)
BOUNDS: Mapping[Format, float] = {
    "bf16": stored_error_bound(Bf16()),
    "fp8_block": stored_error_bound(Fp8BlockScale()),
}
RULE = oracle.RULES["RenormalizeNaive"]
TILE = 128


@attrs.frozen(kw_only=True)
class Shape:
    """A layer's numbers."""

    num_experts: int = 128
    top_k: int = 8
    hidden_size: int = 2048
    intermediate_size: int = 768


QWEN3_30B_A3B = Shape()


@attrs.frozen(kw_only=True, eq=False)
class Stored:
    """The tensors of a checkpoint's layer, by SGLang's names."""

    shape: Shape
    quant: Format
    tensors: Mapping[str, Tensor]

    @cached_property
    def worth(self) -> oracle.Experts:
        """What they mean, on the CPU."""
        first, second = (self._decoded(name) for name in ("w13", "w2"))
        gate, up = first.chunk(2, dim=1)
        return oracle.Experts(gate=gate, up=up, down=second)

    def _decoded(self, name: str) -> Tensor:
        values = self.tensors[f"{name}_weight"].cpu().double()
        if self.quant == "bf16":
            return values
        scale = self.tensors[f"{name}_weight_scale_inv"].cpu().double()
        return values * scale.repeat_interleave(TILE, dim=1).repeat_interleave(TILE, dim=2)

    def rounding(self, values: Tensor) -> Tensor:
        """(n, width) float64: what the format stores of activations."""
        if self.quant == "bf16":
            return values.bfloat16().double()
        groups = values.double().reshape(-1, TILE)
        scale = groups.abs().amax(dim=1, keepdim=True) / 448
        return (grids.nearest(groups / scale, grids.E4M3) * scale).reshape(values.shape)

    def expected(self, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """(T, H) float64, and the rows (T,) whose experts float32 arithmetic cannot mistake."""
        routing = oracle.route(RULE, logits.cpu(), None, self.shape.top_k)
        output = oracle.moe(
            self.worth,
            self.rounding(x.cpu()),
            routing.ids,
            routing.weights,
            oracle.Act(),
            rounding=self.rounding,
        )
        return output, routing.decided


def stored(shape: Shape, quant: Format, seed: int, device: str) -> Stored:
    """Random weights, of the size that trained ones have."""
    generator = torch.Generator(device=device).manual_seed(seed)
    experts, hidden, width = shape.num_experts, shape.hidden_size, shape.intermediate_size
    tensors: dict[str, Tensor] = {}
    for name, rows, columns in (("w13", 2 * width, hidden), ("w2", hidden, width)):
        kind = torch.bfloat16 if quant == "bf16" else torch.float8_e4m3fn
        data = torch.empty(experts, rows, columns, dtype=kind, device=device)
        for part in data:
            normal = torch.randn(rows, columns, device=device, generator=generator)
            part.copy_(normal * 0.02 if quant == "bf16" else (normal * 64).clamp_(-448, 448))
        tensors[f"{name}_weight"] = data
        if quant == "fp8_block":
            size = (experts, rows // TILE, columns // TILE)
            powers = torch.randn(*size, device=device, generator=generator).mul_(0.5).exp2_()
            tensors[f"{name}_weight_scale_inv"] = powers * 2.0**-12
    return Stored(shape=shape, quant=quant, tensors=tensors)


def inputs(shape: Shape, tokens: int, device: str) -> tuple[Tensor, Tensor]:
    """hidden_states (T, H) in bfloat16 and float32 logits (T, E)."""
    generator = torch.Generator().manual_seed(tokens)
    hidden = torch.randn(tokens, shape.hidden_size, generator=generator)
    logits = torch.randn(tokens, shape.num_experts, generator=generator)
    return hidden.bfloat16().to(device), logits.to(device)


@attrs.frozen(kw_only=True, eq=False)
class Block:
    """SGLang's TopK and FusedMoE, bound to each other as its models do it."""

    topk: Sglang
    experts: Sglang

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        routed = self.topk(hidden_states, router_logits)
        output: Tensor = self.experts(hidden_states, routed)
        return output


def blocks(weights: Stored, layer_id: int, device: str) -> dict[Way, Block]:
    """The three ways; the two of ours are two TopKs of one layer."""
    found: dict[Way, Block] = {}
    # Without a number SGLang's TopK leaves the routing to nobody.
    for ways in ({"sglang": "Renormalize"}, {"typed_moe": "Renormalize", "typed_moe, ids": None}):
        host.publish(BACKENDS[cast("Way", next(iter(ways)))], device)
        layer = _layer(weights, layer_id, device)
        for way, method in ways.items():
            found[cast("Way", way)] = _bound(weights.shape, layer, method, layer_id)
        layer.quant_method.process_weights_after_loading(layer)
    return found


def _layer(weights: Stored, layer_id: int, device: str) -> Sglang:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    shape = weights.shape
    quant_config = None
    if weights.quant == "fp8_block":
        quant_config = Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=[TILE, TILE],
        )
    with torch.device(device):
        layer = FusedMoE(
            num_experts=shape.num_experts,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            layer_id=layer_id,
            top_k=shape.top_k,
            params_dtype=torch.bfloat16,
            quant_config=quant_config,
            # The input is used again.
            inplace=False,
            prefix=f"model.layers.{layer_id}.mlp.experts",
        )
    parameters = dict(layer.named_parameters())
    assert parameters.keys() >= weights.tensors.keys(), sorted(parameters)
    for name, tensor in weights.tensors.items():
        parameters[name].data.copy_(tensor)
    return layer


def _bound(shape: Shape, experts: Sglang, method: str | None, layer_id: int) -> Block:
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.moe.utils import RoutingMethodType

    topk = TopK(shape.top_k, layer_id=layer_id, renormalize=True)
    number = None if method is None else RoutingMethodType[method]
    topk.bind_runner_backend(experts.runner_backend, routing_method_type=number)
    return Block(topk=topk, experts=experts)


def errors(weights: Stored, built: Mapping[Way, Block], tokens: int, device: str) -> Row:
    """Every way's |output - exact| / |exact|, over the rows that have one right answer."""
    x, logits = inputs(weights.shape, tokens, device)
    exact, decided = weights.expected(x, logits)
    row: Row = {"decided_rows": int(decided.sum())}
    for way, block in built.items():
        host.publish(BACKENDS[way], device)
        got = block(x.clone(), logits).cpu()
        row[f"{way}: error"] = relative_error(got[decided], exact[decided])
    return row


def times(built: Sequence[Mapping[Way, Block]], shape: Shape, tokens: int) -> Row:
    """Every way's microseconds per call, round over the layers."""
    x, logits = inputs(shape, tokens, "cuda")
    row: Row = {}
    for way in WAYS:
        host.publish(BACKENDS[way], "cuda")
        calls = [partial(layer[way], x, logits) for layer in built]
        for call in calls:
            call()
        clocks = cuda_clocks("this bench")
        row[f"{way}: us"] = clocks.graph(cast("list[Callable[[], object]]", calls))
    return row


def layers_for(shape: Shape, quant: Format) -> int:
    """So many that more than 100 MB are read between two readings of one expert, also at T = 1."""
    values = 3 * shape.hidden_size * shape.intermediate_size
    return 2 + int(ROTATED_BYTES / (values * shape.top_k * (2 if quant == "bf16" else 1)))


def rows(quant: Format, tokens: Sequence[int]) -> Iterator[Row]:
    """All numbers of tokens of one format."""
    shape = QWEN3_30B_A3B
    several = [stored(shape, quant, seed, "cuda") for seed in range(layers_for(shape, quant))]
    built = [blocks(weights, number, "cuda") for number, weights in enumerate(several)]
    for plan in plans_of(built[0]["typed_moe"].experts):
        print(plan, file=sys.stderr)
    for count in tokens:
        yield {
            "format": quant,
            "tokens": count,
            "bound": BOUNDS[quant],
            **errors(several[0], built[0], count, "cuda"),
            **times(built, shape, count),
        }


def bias_on_this_device(device: str, tokens: int = 512) -> Row:
    """How many tokens SGLang's TopK sends to the experts of softmax plus bias, and of softmax alone."""
    from sglang.srt.layers.moe.topk import TopK

    shape = QWEN3_30B_A3B
    _, logits = inputs(shape, tokens, device)
    bias = torch.randn(shape.num_experts, generator=torch.Generator().manual_seed(1)) * 0.05
    topk = TopK(shape.top_k, layer_id=0, renormalize=True, correction_bias=bias.to(device))
    topk.bind_runner_backend(None)
    ids = topk(torch.zeros(tokens, 8, device=device), logits).topk_ids.cpu().sort(dim=1).values
    row: Row = {"tokens": tokens}
    for name, rule in (
        ("softmax plus bias", oracle.Rule(rank="softmax", weigh="softmax", biased=True)),
        ("softmax alone", oracle.Rule(rank="softmax", weigh="softmax")),
    ):
        right = oracle.route(rule, logits.cpu(), bias if rule.biased else None, shape.top_k)
        row[name] = int((right.ids.sort(dim=1).values == ids).all(dim=1).sum())
    return row


def machine() -> str:
    """What the numbers are of."""
    packages = ("sglang", "sglang-kernel", "triton", "flashinfer-python")
    versions = [f"{name} {_version(name)}" for name in packages]
    return ", ".join(
        [
            torch.cuda.get_device_name(),
            f"torch {torch.__version__}",
            *versions,
            f"Python {platform.python_version()}",
        ]
    )


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


def show(found: Sequence[Row]) -> None:
    """The table."""
    columns = ["format", "tokens", "bound"]
    columns += [f"{way}: {what}" for what in ("error", "us") for way in WAYS]
    print("\t".join([*columns, "sglang / typed_moe"]))
    for row in found:
        ratio = float(row["sglang: us"]) / float(row["typed_moe: us"])
        cells = [row[name] for name in columns]
        print("\t".join(_cell(value) for value in [*cells, ratio]))


def _cell(value: float | str) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.5f}" if value < 0.1 else f"{value:.2f}"


def load_plugin() -> None:
    """As SGLang's start-up does: by its entry point."""
    from sglang.srt.plugins import load_plugins

    from typed_moe.sglang import active_plugin

    load_plugins()
    if active_plugin() is None:
        raise SystemExit("SGLang has not found the plugin typed_moe by its entry point")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; there is none on this machine")
    logging.basicConfig(level=logging.INFO)  # SGLang says which table of tiles it takes
    host.publish("triton", "cuda")
    load_plugin()
    importlib.import_module("sglang.srt.layers.moe.fused_moe_triton.layer")
    print(machine())
    bias = bias_on_this_device("cuda")
    print("a softmax router's bias:", json.dumps(bias))
    found: list[Row] = []
    for quant in options.formats:
        for row in rows(quant, options.tokens):
            found.append(row)
            print(json.dumps(row), flush=True)
        torch.cuda.empty_cache()
    show(found)
    if options.json is not None:
        report = {"machine": machine(), "bias": bias, "rows": found}
        options.json.write_text(json.dumps(report, indent=1))
    out = [
        row
        for row in found
        if max(float(row[f"{way}: error"]) for way in WAYS[1:]) > float(row["bound"])
    ]
    if out:
        raise SystemExit(f"out of the bound: {out}")


if __name__ == "__main__":
    with torch.no_grad():
        main()
