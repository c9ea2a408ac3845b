"""Expert layers in Triton on this machine's GPU, in CUDA graphs, beside what the card could do.

    python -m tests.gpu.bench_experts [--json FILE] [--sweep] [--tokens T ...]

Microseconds per call of a whole layer, from logits to the sum over a token's experts: a graph of
calls is replayed, and the median of its replays is divided by their number. The calls go round over
so many layers that their weights are more than 100 MB beyond the one before, so that the L2 cache
does not hold them. The floor is the larger of bytes over 3.0 TB/s (the weights of the experts that
these logits chose, input and output) and FLOPs over 800 TFLOP/s in bfloat16, 1600 in FP8.

Beside it stand the launches by themselves, each in a graph of its own: routing with the sort, the
two products, the sum, and in FP8 the quantisation of the input. `--sweep` times the products with
every tile instead, from which the table of tiles is made.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import platform
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Protocol, cast

import attrs
import torch
from torch import Tensor

from typed_moe import Bf16, DeepSeekV3, Format, Fp8BlockScale, FusedMoE, RenormalizeNaive
from typed_moe.kernels import (
    ExpertArgs,
    FusedRouting,
    SortRequest,
    TritonKernel,
    fused_routing,
    sort_slots,
)
from typed_moe.kernels._expert_operands import Operands, Slots
from typed_moe.kernels._expert_tiles import ExpertTile, GemmTile, table_of, tile_of
from typed_moe.quantization import quantize_activation
from typed_moe.routing import RoutingStrategy

REPLAYS = 20
TOKENS = (1, 8, 64, 512, 4096)
BYTES_PER_SECOND = 3.0e12
FLOPS_PER_SECOND = {"bf16": 800e12, "fp8_block": 1600e12}
ROTATED_BYTES = 100e6
SCALES = ("w13_weight_scale_inv", "w2_weight_scale_inv")
Row = dict[str, float | int | str]
"""One line of a table."""


@attrs.frozen(kw_only=True)
class Model:
    """A layer's shape."""

    name: str
    routing: RoutingStrategy
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int


MODELS = (
    Model(
        name="Qwen3-30B-A3B",
        routing=RenormalizeNaive(),
        num_experts=128,
        top_k=8,
        hidden_size=2048,
        intermediate_size=768,
    ),
    # 32 experts and every token's 8 among them, which is the load that 8 ranks' tokens make.
    Model(
        name="DeepSeek-V3, 32 local experts",
        routing=DeepSeekV3(routed_scaling_factor=2.5),
        num_experts=32,
        top_k=8,
        hidden_size=7168,
        intermediate_size=2048,
    ),
)
FORMATS: tuple[Format, ...] = (Bf16(), Fp8BlockScale())


def layer_of(model: Model, quant: Format) -> FusedMoE:
    """A layer with random weights, made on the card."""
    layer = FusedMoE(
        num_experts=model.num_experts,
        top_k=model.top_k,
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        routing=model.routing,
        quant=quant,
        device="cuda",
        dtype=torch.bfloat16,
    )
    for name, parameter in layer.named_parameters():
        fill(name, parameter.data)
    if layer.e_score_correction_bias is not None:
        layer.e_score_correction_bias.normal_(std=0.02)
    layer.prepare_weights()
    return layer


def fill(name: str, data: Tensor) -> None:
    """Values of the size that trained ones have, without a second copy of a large tensor."""
    if data.dtype is torch.float8_e4m3fn:
        for part in data:
            part.copy_(torch.randn(part.shape, device="cuda").mul_(64).clamp_(-448, 448))
    elif "scale" in name:
        data.fill_(2.0**-12)
    else:
        data.normal_(std=0.02)


def inputs(model: Model, tokens: int) -> tuple[Tensor, Tensor]:
    """hidden_states (T, H) and float32 logits (T, E)."""
    generator = torch.Generator(device="cuda").manual_seed(tokens)
    hidden = torch.randn(tokens, model.hidden_size, device="cuda", generator=generator)
    logits = torch.randn(tokens, model.num_experts, device="cuda", generator=generator)
    return hidden.bfloat16(), logits


def floor(model: Model, quant: Format, layer: FusedMoE, tokens: int) -> tuple[float, str]:
    """Microseconds that memory or the matrix units need at least, and which of the two."""
    hidden, logits = inputs(model, tokens)
    bias = layer.e_score_correction_bias
    chosen = model.routing.select_experts(logits, bias, shape=layer.plan.request.shape).topk_ids
    used = int(chosen.flatten().bincount().count_nonzero())
    values = 3 * model.hidden_size * model.intermediate_size
    width = 2 if isinstance(quant, Bf16) else 1
    memory = used * values * width + 2 * hidden.numel() * 2
    flops = 2.0 * chosen.numel() * values
    by_memory = memory / BYTES_PER_SECOND * 1e6
    by_flops = flops / FLOPS_PER_SECOND[quant.name] * 1e6
    return max(by_memory, by_flops), "memory" if by_memory >= by_flops else "matrix units"


