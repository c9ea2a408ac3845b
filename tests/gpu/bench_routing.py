"""Routing times on this machine's GPU, in CUDA graphs: the fused kernel, its parts, and its peers.

    python -m tests.gpu.bench_routing [--json FILE] [--flashinfer-library FILE] [--sweep]

Microseconds per call: a graph of CALLS calls one after the other is replayed, and the median of
its replays divided by CALLS. Every side is captured and timed alike, in one process, on the same
logits. `--sweep` times the fused kernel's tiles instead, from which the launch table is made.

First every model is called once in a process of its own, all at the same time, so that Triton's
compilations are on disk when the clock starts.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Protocol, cast, final

import attrs
import torch
from torch import Tensor

from tests.conformance import kernels
from typed_moe import (
    BiasRule,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Refused,
    Renormalize,
    RenormalizeNaive,
    RoutingShape,
    RoutingStrategy,
    SigmoidRenorm,
    SqrtSoftplus,
)
from typed_moe.kernels import FusedRouting, SortRequest, fused_routing, sort_slots
from typed_moe.kernels.reference import REFERENCE_RULES

CALLS = 20
REPLAYS = 30
Row = dict[str, float | int | str]
"""One line of a table."""
BLOCK = 64
TOKENS = (1, 8, 64, 512, 4096, 16384)


@attrs.frozen(kw_only=True)
class Model:
    """A router's shape."""

    name: str
    strategy: RoutingStrategy
    num_experts: int
    top_k: int

    @property
    def shape(self) -> RoutingShape:
        """E and k."""
        return RoutingShape(num_experts=self.num_experts, top_k=self.top_k)


MODELS = (
    Model(name="Qwen3-30B-A3B", strategy=RenormalizeNaive(), num_experts=128, top_k=8),
    Model(name="Qwen3-Next-80B-A3B", strategy=RenormalizeNaive(), num_experts=512, top_k=10),
    Model(
        name="DeepSeek-V3",
        strategy=DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
        num_experts=256,
        top_k=8,
    ),
    Model(
        name="Kimi-K2",
        strategy=DeepSeekV3(routed_scaling_factor=2.827),
        num_experts=384,
        top_k=8,
    ),
    Model(name="Llama4-Scout", strategy=Llama4(), num_experts=16, top_k=1),
    Model(name="Llama4-Maverick", strategy=Llama4(), num_experts=128, top_k=1),
    Model(name="gpt-oss-120b", strategy=Renormalize(), num_experts=128, top_k=4),
    Model(name="GLM-4.5-Air", strategy=DeepSeekV3(), num_experts=128, top_k=8),
    Model(name="OLMoE-1B-7B", strategy=Default(), num_experts=64, top_k=8),
    Model(name="MiniMax-M2", strategy=MiniMax2(), num_experts=256, top_k=8),
    Model(
        name="DeepSeek-V2",
        strategy=GroupedSoftmax(
            num_expert_group=8,
            topk_group=3,
            group_score="max",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
        ),
        num_experts=160,
        top_k=6,
    ),
    Model(name="DeepSeek-V4 shape", strategy=SqrtSoftplus(), num_experts=256, top_k=6),
    Model(name="sigmoid, renormalised", strategy=SigmoidRenorm(), num_experts=128, top_k=8),
    Model(name="2048 experts", strategy=Renormalize(), num_experts=2048, top_k=32),
)
"""The issue's shapes, one of every other method, and the largest size."""


