"""Launching the Triton expert kernels: buffers, pointers and constants of one call.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from typed_moe.kernels import _triton_hopper_launch as hopper
from typed_moe.kernels._expert_operands import Fp8, Operands, Slots
from typed_moe.kernels._expert_tiles import FP8_BLOCK, ExpertTile, GemmTile, takes_left
from typed_moe.kernels._experts_math import is_gated_type
from typed_moe.kernels._fused_rules import ceil_div, power_of_two
from typed_moe.kernels._triton_experts import (
    combine_kernel,
    first_kernel,
    quantize_kernel,
    second_kernel,
)
from typed_moe.kernels._triton_inputs_launch import widen
from typed_moe.kernels._triton_launch import INTERPRETED, follows, on_device
from typed_moe.kernels.args import ExpertArgs

_GROUP = 128


def rows(operands: Operands, slots: Slots, experts: ExpertArgs, tile: ExpertTile) -> Tensor:
    """(T * k, H) bfloat16: each slot's expert's output; rows of no local expert are not written."""
    with on_device(operands.hidden.device):
        if operands.group and not operands.in_parts:
            operands = attrs.evolve(operands, hidden=widen(operands), hidden_scale=None)
        return second(operands, slots, experts, tile, first(operands, slots, experts, tile))


def combine(
    rows: Tensor, slots: Slots, output: Tensor | None, place: Tensor | None = None
) -> Tensor:
    """(T, H) bfloat16: the weighted sum over each token's slots, in `output` if it is given.

    `rows` are by slot, or, with `place` (T, k), by place.
    """
    tokens, count = slots.ids.shape
    width = rows.shape[1]
    if output is None:
        output = torch.empty((tokens, width), dtype=torch.bfloat16, device=rows.device)
    block = 256 if tokens < 128 else min(1024, power_of_two(width))
    local = slots.sorted
    with on_device(rows.device):
        combine_kernel[(tokens, ceil_div(width, block))](
            rows,
            _or(place, rows),
            slots.ids,
            slots.weights,
            output,
            local.first_local,
            local.counts.shape[0],
            H=width,
            SLOTS=count,
            WEIGHTED=not slots.on_input,
            BY_PLACE=place is not None,
            BLOCK=block,
            DEVICE=not INTERPRETED,
            num_warps=4 if block > 256 else 2,
            **follows(rows.device),
        )
    return output


def quantize(x: Tensor, slots: Slots | None = None) -> tuple[Tensor, Tensor]:
    """(R, H) floating point to float8_e4m3fn and (R, H / 128) float32.

    With `slots` the rows are places, and those without a slot are left as they are.
    """
    rows, width = x.shape
    groups = width // _GROUP
    data = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    if rows == 0:
        return data, scale
    # Loads of two rows in flight; places are looked up one by one.
    together, high = 8, 2 if slots is None else 1
    with on_device(x.device):
        quantize_kernel[(ceil_div(rows, high), ceil_div(groups, together))](
            x,
            data,
            scale,
            x if slots is None else slots.sorted.slots,
            x if slots is None else slots.sorted.block_experts,
            0 if slots is None else slots.ids.numel(),
            rows,
            x.stride(0),
            H=width,
            GROUPS=together,
            ROWS=high,
            BLOCK_M=0 if slots is None else slots.sorted.block_size,
            DEVICE=not INTERPRETED,
            num_warps=4,
            **follows(x.device),
        )
    return data, scale


def quantizes(operands: Operands, first: GemmTile) -> Literal["none", "tensor", "group"]:
    """Whether the first product writes float8_e4m3fn: its scale is static, or its tile a whole group."""
    if operands.fp8 != "native":
        return "none"  # bfloat16 is closer to exact arithmetic than any format asks for
    if operands.scales == "plain":
        return "tensor"
    return "group" if first.block_n == _GROUP else "none"


def _bytes(tensor: Tensor, fp8: Fp8) -> Tensor:
    return tensor.view(torch.uint8) if fp8 == "bits" else tensor


def _matrix(matrix: Tensor, operands: Operands) -> Tensor:
    """A matrix's elements as the kernels load them."""
    return matrix.view(torch.int16) if operands.group else _bytes(matrix, operands.fp8)


def _scales(scale: Tensor | None, operands: Operands) -> Tensor:
    """A matrix's scales likewise, or a pointer for a kernel that will not read it."""
    if scale is None:
        return operands.hidden
    return scale.view(torch.uint8) if operands.group else scale


def _tiles(matrix: Tensor, rows: int, gemm: GemmTile) -> Tensor | TensorDescriptor:
    """The matrix, or a descriptor of it whose tiles are `rows` high, for the card to copy by itself."""
    if not gemm.tma:
        return matrix
    flat = matrix.view(-1, matrix.shape[-1])
    return TensorDescriptor.from_tensor(flat, [rows, gemm.block_k])


def _gemm(tile: GemmTile, matrix: Tensor, operands: Operands) -> GemmTile:
    """The tile; without descriptors for a matrix that does not start on 16 bytes, which they need.

    And for weights that have a scale for every few values: they are taken apart in registers. FP8 that is
    converted there has single steps.
    """
    if tile.tma and (operands.group or matrix.data_ptr() % 16):
        return attrs.evolve(tile, tma=False)
    if operands.fp8 == "bits" and tile.block_k > FP8_BLOCK:
        return attrs.evolve(tile, block_k=FP8_BLOCK)
    return tile