def in_graph(calls: Sequence[Callable[[], object]]) -> float:
    """Median microseconds per call of a graph that makes each of these in turn."""
    for call in (calls[0], calls[-1]):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for _ in range(REPLAYS):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        milliseconds = float(start.elapsed_time(end))
        times.append(milliseconds * 1000.0 / len(calls))
    return statistics.median(times)


def layers_of(model: Model, quant: Format) -> list[FusedMoE]:
    """So many that more than 100 MB are read between two readings of one expert, also at T = 1."""
    values = 3 * model.hidden_size * model.intermediate_size
    per_call = values * model.top_k * (2 if isinstance(quant, Bf16) else 1)
    return [layer_of(model, quant) for _ in range(2 + int(ROTATED_BYTES / per_call))]


def rows_of(model: Model, quant: Format, tokens: Sequence[int]) -> Iterator[Row]:
    """Every T of one model and format: the layer, and its launches one by one."""
    layers = layers_of(model, quant)
    print(f"# {model.name}, {quant.name}: {len(layers)} layers\n{layers[0].plan}", file=sys.stderr)
    for count in tokens:
        hidden, logits = inputs(model, count)
        time = in_graph([partial(layer, hidden, logits) for layer in layers])
        least, bound = floor(model, quant, layers[0], count)
        yield {
            "model": model.name,
            "format": quant.name,
            "tokens": count,
            "layer_us": time,
            "floor_us": least,
            "floor_by": bound,
            "share_of_floor": least / time,
            **parts_of(model, layers, count),
        }


@attrs.frozen(kw_only=True, eq=False)
class Parts:
    """The launches of one layer by themselves."""

    operands: Operands
    experts: ExpertArgs
    slots: Slots
    tile: ExpertTile

    def first(self) -> tuple[Tensor, Tensor | None]:
        """The first product."""
        return launches().first(self.operands, self.slots, self.experts, self.tile)

    def second(self, intermediate: tuple[Tensor, Tensor | None]) -> Tensor:
        """The second product."""
        return launches().second(self.operands, self.slots, self.experts, self.tile, intermediate)


class _Launches(Protocol):
    def first(
        self, operands: Operands, slots: Slots, experts: ExpertArgs, tile: ExpertTile
    ) -> tuple[Tensor, Tensor | None]: ...

    def second(
        self,
        operands: Operands,
        slots: Slots,
        experts: ExpertArgs,
        tile: ExpertTile,
        intermediate: tuple[Tensor, Tensor | None],
    ) -> Tensor: ...

    def combine(self, rows: Tensor, slots: Slots, output: Tensor | None) -> Tensor: ...


def launches() -> _Launches:
    """The module that launches, which needs Triton."""
    return cast("_Launches", importlib.import_module("typed_moe.kernels._triton_experts_launch"))


def parts(model: Model, layer: FusedMoE, tokens: int, tile: ExpertTile | None) -> Parts:
    """One layer's operands and slots, with its own tile or this one."""
    hidden, logits = inputs(model, tokens)
    request = layer.plan.request
    quant, shape = request.quant, request.shape
    weights = dict(layer.named_parameters())
    stored = quantize_activation(hidden, quant)
    fp8 = isinstance(quant, Fp8BlockScale)
    if tile is None:
        table = table_of(torch.cuda.get_device_name(), "fp8" if fp8 else "bf16")
        tile = tile_of(table, tokens * model.top_k / model.num_experts)
    routed = model.routing.select_experts(logits, layer.e_score_correction_bias, shape=shape)
    ids = routed.topk_ids.int().contiguous()
    sort = SortRequest(first_local=0, num_local=model.num_experts, block_size=tile.block_m)
    return Parts(
        operands=Operands(
            hidden=stored.data,
            hidden_scale=None if stored.scale is None else stored.scale.T,
            first=weights["w13_weight"].data,
            first_scale=weights[SCALES[0]].data if fp8 else None,
            second=weights["w2_weight"].data,
            second_scale=weights[SCALES[1]].data if fp8 else None,
            fp8="native" if fp8 else "none",
            scales="block" if fp8 else "plain",
        ),
        experts=ExpertArgs(
            num_experts=model.num_experts,
            top_k=model.top_k,
            intermediate_size=model.intermediate_size,
            local_expert_offset=0,
            local_num_experts=model.num_experts,
            activation_type="Swiglu",
        ),
        slots=Slots(
            ids=ids,
            weights=routed.topk_weights,
            sorted=sort_slots(ids, sort),
            on_input=False,
        ),
        tile=tile,
    )


