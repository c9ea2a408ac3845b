"""Rows of one matrix into each format and back; weights and activations share these.

Everything here is elementwise or a reduction over a group, on any device, without a host
synchronisation. Division by the scale rather than multiplication by its reciprocal: the
quotient is then the correctly rounded one.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from typed_moe.quantization._e2m1 import (
    E2M1_MAX,
    e2m1_decode,
    e2m1_encode,
    pack_nibbles,
    unpack_nibbles,
)
from typed_moe.quantization._e8m0 import e8m0_decode, e8m0_from_amax, e8m0_reciprocal
from typed_moe.quantization._int4 import INT4_MAX, INT4_MIN, int4_decode, int4_encode
from typed_moe.quantization._scales import E4M3_MAX, SMALLEST_NORMAL, float_scale, quotient

FP8_BLOCK = 128
MX_GROUP = 32
NVFP4_GROUP = 16
_E4M3_EXPONENT = 8  # 448 = 1.75 * 2^8
_E2M1_EXPONENT = 2  # 6 = 1.5 * 2^2
_E4M3_SMALLEST = 2.0**-9


def to_e4m3(values: Tensor) -> Tensor:
    """float8_e4m3fn, saturated at 448; NaN stays NaN.

    The clamp can go once torch 2.11 is out of support: its cast overflows (pytorch#178817).
    """
    return values.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _grouped(rows: Tensor, group: int) -> Tensor:
    """(..., K) as (..., K/group, group); the count is written out because T may be 0."""
    return rows.reshape(*rows.shape[:-1], rows.shape[-1] // group, group)


def quantize_fp8_per_tensor(rows: Tensor, scale: Tensor) -> Tensor:
    """float32 (..., K) divided by one scale, as float8_e4m3fn."""
    return to_e4m3(rows / scale)


def quantize_fp8_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (R, K) to float8_e4m3fn (R, K) and float32 (R,), the row's amax / 448."""
    scale = float_scale(rows.abs().amax(dim=-1), E4M3_MAX)
    return to_e4m3(rows / scale.unsqueeze(-1)), scale


def dequantize_fp8_rows(data: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize_fp8_rows`: float32 (R, K)."""
    return data.to(torch.float32) * scale.unsqueeze(-1)


def quantize_fp8_blocks(rows: Tensor, block_rows: int) -> tuple[Tensor, Tensor]:
    """One float32 scale for each block of `block_rows` x 128; edge blocks may be smaller.

    Args:
        rows: float32 (R, K).
        block_rows: 128 for weights, 1 for activations.

    Returns:
        float8_e4m3fn (R, K), float32 (ceil(R / block_rows), ceil(K / 128)).
    """
    num_rows, num_columns = rows.shape
    row_blocks, column_blocks = -(-num_rows // block_rows), -(-num_columns // FP8_BLOCK)
    padded = (row_blocks * block_rows, column_blocks * FP8_BLOCK)
    if padded != (num_rows, num_columns):
        rows = functional.pad(rows, (0, padded[1] - num_columns, 0, padded[0] - num_rows))
    blocks = rows.reshape(row_blocks, block_rows, column_blocks, FP8_BLOCK)
    scale = float_scale(blocks.abs().amax(dim=(1, 3)), E4M3_MAX)
    data = to_e4m3(blocks / scale[:, None, :, None]).reshape(padded)
    return data[:num_rows, :num_columns].contiguous(), scale


def dequantize_fp8_blocks(data: Tensor, scale: Tensor, block_rows: int) -> Tensor:
    """The inverse of `quantize_fp8_blocks`: float32 (R, K)."""
    num_rows, num_columns = data.shape
    expanded = scale.repeat_interleave(FP8_BLOCK, dim=1, output_size=scale.shape[1] * FP8_BLOCK)
    if block_rows > 1:
        size = scale.shape[0] * block_rows
        expanded = expanded.repeat_interleave(block_rows, dim=0, output_size=size)
    return data.to(torch.float32) * expanded[:num_rows, :num_columns]


def quantize_mxfp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (..., K) to float8_e4m3fn (..., K) and E8M0 bytes (..., K/32)."""
    groups = _grouped(rows, MX_GROUP)
    scale = e8m0_from_amax(groups.abs().amax(dim=-1), _E4M3_EXPONENT)
    return to_e4m3(groups * e8m0_reciprocal(scale).unsqueeze(-1)).flatten(-2), scale


def dequantize_mxfp8(data: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize_mxfp8`: float32 (..., K)."""
    groups = _grouped(data.to(torch.float32), MX_GROUP)
    return (groups * e8m0_decode(scale).unsqueeze(-1)).flatten(-2)


def quantize_mxfp4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (..., K) to packed E2M1 (..., K/2) and E8M0 bytes (..., K/32)."""
    groups = _grouped(rows, MX_GROUP)
    scale = e8m0_from_amax(groups.abs().amax(dim=-1), _E2M1_EXPONENT)
    codes = e2m1_encode(groups * e8m0_reciprocal(scale).unsqueeze(-1))
    return pack_nibbles(codes.flatten(-2)), scale


def dequantize_mxfp4(data: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize_mxfp4`: float32 (..., K)."""
    groups = _grouped(e2m1_decode(unpack_nibbles(data)), MX_GROUP)
    return (groups * e8m0_decode(scale).unsqueeze(-1)).flatten(-2)


def quantize_mxint4(rows: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (..., K) to packed int4 (..., K/2) and bfloat16 scales (..., K/32).

    A group's scale brings its largest value to 7 or its smallest to -8, whichever asks for more,
    and is rounded to bfloat16 before the values are divided by it: what a kernel multiplies with.
    Not under 2^-126, and 1 for zeros.
    """
    groups = _grouped(rows, MX_GROUP)
    low, high = groups.amin(dim=-1), groups.amax(dim=-1)
    wanted = torch.maximum(quotient(high, INT4_MAX), quotient(low, INT4_MIN))
    scale = torch.where(wanted == 0.0, 1.0, wanted.clamp(min=SMALLEST_NORMAL)).to(torch.bfloat16)
    codes = int4_encode(groups / scale.to(torch.float32).unsqueeze(-1))
    return pack_nibbles(codes.flatten(-2)), scale


def dequantize_mxint4(data: Tensor, scale: Tensor) -> Tensor:
    """The inverse of `quantize_mxint4`: float32 (..., K)."""
    groups = _grouped(int4_decode(unpack_nibbles(data)), MX_GROUP)
    return (groups * scale.to(torch.float32).unsqueeze(-1)).flatten(-2)


def quantize_nvfp4(rows: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (..., K) to packed E2M1 (..., K/2) and float8_e4m3fn scales (..., K/16).

    A group's scale is amax / 6 / global_scale, rounded to E4M3 and held between 2^-9 and 448:
    a scale of 0, which a small group would round to, cannot be divided by.
    """
    groups = _grouped(rows, NVFP4_GROUP)
    wanted = quotient(groups.abs().amax(dim=-1), E2M1_MAX) / global_scale
    scale = to_e4m3(wanted.clamp(min=_E4M3_SMALLEST))
    multiplier = scale.to(torch.float32) * global_scale
    return pack_nibbles(e2m1_encode(groups / multiplier.unsqueeze(-1)).flatten(-2)), scale


def dequantize_nvfp4(data: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """The inverse of `quantize_nvfp4`: float32 (..., K)."""
    groups = _grouped(e2m1_decode(unpack_nibbles(data)), NVFP4_GROUP)
    return (groups * scale.to(torch.float32).unsqueeze(-1)).flatten(-2) * global_scale