def inputs(model: Model, tokens: int) -> tuple[Tensor, Tensor | None]:
    """float32 logits (T, E) and the bias (E,), if it reads one."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    logits = 2.0 * torch.randn(tokens, model.num_experts, device="cuda", generator=generator)
    bias = 0.1 * torch.randn(model.num_experts, device="cuda", generator=generator)
    return logits, bias if model.strategy.bias is BiasRule.REQUIRED else None


Clock = Callable[[Callable[[], object]], float]
"""Microseconds of a call."""


def once(call: Callable[[], object]) -> float:
    """No clock: called once, for what it compiles."""
    call()
    return 0.0


def in_graph(call: Callable[[], object]) -> float:
    """Median microseconds per call."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for _ in range(CALLS)]
    times = []
    for _ in range(REPLAYS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds = float(start.elapsed_time(end))
        times.append(milliseconds * 1000.0 / CALLS)
    del kept
    return statistics.median(times)


def made(model: Model) -> FusedRouting:
    """The model's strategy on the fused kernel, with logits of any dtype."""
    strategy = model.strategy
    if isinstance(strategy, DeepSeekV3):
        strategy = attrs.evolve(strategy, router_logits_dtype=None)
    fused = fused_routing(strategy, shape=model.shape, device=torch.device("cuda"))
    if isinstance(fused, Refused):
        raise SystemExit(f"{model.name}: {fused.reason}")
    return fused


class _Built(Protocol):
    def trtllm_gen_routing(self, *arguments: object) -> object: ...


@final
class FlashInfer:
    """FlashInfer's routing kernels, called through its Python and then, to be timed, without it.

    Its Python makes the expert ids from the permutation in several launches of PyTorch's own, which
    a fused layer does not need. So it is called once; the library's own call, with the tensors that
    it was given, is what is timed: the choice of experts, the weights and the permutation.
    """

    def __init__(self, library: Path) -> None:
        self._built = cast("_Built", importlib.import_module("tvm_ffi").load_module(str(library)))
        self._arguments: tuple[object, ...] = ()
        self.kernel = kernels.over(self)

    def trtllm_gen_routing(self, *arguments: object) -> object:
        """What FlashInfer's Python calls."""
        self._arguments = arguments
        return self._built.trtllm_gen_routing(*arguments)

    def call(self, model: Model, logits: Tensor, bias: Tensor | None) -> Callable[[], object] | str:
        """The library's call for these rows, or its refusal."""
        told = model.strategy.in_kernel(model.shape, REFERENCE_RULES)
        if isinstance(told, Refused):
            return "no such method"
        if bias is not None and (told.n_group or 1) > 1:
            bias = bias.bfloat16()
        try:
            self.kernel(told, logits, bias, model.top_k)
            torch.cuda.synchronize()
        except RuntimeError as refused:
            return str(refused).strip().splitlines()[-1]
        arguments = self._arguments
        return lambda: self._built.trtllm_gen_routing(*arguments)


def row(model: Model, tokens: int, peer: FlashInfer | None, clock: Clock) -> Row:
    """Every side's time for one shape and T."""
    logits, bias = inputs(model, tokens)
    half = logits.bfloat16()
    tiles = Tiles(fused=made(model), clock=clock)
    fused, strategy = tiles.fused, model.strategy
    request = SortRequest(first_local=0, num_local=model.num_experts, block_size=BLOCK)
    ids = fused(logits, bias).topk_ids
    usual = tiles.usual(tokens)

    def topk_softmax() -> object:
        return torch.softmax(torch.topk(logits, model.top_k, dim=-1).values, dim=-1)

    def select_experts() -> object:
        return strategy.select_experts(logits, bias, shape=model.shape)

    timed: Row = {
        "model": model.name,
        "strategy": strategy.name,
        "num_experts": model.num_experts,
        "top_k": model.top_k,
        "tokens": tokens,
        "route": clock(lambda: fused(logits, bias)),
        "route_bf16": clock(lambda: fused(half, bias)),
        "route_and_slots": clock(lambda: fused.with_slots(logits, bias, request)),
        "other_overlap": tiles.time(
            (logits, bias), request, **(usual | {"overlap": not usual["overlap"]})
        ),
        "sort_slots": clock(lambda: sort_slots(ids, request)),
        "topk_softmax": clock(topk_softmax),
        "select_experts": clock(select_experts),
        "rows_changed_by_bf16": _changed(fused(half, bias).topk_ids, ids),
    }
    if peer is not None:
        call = peer.call(model, logits, bias)
        timed["flashinfer_kernels"] = call if isinstance(call, str) else clock(call)
    return timed


def _changed(first: Tensor, second: Tensor) -> int:
    """Rows whose sets of experts differ."""
    return int((first.sort(1).values != second.sort(1).values).any(1).sum())


def _launch() -> ModuleType:
    """The launch module, which needs Triton."""
    return importlib.import_module("typed_moe.kernels._triton_launch")


@attrs.frozen(kw_only=True)
class Tiles:
    """One model's calls with any tile."""

    fused: FusedRouting
    clock: Clock

    def usual(self, tokens: int) -> dict[str, int]:
        """The launch table's tile."""
        return dict(attrs.asdict(vars(_launch())["tile_of"](self.fused.settings, tokens)))

    def time(
        self, given: tuple[Tensor, Tensor | None], request: SortRequest | None, **tile: int
    ) -> float:
        """Microseconds with this tile."""
        route, chosen = vars(_launch())["route"], vars(_launch())["Tile"](**tile)
        return self.clock(lambda: route(self.fused.settings, *given, request, chosen))


SWEPT = ("Qwen3-30B-A3B", "DeepSeek-V3", "Qwen3-Next-80B-A3B")


def sweep(model: Model, clock: Clock) -> Iterator[Row]:
    """One model: rows per program, one launch or two, overlapping or not."""
    tiles = Tiles(fused=made(model), clock=clock)
    request = SortRequest(first_local=0, num_local=model.num_experts, block_size=BLOCK)
    for tokens, warps in itertools.product((2, 4, 8, 16), (2, 4, 8)):
        tile = {"rows": tokens, "warps": tokens, "whole": tokens, "whole_warps": warps}
        us = tiles.time(inputs(model, tokens), request, **tile)
        yield {"model": model.name, "tokens": tokens, "whole_warps": warps, "one launch": us}
    for tokens, rows, warps, scan in (
        *itertools.product((8, 64), (1, 4), (2, 4, 8), (1, 2**30)),
        *itertools.product((512,), (4, 8), (4, 8), (1, 2**30)),
        *itertools.product((4096, 16384), (8, 16), (4, 8), (1,)),
    ):
        given = inputs(model, tokens)
        base = {"rows": rows, "warps": rows, "place_warps": warps, "whole": 0, "scan": scan}
        said: Row = {"model": model.name, "tokens": tokens, "rows": rows, "place_warps": warps}
        said["scan"] = scan
        for overlap in (0, 1):
            said[f"overlap {overlap}"] = tiles.time(given, request, **base, overlap=overlap)
        yield said


def rows_of(options: argparse.Namespace, clock: Clock) -> Iterator[Row]:
    """The table or the sweep, of the models asked for."""
    library = options.flashinfer_library
    peer = None if library is None or clock is once else FlashInfer(library)
    for model in MODELS:
        if options.models is not None and model.name not in options.models:
            continue
        if options.sweep:
            yield from sweep(model, clock) if model.name in SWEPT else ()
        else:
            for tokens in TOKENS:
                yield row(model, tokens, peer, clock)


def compile_all(options: argparse.Namespace) -> None:
    """Every model once, in processes side by side."""
    names = SWEPT if options.sweep else tuple(model.name for model in MODELS)
    asked = [name for name in names if options.models is None or name in options.models]
    command = [sys.executable, "-m", "tests.gpu.bench_routing", "--compile-only"]
    command += ["--sweep"] if options.sweep else []
    started = [subprocess.Popen([*command, "--models", name]) for name in asked]
    failed = [name for name, one in zip(asked, started, strict=True) if one.wait()]
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}")


def main() -> None:
    """Print a table, or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--flashinfer-library", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--models", nargs="+", choices=[model.name for model in MODELS])
    parser.add_argument("--compile-only", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; there is none on this machine")
    if options.compile_only:
        list(rows_of(options, once))
        return
    compile_all(options)
    triton = importlib.import_module("triton")
    device = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{vars(triton)['__version__']}, Python {platform.python_version()}"
    )
    print(device)
    found: list[Row] = []
    for one in rows_of(options, in_graph):
        found.append(one)
        _print(found)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": device, "rows": found}, indent=1))


def _print(found: list[Row]) -> None:
    """The last row; its columns' names where they are new."""
    last = found[-1]
    if len(found) == 1 or found[-2].keys() != last.keys():
        print("\t".join(last))
    print("\t".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in last.values()))
    sys.stdout.flush()


if __name__ == "__main__":
    with torch.no_grad():
        main()