def parts_of(model: Model, layers: Sequence[FusedMoE], tokens: int) -> Row:
    """Microseconds of quantising, routing with the sort, both products and the sum."""
    hidden, logits = inputs(model, tokens)
    layer = layers[0]
    several = [parts(model, one, tokens, None) for one in layers]
    between = several[0].first()
    rows = several[0].second(between)
    slots, bias, shape = several[0].slots, layer.e_score_correction_bias, layer.plan.request.shape
    fused = fused_routing(model.routing, shape=shape, device=hidden.device)
    assert isinstance(fused, FusedRouting)
    sort = SortRequest(
        first_local=0, num_local=model.num_experts, block_size=several[0].tile.block_m
    )
    row: Row = {
        "route_us": in_graph([partial(fused.with_slots, logits, bias, sort)] * 8),
        "first_us": in_graph([one.first for one in several]),
        "second_us": in_graph([partial(one.second, between) for one in several]),
        "combine_us": in_graph([partial(launches().combine, rows, slots, None)] * 8),
    }
    if not isinstance(layer.plan.request.quant, Bf16):
        quantize = partial(quantize_input, layer, hidden)
        row["quantize_us"] = in_graph([quantize] * 8)
    return row


def quantize_input(layer: FusedMoE, hidden: Tensor) -> object:
    """As the layer's runner does it."""
    return TritonKernel().quantize(hidden, layer.plan.request.quant)


def sweep(tokens: Sequence[int]) -> Iterator[Row]:
    """Both products' times with every tile; one that does not fit the card is left out."""
    for model, quant in itertools.product(MODELS, FORMATS):
        layers = layers_of(model, quant)
        for count, tile in itertools.product(tokens, candidates()):
            rows = count * model.top_k / model.num_experts
            if tile.block_m > max(16, 4 * rows) or (rows > 64 and tile.block_m < 64):
                continue
            if isinstance(quant, Fp8BlockScale) and (
                tile.first.block_k != 128 or tile.first.block_n > 128
            ):
                continue
            yield {
                "model": model.name,
                "format": quant.name,
                "tokens": count,
                "block_m": tile.block_m,
                **attrs.asdict(tile.first),
                **swept(model, layers, count, tile),
            }


def candidates() -> Iterator[ExpertTile]:
    """The same tile for both products, whose times are told apart."""
    for block_m, block_n, block_k, warps, stages in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), (64, 128), (4, 8), (3, 4, 5)
    ):
        # Too few or too many values of a result for these warps.
        if not 4 * 128 <= block_m * block_n // warps <= 64 * 128:
            continue
        gemm = GemmTile(
            block_n=block_n,
            block_k=block_k,
            warps=warps,
            stages=stages,
            group_m=8 if block_m >= 64 else 1,
        )
        yield ExpertTile(block_m=block_m, first=gemm, second=gemm)


def swept(model: Model, layers: Sequence[FusedMoE], tokens: int, tile: ExpertTile) -> Row:
    """Both products' microseconds with this tile; the error's name where it does not fit."""
    several = [parts(model, one, tokens, tile) for one in layers]
    # What a layer with blocks of this height hands over: in FP8, quantised where they are tall.
    small = GemmTile(block_n=128 if tile.block_m >= 64 else 32, block_k=64, warps=8, stages=2)
    if several[0].operands.fp8 != "none":
        small = attrs.evolve(small, block_k=128)
    between = attrs.evolve(several[0], tile=attrs.evolve(tile, first=small)).first()
    too_large = cast(
        "type[Exception]", vars(importlib.import_module("triton.runtime.errors"))["OutOfResources"]
    )
    row: Row = {}
    for name, calls in (
        ("first_us", [one.first for one in several]),
        ("second_us", [partial(one.second, between) for one in several]),
    ):
        try:
            row[name] = in_graph(calls)
        except too_large:
            row[name] = "does not fit"
    return row


def main() -> None:
    """Print a table, or the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("needs a CUDA device; there is none on this machine")
    device = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton "
        f"{metadata.version('triton')}, Python {platform.python_version()}"
    )
    print(device)
    found: list[Row] = []
    rows = (
        sweep(options.tokens)
        if options.sweep
        else itertools.chain.from_iterable(
            rows_of(model, quant, options.tokens)
            for model, quant in itertools.product(MODELS, FORMATS)
        )
    )
    for row in rows:
        found.append(row)
        show(found)
    if options.json is not None:
        options.json.write_text(json.dumps({"device": device, "rows": found}, indent=1))


def show(found: list[Row]) -> None:
    """The last row; its columns' names where they are new."""
    last = found[-1]
    if len(found) == 1 or found[-2].keys() != last.keys():
        print("\t".join(last))
    print("\t".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in last.values()))
    sys.stdout.flush()


if __name__ == "__main__":
    with torch.no_grad():
        main()
