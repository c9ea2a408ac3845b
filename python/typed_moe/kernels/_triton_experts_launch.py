"""Launching the Triton expert kernels: buffers, pointers and constants of one call.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from typed_moe.kernels._expert_operands import Fp8, Operands, Slots
from typed_moe.kernels._expert_tiles import ExpertTile
from typed_moe.kernels._experts_math import is_gated_type
from typed_moe.kernels._fused_rules import power_of_two
from typed_moe.kernels._triton_experts import (
    combine_kernel,
    first_kernel,
    quantize_kernel,
    second_kernel,
)
from typed_moe.kernels._triton_launch import INTERPRETED, on_device
from typed_moe.kernels.args import ExpertArgs

_GROUP = 128


def rows(operands: Operands, slots: Slots, experts: ExpertArgs, tile: ExpertTile) -> Tensor:
    """(T * k, H) bfloat16: each slot's expert's output; rows of no local expert are not written."""
    with on_device(operands.hidden.device):
        return second(operands, slots, experts, tile, first(operands, slots, experts, tile))


def combine(rows: Tensor, slots: Slots, output: Tensor | None) -> Tensor:
    """(T, H) bfloat16: the weighted sum over each token's slots, in `output` if it is given."""
    tokens, count = slots.ids.shape
    width = rows.shape[1]
    if output is None:
        output = torch.empty((tokens, width), dtype=torch.bfloat16, device=rows.device)
    block = 256 if tokens < 128 else min(1024, power_of_two(width))
    local = slots.sorted
    with on_device(rows.device):
        combine_kernel[(tokens, triton.cdiv(width, block))](
            rows,
            slots.ids,
            slots.weights,
            output,
            local.first_local,
            local.counts.shape[0],
            H=width,
            SLOTS=count,
            WEIGHTED=not slots.on_input,
            BLOCK=block,
            DEVICE=not INTERPRETED,
            num_warps=4 if block > 256 else 2,
        )
    return output


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H) floating point to float8_e4m3fn and (T, H / 128) float32."""
    tokens, width = x.shape
    groups = width // _GROUP
    data = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((tokens, groups), dtype=torch.float32, device=x.device)
    if tokens == 0:
        return data, scale
    together = 8
    with on_device(x.device):
        quantize_kernel[(tokens, triton.cdiv(groups, together))](
            x,
            data,
            scale,
            x.stride(0),
            H=width,
            GROUPS=together,
            DEVICE=not INTERPRETED,
            num_warps=4,
        )
    return data, scale


def quantizes(tile: ExpertTile, fp8: Fp8) -> bool:
    """Whether the first product writes the intermediate in float8_e4m3fn: its tile has a whole group."""
    return fp8 == "native" and tile.first.block_n == _GROUP


def _bytes(tensor: Tensor, fp8: Fp8) -> Tensor:
    return tensor.view(torch.uint8) if fp8 == "bits" else tensor


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for a kernel that will not read it, where there is no tensor."""
    return other if tensor is None else tensor


def first(
    operands: Operands, slots: Slots, experts: ExpertArgs, tile: ExpertTile
) -> tuple[Tensor, Tensor | None]:
    """The intermediate by place, (P, I), and its scales (P, I / 128) where it is quantised."""
    x, scale, local, gemm = operands.hidden, operands.hidden_scale, slots.sorted, tile.first
    width, places = operands.second.shape[2], local.slots.shape[0]
    quantize = quantizes(tile, operands.fp8)
    dtype = torch.float8_e4m3fn if quantize else torch.bfloat16
    hidden = torch.empty((places, width), dtype=dtype, device=x.device)
    hidden_scale = None
    if quantize:
        hidden_scale = torch.empty((places, width // _GROUP), dtype=torch.float32, device=x.device)
    blocks = local.block_experts.shape[0]
    first_kernel[(blocks * triton.cdiv(width, gemm.block_n),)](
        _bytes(x, operands.fp8),
        _or(scale, x),
        _bytes(operands.first, operands.fp8),
        _or(operands.first_scale, x),
        _or(experts.gemm1_bias, x),
        slots.weights,
        _or(experts.gemm1_alpha, x),
        _or(experts.gemm1_beta, x),
        _or(experts.gemm1_clamp_limit, x),
        hidden,
        _or(hidden_scale, x),
        local.slots,
        local.block_experts,
        slots.ids.numel(),
        blocks,
        x.stride(0),
        0 if scale is None else scale.stride(1),
        0 if scale is None else scale.stride(0),
        SLOTS=slots.ids.shape[1],
        H=x.shape[1],
        I=width,
        KIND=experts.activation_type,
        HALVES=2 if is_gated_type(experts.activation_type) else 1,
        HAS_ALPHA=experts.gemm1_alpha is not None,
        HAS_BETA=experts.gemm1_beta is not None,
        HAS_LIMIT=experts.gemm1_clamp_limit is not None,
        HAS_BIAS=experts.gemm1_bias is not None,
        ON_INPUT=slots.on_input,
        FP8=operands.fp8,
        SCALED=scale is not None,
        QUANTIZE=quantize,
        BLOCK_M=tile.block_m,
        BLOCK_N=gemm.block_n,
        BLOCK_K=gemm.block_k,
        GROUP_M=gemm.group_m,
        DEVICE=not INTERPRETED,
        num_warps=gemm.warps,
        num_stages=gemm.stages,
    )
    return hidden, hidden_scale


def second(
    operands: Operands,
    slots: Slots,
    experts: ExpertArgs,
    tile: ExpertTile,
    intermediate: tuple[Tensor, Tensor | None],
) -> Tensor:
    """(T * k, H) bfloat16 from what `first` gave."""
    local, gemm = slots.sorted, tile.second
    hidden, hidden_scale = intermediate
    _, height, width = operands.second.shape
    out = torch.empty((slots.ids.numel(), height), dtype=torch.bfloat16, device=hidden.device)
    blocks = local.block_experts.shape[0]
    second_kernel[(blocks * triton.cdiv(height, gemm.block_n),)](
        hidden,
        _or(hidden_scale, hidden),
        _bytes(operands.second, operands.fp8),
        _or(operands.second_scale, hidden),
        _or(experts.gemm2_bias, hidden),
        out,
        local.slots,
        local.block_experts,
        slots.ids.numel(),
        blocks,
        H=height,
        I=width,
        HAS_BIAS=experts.gemm2_bias is not None,
        FP8=operands.fp8,
        QUANTIZED=hidden_scale is not None,
        BLOCK_M=tile.block_m,
        BLOCK_N=gemm.block_n,
        BLOCK_K=gemm.block_k,
        GROUP_M=gemm.group_m,
        DEVICE=not INTERPRETED,
        num_warps=gemm.warps,
        num_stages=gemm.stages,
    )
    return out