def _portable(gemm: GemmTile) -> GemmTile:
    """What runs in place of a persistent kernel where there is none: half as wide, as its sums are in half the warps."""
    if not gemm.persistent:
        return gemm
    return attrs.evolve(gemm, persistent=False, block_n=gemm.block_n // 2, warps=4, stages=3)


def _left(operands: Operands, gemm: GemmTile, rows: int) -> bool:
    """Whether FP8 weights are a product's left operand; converted in registers they are the right one."""
    return operands.fp8 == "native" and takes_left(gemm, rows)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for a kernel that will not read it, where there is no tensor."""
    return other if tensor is None else tensor


def first(
    operands: Operands, slots: Slots, experts: ExpertArgs, tile: ExpertTile
) -> tuple[Tensor, Tensor | None]:
    """The intermediate by place, (P, I), and its scales (P, I / 128) where it is quantised.

    Quantised by the product where its scale is static or its tile has a whole group of 128, and by one
    more launch otherwise.
    """
    x, scale, local = operands.hidden, operands.hidden_scale, slots.sorted
    gemm = _gemm(tile.first, operands.first, operands)
    persistent = hopper.takes(x, operands.first, gemm, operands, slots)
    gemm = gemm if persistent else _portable(gemm)
    width, places = operands.width, local.slots.shape[0]
    fused, outputs = quantizes(operands, gemm), operands.outputs
    dtype = torch.bfloat16 if fused == "none" else torch.float8_e4m3fn
    hidden = torch.empty((places, width), dtype=dtype, device=x.device)
    hidden_scale = None
    if fused == "group":
        hidden_scale = torch.empty((places, width // _GROUP), dtype=torch.float32, device=x.device)
    if persistent:
        hopper.first(operands, slots, experts, tile, fused, hidden, hidden_scale)
        return hidden, hidden_scale
    blocks = local.block_experts.shape[0]
    first_kernel[(blocks * ceil_div(width, gemm.block_n),)](
        _bytes(x, operands.fp8),
        _or(scale, x),
        _tiles(_matrix(operands.first, operands), gemm.block_n, gemm),
        _scales(operands.first_scale, operands),
        _or(experts.gemm1_bias, x),
        slots.weights,
        _or(experts.gemm1_alpha, x),
        _or(experts.gemm1_beta, x),
        _or(experts.gemm1_clamp_limit, x),
        x if outputs is None else outputs.first,
        x if outputs is None else outputs.stored,
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
        HAS_OUTPUT_SCALE=outputs is not None,
        ON_INPUT=slots.on_input,
        FP8=operands.fp8,
        WEIGHTS=operands.scales,
        GROUP=operands.group,
        PACK=operands.pack,
        SCALED=scale is not None,
        QUANTIZE=fused,
        BLOCK_M=tile.block_m,
        BLOCK_N=gemm.block_n,
        BLOCK_K=gemm.block_k,
        GROUP_M=gemm.group_m,
        TMA=gemm.tma,
        LEFT=_left(operands, gemm, tile.block_m),
        DEVICE=not INTERPRETED,
        num_warps=gemm.warps,
        num_stages=gemm.stages,
        **follows(x.device),
    )
    if operands.fp8 == "native" and fused == "none":
        return quantize(hidden, slots)
    return hidden, hidden_scale


def second(
    operands: Operands,
    slots: Slots,
    experts: ExpertArgs,
    tile: ExpertTile,
    intermediate: tuple[Tensor, Tensor | None],
) -> Tensor:
    """(T * k, H) bfloat16 from what `first` gave."""
    local, outputs = slots.sorted, operands.outputs
    gemm = _gemm(tile.second, operands.second, operands)
    hidden, hidden_scale = intermediate
    height, width = operands.second.shape[1], operands.width
    out = torch.empty((slots.ids.numel(), height), dtype=torch.bfloat16, device=hidden.device)
    if hopper.takes(hidden, operands.second, gemm, operands, slots):
        hopper.second(operands, slots, experts, tile, intermediate, out)
        return out
    gemm = _portable(gemm)
    parts = tile.block_m // tile.second_rows
    blocks = local.block_experts.shape[0] * parts
    second_kernel[(blocks * ceil_div(height, gemm.block_n),)](
        _tiles(hidden, tile.second_rows, gemm),
        _or(hidden_scale, hidden),
        _tiles(_matrix(operands.second, operands), gemm.block_n, gemm),
        _scales(operands.second_scale, operands),
        _or(experts.gemm2_bias, hidden),
        hidden if outputs is None else outputs.second,
        out,
        local.slots,
        local.block_experts,
        slots.ids.numel(),
        blocks,
        H=height,
        I=width,
        HAS_BIAS=experts.gemm2_bias is not None,
        HAS_OUTPUT_SCALE=outputs is not None,
        FP8=operands.fp8,
        WEIGHTS=operands.scales,
        GROUP=operands.group,
        PACK=operands.pack,
        SCALED=hidden_scale is not None,
        PARTS=parts,
        BLOCK_M=tile.second_rows,
        BLOCK_N=gemm.block_n,
        BLOCK_K=gemm.block_k,
        GROUP_M=gemm.group_m,
        TMA=gemm.tma,
        LEFT=_left(operands, gemm, tile.second_rows),
        DEVICE=not INTERPRETED,
        num_warps=gemm.warps,
        num_stages=gemm.stages,
        **follows(hidden.device),
    )
    return out
