"""Triton: activations into the formats other than DeepSeek's blocks, one launch for what PyTorch takes a dozen.

With PACK above 0 a kernel writes what the format makes of the values, in bfloat16 and PACK parts, as the
grouped weight formats read them: in one launch what `typed_moe.kernels._triton_widen` makes of the stored.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from typed_moe.kernels._triton_experts import largest, to_e4m3
from typed_moe.kernels._triton_formats import e2m1, e4m3, e8m0
from typed_moe.kernels._triton_slots import follow

_WHOLE_NUMBERS = tl.constexpr(12582912.0)
"""1.5 * 2^23, next to which a float32 has no fraction: added and taken away it rounds, ties to even."""
_E2M1_LARGEST = tl.constexpr(6.0)
_E4M3_SMALLEST = tl.constexpr(2.0**-9)


@triton.jit
def rounded(x: tl.tensor) -> tl.tensor:
    """The nearest whole number, ties to even, of what is under 2^22."""
    return (x + _WHOLE_NUMBERS) - _WHOLE_NUMBERS


@triton.jit
def to_e2m1(x: tl.tensor) -> tl.tensor:
    """The nearest code: the least of three rounded lines, as `typed_moe.quantization` has it."""
    a = tl.abs(x)
    a = tl.where(a > _E2M1_LARGEST, _E2M1_LARGEST, a)
    a = tl.where(a == a, a, 0.0)  # noqa: PLR0124 - NaN has no code; its group's scale says it
    code = tl.minimum(rounded(a * 2.0), rounded(a) + 2.0)
    code = tl.minimum(code, rounded(a * 0.5) + 4.0).to(tl.int32)
    sign = x.to(tl.int32, bitcast=True) >> 31
    return code | (sign & 8)


@triton.jit
def store_parts(
    out_ptr: tl.tensor,
    row: tl.tensor,
    values: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    PACK: tl.constexpr,
) -> None:
    """VALUES columns of a row from `first` on, exact in bfloat16, to the row's PACK parts."""
    VALUES: tl.constexpr = values.shape[0] * values.shape[1]
    values = tl.reshape(values, [VALUES // PACK, PACK])
    within = first // PACK + tl.arange(0, VALUES // PACK)[:, None]
    part = tl.arange(0, PACK)[None, :]
    out_at = out_ptr + row * H + part * (H // PACK) + within
    tl.store(out_at, values.to(tl.bfloat16), mask=within < H // PACK)


@triton.jit
def quantize_tensor_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row to float8_e4m3fn by one static scale."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + row * x_stride + at, mask=at < H, other=0.0).to(tl.float32)
    quotient = tl.div_rn(x, tl.broadcast_to(tl.load(scale_ptr), x.shape))
    tl.store(out_ptr + row * H + at, to_e4m3(quotient, DEVICE), mask=at < H)


@triton.jit
def quantize_mx_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """GROUPS groups of 32 values of one row to float8_e4m3fn and E8M0 bytes, by the floor rule."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_ptr + row * x_stride + at, mask=at < H, other=0.0).to(tl.float32)
    # The exponent's bits; E4M3's largest value has the exponent 8.
    exponent = largest(x).to(tl.int32, bitcast=True) >> 23
    scale = tl.where(exponent == 255, 255, tl.maximum(exponent - 8, 0))
    bits = tl.where(scale == 255, 0x7FC00000, -(scale - 254) << 23)
    inverse = bits.to(tl.float32, bitcast=True)
    data = to_e4m3(x * inverse[:, None], DEVICE)
    if PACK > 0:
        values = e4m3(data.to(tl.uint8, bitcast=True)) * e8m0(scale)[:, None]
        store_parts(out_ptr, row, values, tl.program_id(1) * GROUPS * 32, H, PACK)
    else:
        tl.store(out_ptr + row * H + at, data, mask=at < H)
        tl.store(scale_ptr + row * (H // 32) + group, scale.to(tl.uint8), mask=group < H // 32)


@triton.jit
def quantize_nvfp4_kernel(
    x_ptr: tl.tensor,
    global_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """GROUPS groups of 16 values of one row to packed E2M1 and E4M3 scales under a static one."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    pair = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = pair * 2 < H
    even_at = x_ptr + row * x_stride + pair * 2
    even = tl.load(even_at, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(even_at + 1, mask=inside, other=0.0).to(tl.float32)
    whole = tl.load(global_scale_ptr)
    amax = largest(even)
    other = largest(odd)
    # A comparison with NaN is false: either one stays.
    amax = tl.where(amax < other, other, tl.where(other == other, amax, other))  # noqa: PLR0124
    wanted = tl.div_rn(amax, tl.full(amax.shape, _E2M1_LARGEST, tl.float32))
    wanted = tl.div_rn(wanted, tl.broadcast_to(whole, amax.shape))
    wanted = tl.where(wanted < _E4M3_SMALLEST, _E4M3_SMALLEST, wanted)
    scale = to_e4m3(wanted, DEVICE)
    multiplier = tl.broadcast_to((scale.to(tl.float32) * whole)[:, None], even.shape)
    low, high = to_e2m1(tl.div_rn(even, multiplier)), to_e2m1(tl.div_rn(odd, multiplier))
    if PACK > 0:
        worth = e4m3(scale.to(tl.uint8, bitcast=True))[:, None]
        values = tl.reshape(tl.join(e2m1(low) * worth, e2m1(high) * worth), [GROUPS, 16])
        store_parts(out_ptr, row, values, tl.program_id(1) * GROUPS * 16, H, PACK)
    else:
        tl.store(out_ptr + row * (H // 2) + pair, (low | high << 4).to(tl.uint8), mask=inside)
        tl.store(scale_ptr + row * (H // 16) + group, scale, mask=group < H // 16)
