"""Weight layouts against FlashInfer's own helpers, which run on a CPU."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor

from typed_moe import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Swiglu,
)
from typed_moe.config import Placement, Relu2
from typed_moe.kernels import ExpertWeights, KernelRequest
from typed_moe.kernels._flashinfer_layouts import prepare_weights, row_order
from typed_moe.quantization import quantize_weight
from typed_moe.routing import RoutingShape

pytest.importorskip("flashinfer", reason="FlashInfer's helpers are the oracle here")

from flashinfer.fused_moe import convert_to_block_layout, core, reorder_rows_for_gated_act_gemm
from flashinfer.quantization.fp4_quantization import shuffle_matrix_a
from flashinfer.trace.templates.gemm import _unswizzle_batched_sf_128x4

EXPERTS, HIDDEN, WIDTH = 3, 256, 512


def _up_first(stack: Tensor) -> Tensor:
    gate, up = stack.chunk(2, dim=1)
    return torch.cat((up, gate), dim=1)


def _request(quant: Format, *, gated: bool) -> KernelRequest:
    return KernelRequest(
        shape=RoutingShape(num_experts=EXPERTS, top_k=1),
        quant=quant,
        activation=Swiglu() if gated else Relu2(),
        placement=Placement(),
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_fused_shared_experts=0,
        has_bias=False,
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
    )


def _weights(quant: Format, *, gated: bool) -> ExpertWeights:
    w13 = quantize_weight(torch.randn(EXPERTS, WIDTH * (2 if gated else 1), HIDDEN), quant)
    w2 = quantize_weight(torch.randn(EXPERTS, HIDDEN, WIDTH), quant)
    return ExpertWeights(
        w13_weight=w13.data,
        w2_weight=w2.data,
        w13_scale=w13.scale,
        w2_scale=w2.scale,
        w13_bias=torch.randn(EXPERTS, w13.data.shape[1]),
        w2_bias=torch.randn(EXPERTS, HIDDEN),
    )


def _theirs(stack: Tensor, *, gated: bool) -> Tensor:
    """FlashInfer's own steps on the rows of every expert."""
    stack = _up_first(stack) if gated else stack
    rows = []
    for expert in stack:
        ordered = reorder_rows_for_gated_act_gemm(expert) if gated else expert
        rows.append(shuffle_matrix_a(ordered, 128))
    return torch.stack(rows)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("rows", [32, 64, 256, 1536])
@pytest.mark.parametrize("gated", [True, False])
def test_row_order(rows: int, *, gated: bool) -> None:
    """The chain of their permutations is one permutation."""
    matrix = torch.arange(rows, dtype=torch.float32).unsqueeze(1).expand(-1, 4).contiguous()
    theirs = _theirs(matrix.unsqueeze(0), gated=gated)[0]
    assert torch.equal(matrix[row_order(rows, gated=gated)], theirs)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(
    "quant",
    [Fp8PerTensor(), Fp8PerChannel(), MxFp8(), Nvfp4(), MxFp4()],
    ids=lambda quant: quant.name,
)
def test_shuffled_formats(quant: Format, *, gated: bool) -> None:
    """Values, scales and biases lie as their helpers put them."""
    stored = _weights(quant, gated=gated)
    prepared = prepare_weights(deepcopy(stored), _request(quant, gated=gated))

    assert stored.w13_bias is not None
    assert prepared.w13_bias is not None
    bias = _theirs(stored.w13_bias.unsqueeze(2), gated=gated).squeeze(2)
    assert torch.equal(prepared.w13_bias, bias)
    for before, after, halves in (
        (stored.w13_weight, prepared.w13_weight, gated),
        (stored.w2_weight, prepared.w2_weight, False),
    ):
        assert torch.equal(_bytes(after), _theirs(_bytes(before), gated=halves))
    if isinstance(quant, Fp8PerTensor):
        return
    for scale, tiled, halves in (
        (stored.w13_scale, prepared.w13_scale, gated),
        (stored.w2_scale, prepared.w2_scale, False),
    ):
        assert scale is not None
        assert tiled is not None
        if isinstance(quant, Fp8PerChannel):
            rows = _theirs(scale.unsqueeze(2), gated=halves).squeeze(2)
            assert torch.equal(tiled, rows)
            continue
        linear = _unswizzle_batched_sf_128x4(_bytes(tiled), *scale.shape)
        assert torch.equal(linear, _theirs(_bytes(scale), gated=halves))


