"""A layer's weights in the order that FlashInfer's trtllm kernels read them.

Widths that are no multiples of 128 are padded first. The rest is a permutation, done expert by expert
in the layer's own storage: no second copy of a layer's weights exists at any time. The steps, as FlashInfer's helpers do them (`tests/kernels/
test_flashinfer_layouts.py` compares):

    up rows before gate rows, then one of each in turn (`reorder_rows_for_gated_act_gemm`),
    rows shuffled in blocks of 32 (`shuffle_matrix_a` with epilogue_tile_m = 128),
    scales of 16 or 32 values in tiles of 128 x 4 (`block_scale_interleave`), bytes or bfloat16,
    bfloat16 and int4 in blocks of 128 bytes along K (`convert_to_block_layout`).

int4 has both: its values lie in blocks and its scales in tiles (FlashInfer 0.7.2.post1,
`fused_moe/prepare.py`, `prepare_trtllm_mxint4_weights`; vLLM's `flashinfer_mxint4_moe.py` does the
same). A block of 128 bytes is 256 int4 values, so that both widths are multiples of 256.

Shapes: L experts, M rows of the first matrix, I intermediate size, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from typed_moe.config import (
    Bf16,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxInt4,
    is_gated,
)
from typed_moe.kernels._flashinfer_padding import is_padded, pad_weights
from typed_moe.kernels._protocol import KernelRequest
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.routing import Refused

_BLOCK_BYTES = 128


def layout_refusal(request: KernelRequest) -> Refused | None:
    """Widths that the layouts cannot hold; None if they can."""
    if not isinstance(request.quant, Fp8BlockScale) or not is_padded(request):
        return None
    width = request.placement.local_intermediate_size(request.intermediate_size)
    return Refused(
        "takes whole blocks of 128 with fp8_block, gate and up apart; here hidden_size is "
        f"{request.hidden_size} and intermediate_size per tensor-parallel rank {width}"
    )


def prepare_weights(weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
    """The weights in the layout of the format's entry points.

    In the same storage, unless a width has to be padded.
    """
    gated = is_gated(request.activation)
    if is_padded(request):
        weights = pad_weights(weights, request)
    if isinstance(request.quant, Fp8BlockScale):
        return replace(_up_first(weights)) if gated else weights
    first = row_order(weights.w13_weight.shape[1], gated=gated).to(weights.w13_weight.device)
    second = row_order(weights.w2_weight.shape[1], gated=False).to(weights.w2_weight.device)
    for tensor, order in (
        (weights.w13_weight, first),
        (weights.w13_bias, first),
        (weights.w2_weight, second),
        (weights.w2_bias, second),
    ):
        if tensor is not None:
            _permute_rows(tensor, order)
    if not isinstance(request.quant, Bf16 | Fp8PerTensor):
        for scale, order in ((weights.w13_scale, first), (weights.w2_scale, second)):
            assert scale is not None, "the format has scales"
            _permute_rows(scale, order)
            if not isinstance(request.quant, Fp8PerChannel):
                _interleave_scales(scale)
    if isinstance(request.quant, Bf16 | MxInt4):
        return replace(
            weights,
            w13_weight=_in_blocks(weights.w13_weight),
            w2_weight=_in_blocks(weights.w2_weight),
        )
    return replace(weights)


def row_order(rows: int, *, gated: bool) -> Tensor:
    """(rows,) int64: which stored row comes where. rows is a multiple of 32.

    Gated: stored as gate rows, then up rows.
    """
    order = torch.arange(rows)
    if gated:
        half = rows // 2
        order = torch.stack((order[half:], order[:half]), dim=1).flatten()
    target = order.new_tensor([(row % 4) * 8 + row // 4 for row in range(32)])
    source = torch.empty_like(target)
    source[target] = torch.arange(32)
    return order.reshape(-1, 32)[:, source].flatten()


def _permute_rows(stack: Tensor, order: Tensor) -> None:
    """Rows of every expert of (L, rows, ...) or (L, rows), in place."""
    for expert in _movable(stack):
        expert.copy_(expert[order])


def _movable(stack: Tensor) -> Tensor:
    """The same storage in a dtype that can be indexed: bytes for the 8-bit floats."""
    return stack.data.view(torch.uint8) if stack.element_size() == 1 else stack.data


def _interleave_scales(scale: Tensor) -> None:
    """(L, rows, groups) scales into tiles of 128 x 4, in place."""
    for expert in _movable(scale):
        rows, groups = expert.shape
        tiles = expert.reshape(rows // 128, 4, 32, groups // 4, 4).permute(0, 3, 2, 1, 4)
        expert.copy_(tiles.reshape(rows, groups))


def _in_blocks(stack: Tensor) -> Tensor:
    """(L, rows, columns) as (L, columns / n, rows, n), n = 128 bytes, in the same storage.

    64 columns of bfloat16, 128 of packed int4.
    """
    experts, rows, columns = stack.shape
    width = _BLOCK_BYTES // stack.element_size()
    blocked = stack.data.view(experts, columns // width, rows, width)
    for number in range(experts):
        expert = stack.data[number].reshape(rows, columns // width, width)
        # A copy even where there is one block, and nothing moves: it is read from while written.
        blocked[number].copy_(expert.permute(1, 0, 2).clone())
    return blocked


def _up_first(weights: ExpertWeights) -> ExpertWeights:
    """DeepSeek FP8: the up projection's rows and scale blocks before the gate's."""
    assert weights.w13_scale is not None, "the format has scales"
    for tensor in (weights.w13_weight, weights.w13_scale, weights.w13_bias):
        if tensor is not None:
            half = tensor.shape[1] // 2
            order = torch.arange(2 * half, device=tensor.device).roll(half)
            _permute_rows(tensor, order)
    return weights
