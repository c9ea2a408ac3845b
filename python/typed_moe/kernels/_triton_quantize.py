"""Triton: activations into every format, one launch for what PyTorch takes a dozen.

Or no launch at all: beside few tokens' routing, by programs of its own launch (`_triton_route`).

With PACK above 0 it is what the format makes of the values that is written, in bfloat16 and PACK parts, as
the grouped weight formats read them: what `typed_moe.kernels._triton_widen` makes of the stored. It is
rounded in float32 (`on_e4m3`). By way of the bytes of a float8_e4m3fn that a conversion has just made, some
came out wrong on an H100: ptxas 12.8, which Triton 3.6 brings, reads one from a register that nothing wrote.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from typed_moe.kernels._triton_experts import group_scale, largest, on_e4m3, to_e4m3
from typed_moe.kernels._triton_formats import e2m1, e8m0
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
    out_at: tl.tensor,
    values: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    PACK: tl.constexpr,
) -> None:
    """A row's columns from `first` on, exact in bfloat16, to its PACK parts."""
    VALUES: tl.constexpr = values.shape[0] * values.shape[1]
    values = tl.reshape(values, [VALUES // PACK, PACK])
    within = first // PACK + tl.arange(0, VALUES // PACK)[:, None]
    part = tl.arange(0, PACK)[None, :]
    tl.store(out_at + part * (H // PACK) + within, values.to(tl.bfloat16), mask=within < H // PACK)


@triton.jit
def quantize_tensor(
    x_at: tl.tensor,
    given_ptr: tl.tensor,
    out_at: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    VALUES: tl.constexpr,
    DEVICE: tl.constexpr,
) -> None:
    """To float8_e4m3fn by one static scale."""
    at = first + tl.arange(0, VALUES)
    x = tl.load(x_at + at, mask=at < H, other=0.0).to(tl.float32)
    quotient = tl.div_rn(x, tl.broadcast_to(tl.load(given_ptr), x.shape))
    tl.store(out_at + at, to_e4m3(quotient, DEVICE), mask=at < H)


@triton.jit
def quantize_block(
    x_at: tl.tensor,
    out_at: tl.tensor,
    scale_at: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    VALUES: tl.constexpr,
    DEVICE: tl.constexpr,
) -> None:
    """Groups of 128 to float8_e4m3fn and float32 scales, as `quantize_kernel` does."""
    group = first // 128 + tl.arange(0, VALUES // 128)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x = tl.load(x_at + at, mask=at < H, other=0.0).to(tl.float32)
    scale = group_scale(x)
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(out_at + at, to_e4m3(quotient, DEVICE), mask=at < H)
    tl.store(scale_at + group, scale, mask=group < H // 128)


@triton.jit
def quantize_mxfp8(
    x_at: tl.tensor,
    out_at: tl.tensor,
    scale_at: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    VALUES: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
) -> None:
    """Groups of 32 to float8_e4m3fn and E8M0 bytes, by the floor rule."""
    group = first // 32 + tl.arange(0, VALUES // 32)
    at = group[:, None] * 32 + tl.arange(0, 32)[None, :]
    x = tl.load(x_at + at, mask=at < H, other=0.0).to(tl.float32)
    # The exponent's bits; E4M3's largest value has the exponent 8.
    exponent = largest(x).to(tl.int32, bitcast=True) >> 23
    scale = tl.where(exponent == 255, 255, tl.maximum(exponent - 8, 0))
    bits = tl.where(scale == 255, 0x7FC00000, -(scale - 254) << 23)
    inverse = bits.to(tl.float32, bitcast=True)
    quotient = x * inverse[:, None]
    if PACK > 0:
        store_parts(out_at, on_e4m3(quotient) * e8m0(scale)[:, None], first, H, PACK)
    else:
        tl.store(out_at + at, to_e4m3(quotient, DEVICE), mask=at < H)
        tl.store(scale_at + group, scale.to(tl.uint8), mask=group < H // 32)


@triton.jit
def quantize_nvfp4(
    x_at: tl.tensor,
    given_ptr: tl.tensor,
    out_at: tl.tensor,
    scale_at: tl.tensor,
    first: tl.tensor,
    H: tl.constexpr,
    VALUES: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
) -> None:
    """Groups of 16 to packed E2M1 and E4M3 scales under a static one."""
    group = first // 16 + tl.arange(0, VALUES // 16)
    pair = group[:, None] * 8 + tl.arange(0, 8)[None, :]
    inside = pair * 2 < H
    even = tl.load(x_at + pair * 2, mask=inside, other=0.0).to(tl.float32)
    odd = tl.load(x_at + pair * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    whole = tl.load(given_ptr)
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
        worth = on_e4m3(wanted)[:, None]
        values = tl.reshape(tl.join(e2m1(low) * worth, e2m1(high) * worth), [VALUES // 16, 16])
        store_parts(out_at, values, first, H, PACK)
    else:
        tl.store(out_at + pair, (low | high << 4).to(tl.uint8), mask=inside)
        tl.store(scale_at + group, scale, mask=group < H // 16)


@triton.jit
def quantize_part(
    x_ptr: tl.tensor,
    given_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    part: tl.tensor,
    H: tl.constexpr,
    FORM: tl.constexpr,
    VALUES: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
) -> None:
    """VALUES values of one row, of (T, H) cut into so many.

    FORM: "tensor", "block", "mxfp8", "nvfp4"; or "parts", bfloat16 that is put in PACK parts.
    """
    PARTS: tl.constexpr = (H + VALUES - 1) // VALUES
    row = (part // PARTS).to(tl.int64)
    first = part % PARTS * VALUES
    x_at = x_ptr + row * x_stride
    if FORM == "tensor":
        quantize_tensor(x_at, given_ptr, out_ptr + row * H, first, H, VALUES, DEVICE)
    elif FORM == "block":
        scale_at = scale_ptr + row * (H // 128)
        quantize_block(x_at, out_ptr + row * H, scale_at, first, H, VALUES, DEVICE)
    elif FORM == "mxfp8":
        scale_at = scale_ptr + row * (H // 32)
        quantize_mxfp8(x_at, out_ptr + row * H, scale_at, first, H, VALUES, PACK, DEVICE)
    elif FORM == "nvfp4":
        out_at = out_ptr + row * (H if PACK > 0 else H // 2)
        scale_at = scale_ptr + row * (H // 16)
        quantize_nvfp4(x_at, given_ptr, out_at, scale_at, first, H, VALUES, PACK, DEVICE)
    else:
        at = first + tl.arange(0, VALUES)
        x = tl.load(x_at + at, mask=at < H, other=0.0)
        store_parts(out_ptr + row * H, x[:, None], first, H, PACK)


@triton.jit
def quantize_parts_kernel(
    x_ptr: tl.tensor,
    given_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    H: tl.constexpr,
    FORM: tl.constexpr,
    VALUES: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A program for each part: `quantize_part`."""
    follow(PDL)
    quantize_part(
        x_ptr,
        given_ptr,
        out_ptr,
        scale_ptr,
        x_stride,
        tl.program_id(0),
        H,
        FORM,
        VALUES,
        PACK,
        DEVICE,
    )