@pytest.mark.parametrize("gated", [True, False])
def test_bfloat16_in_blocks(*, gated: bool) -> None:
    """(L, K / 64, M, 64), as their block layout of the shuffled bytes."""
    stored = _weights(Bf16(), gated=gated)
    prepared = prepare_weights(deepcopy(stored), _request(Bf16(), gated=gated))
    for before, after, halves in (
        (stored.w13_weight, prepared.w13_weight, gated),
        (stored.w2_weight, prepared.w2_weight, False),
    ):
        shuffled = _theirs(before, gated=halves)
        blocks = [convert_to_block_layout(expert.view(torch.uint8), 128) for expert in shuffled]
        assert torch.equal(after, torch.stack(blocks).view(torch.bfloat16))


def test_int4_in_blocks_with_tiled_scales() -> None:
    """The steps of FlashInfer's `prepare_trtllm_mxint4_weights`, with its helpers."""
    stored = _weights(MxInt4(), gated=True)
    prepared = prepare_weights(deepcopy(stored), _request(MxInt4(), gated=True))
    for before, after, halves in (
        (stored.w13_weight, prepared.w13_weight, True),
        (stored.w2_weight, prepared.w2_weight, False),
    ):
        blocks = [convert_to_block_layout(one, 128) for one in _theirs(before, gated=halves)]
        assert torch.equal(after, torch.stack(blocks))
    for scale, tiled, halves in (
        (stored.w13_scale, prepared.w13_scale, True),
        (stored.w2_scale, prepared.w2_scale, False),
    ):
        assert scale is not None
        assert tiled is not None
        assert tiled.dtype is torch.bfloat16
        linear = _unswizzle_batched_sf_128x4(tiled, *scale.shape)
        assert torch.equal(linear, _theirs(scale, gated=halves))


def test_int4_rows_as_their_own_preparation_orders_them() -> None:
    """Its index helpers, for values and for scales, are the order of every shuffled format."""
    values = torch.zeros(2 * WIDTH, HIDDEN // 2, dtype=torch.uint8)
    scales = torch.zeros(2 * WIDTH, HIDDEN // 32, dtype=torch.bfloat16)
    up_first = torch.arange(2 * WIDTH).roll(WIDTH)
    for tensor, group in ((values, None), (scales, 32)):
        first = core._maybe_get_cached_w3_w1_permute_indices({}, tensor, 128, group)
        assert torch.equal(up_first[first], row_order(2 * WIDTH, gated=True))
    for tensor, group in ((values, None), (scales, 16)):
        second = core.get_w2_permute_indices_with_cache({}, tensor, 128, group)
        assert torch.equal(second, row_order(2 * WIDTH, gated=False))


def test_deepseek_fp8_is_up_first_and_not_shuffled() -> None:
    """Scale blocks move with their rows; nothing else changes."""
    stored = _weights(Fp8BlockScale(), gated=True)
    prepared = prepare_weights(deepcopy(stored), _request(Fp8BlockScale(), gated=True))

    assert stored.w13_scale is not None
    assert prepared.w13_scale is not None
    assert torch.equal(_bytes(prepared.w13_weight), _up_first(_bytes(stored.w13_weight)))
    assert torch.equal(prepared.w13_scale, _up_first(stored.w13_scale))
    assert torch.equal(_bytes(prepared.w2_weight), _bytes(stored.w2_weight))


@pytest.mark.parametrize(
    "quant",
    [Bf16(), Fp8PerTensor(), Fp8PerChannel(), Fp8BlockScale(), MxFp8(), Nvfp4(), MxFp4(), MxInt4()],
    ids=lambda quant: quant.name,
)
def test_no_second_copy(quant: Format) -> None:
    """The prepared tensors lie in the storage of the stored ones, and fill it."""
    stored = _weights(quant, gated=True)
    prepared = prepare_weights(stored, _request(quant, gated=True))
    for before, after in (
        (stored.w13_weight, prepared.w13_weight),
        (stored.w2_weight, prepared.w2_weight),
    ):
        assert after.untyped_storage().data_ptr() == before.untyped_storage().data_ptr()
        assert after.nbytes == before.nbytes
    assert prepared is not stored
