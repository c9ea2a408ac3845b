"""What a layer's call takes of the card's memory, byte for byte; and that its weights are there once.

By the bytes that PyTorch's allocator was asked for, without what it rounds them to.
"""

from __future__ import annotations

import gc
import os

import attrs
import pytest
import torch

from tests.gpu.library import deep_gemm_absent
from typed_moe import (
    Bf16,
    DeepGemmKernel,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    FusedMoE,
    MxFp4,
    MxFp8,
    Nvfp4,
    Refused,
    RenormalizeNaive,
    TritonKernel,
)
from typed_moe.cli._bench_shapes import LayerShape, chosen_shapes
from typed_moe.cli._bench_weights import draw_inputs, draw_layer, make_layer
from typed_moe.kernels import MoeKernel, SortRequest, installed_deep_gemm, triton_experts
from typed_moe.kernels._expert_tiles import Operand, tile_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton's interpreter is on"),
]
EXPERTS, TOP_K, HIDDEN, WIDTH = 16, 4, 2048, 1024
PER_SLOT = 24
"""Bytes of a slot and a place: ids, weights, sorted slots, and what the sort counts with."""
SMALL = 2**16
"""Tables of one entry per expert, and constants."""

OPERANDS: dict[str, Operand] = {
    "bf16": "bf16",
    "fp8_per_tensor": "fp8",
    "fp8_block": "fp8",
    "mxfp8": "mxfp8",
    "mxfp4": "fp4",
    "nvfp4": "fp4",
}
FORMATS = pytest.mark.parametrize(
    "quant",
    [Bf16(), Fp8PerTensor(), Fp8BlockScale(), MxFp8(), MxFp4(), Nvfp4()],
    ids=lambda quant: quant.name,
)
SIZES = pytest.mark.parametrize("tokens", [64, 4096])


def shape() -> LayerShape:
    """A small layer, large beside its tables."""
    (one,) = chosen_shapes(("qwen3-30b-a3b",))
    return attrs.evolve(
        one,
        routing=RenormalizeNaive(),
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
    )


def requested(which: str) -> int:
    """Bytes asked for and not given back: `current`, or the most of them: `peak`."""
    torch.cuda.synchronize()
    return int(torch.cuda.memory_stats()[f"requested_bytes.all.{which}"])


def made(quant: Format, kernel: MoeKernel) -> FusedMoE:
    """A layer whose weights are in memory once: what they were copied from is gone."""
    layer = make_layer(draw_layer(shape(), quant, 0, torch.device("cuda")), kernel)
    gc.collect()
    return layer


def taken(layer: FusedMoE, tokens: int) -> int:
    """The peak of a call beyond weights and input, its output included."""
    given = draw_inputs(shape(), tokens, torch.device("cuda"))
    layer(given.hidden_states, given.router_logits)
    gc.collect()
    before = requested("current")
    torch.cuda.reset_peak_memory_stats()
    output = layer(given.hidden_states, given.router_logits)
    peak = requested("peak") - before
    assert output.shape == (tokens, HIDDEN)
    return peak


def input_bytes(quant: Format, tokens: int) -> float:
    """Of the quantised input with its scales. MX and FP4 formats have it in bfloat16 at once, by one launch."""
    each = {"fp8_per_tensor": 1.0, "fp8_block": 1 + 4 / 128}
    if torch.cuda.get_device_capability() < (8, 9):
        each |= {"mxfp8": 1 + 1 / 32, "nvfp4": 1 / 2 + 1 / 16}
    return tokens * HIDDEN * each.get(quant.name, 0.0)


def places(block: int, tokens: int) -> int:
    """P: slots, and what their experts' last blocks have left."""
    request = SortRequest(first_local=0, num_local=EXPERTS, block_size=block)
    return request.num_blocks(tokens * TOP_K) * block


@FORMATS
@SIZES
def test_a_call_holds_its_intermediates_and_no_more(quant: Format, tokens: int) -> None:
    """The intermediate by place and the slots' outputs; in MX and FP4 formats the input in bfloat16 too."""
    layer = made(quant, TritonKernel())
    table = triton_experts._table(torch.device("cuda", 0), OPERANDS[quant.name], HIDDEN)
    rows = places(tile_of(table, tokens * TOP_K / EXPERTS).block_m, tokens)
    native = torch.cuda.get_device_capability() >= (8, 9)
    stored = {"fp8_per_tensor": 1.0, "fp8_block": 1 + 4 / 128} if native else {}
    between = rows * WIDTH * stored.get(quant.name, 2.0)
    outputs, sums = tokens * TOP_K * HIDDEN * 2, tokens * HIDDEN * 2
    widened = 0 if OPERANDS[quant.name] in ("bf16", "fp8") else tokens * HIDDEN * 2
    # Where blocks of 128 are quantised in a launch of their own, bfloat16 and FP8 stand side by side.
    apart = rows * WIDTH * 2 + between if native and isinstance(quant, Fp8BlockScale) else 0
    least = max(between + outputs, outputs + sums)
    most = max(least, apart) + widened + input_bytes(quant, tokens)
    most += PER_SLOT * (rows + tokens * TOP_K) + SMALL
    got = taken(layer, tokens)

    assert least <= got <= most, f"{got} bytes; from {least} to {most} are accounted for"


@pytest.mark.parametrize("quant", [Bf16(), Fp8BlockScale()], ids=lambda quant: quant.name)
@SIZES
def test_a_call_on_deep_gemm(quant: Format, tokens: int) -> None:
    """The input, the first product, the intermediate and the outputs by place, two of them at a time."""
    absent = deep_gemm_absent()
    if absent is not None:
        pytest.skip(absent)
    library = installed_deep_gemm()
    assert not isinstance(library, Refused)
    layer = made(quant, DeepGemmKernel())
    rows = places(library.alignment(), tokens)
    value = 2 if isinstance(quant, Bf16) else 1 + 4 / 128
    moved, first = rows * HIDDEN * value, rows * 2 * WIDTH * 2
    between, outputs = rows * WIDTH * value, rows * HIDDEN * 2
    sums = tokens * HIDDEN * 2
    least = max(moved + first, first + between, between + outputs, outputs + sums)
    most = least + input_bytes(quant, tokens) + PER_SLOT * (rows + tokens * TOP_K) + SMALL
    got = taken(layer, tokens)

    assert least <= got <= most, f"{got} bytes; from {least} to {most} are accounted for"


@FORMATS
def test_weights_are_there_once(quant: Format) -> None:
    """After loading, preparation and calls of two sizes the card holds the stored bytes and constants."""
    gc.collect()
    before = requested("current")
    layer = made(quant, TritonKernel())
    stored = sum(one.nbytes for one in (*layer.parameters(), *layer.buffers()))
    for tokens in (8, 512):
        taken(layer, tokens)
    gc.collect()
    held = requested("current") - before

    assert stored >= EXPERTS * 3 * HIDDEN * WIDTH / 2
    assert stored <= held <= stored + SMALL, f"{held} bytes are held, {stored} of them stored"
