"""Triton: weights that have a scale for every few values of the sum, in bfloat16 by way of registers.

MXFP8 and MXFP4 have a power of two for 32 values, NVFP4 a float8_e4m3fn for 16. A value times its scale
has at most six significant bits, so that it is exact in bfloat16, and the product runs on the card's
bfloat16 units. `tl.dot_scaled` does as much for E8M0 below compute capability 10.0, but in 3.6 not for
E4M3, and the interpreter has none.

Two FP4 values share a byte. Taking a tile of bytes apart along the sum would move it between threads.
It is cheaper to multiply twice: the low nibbles, which are the even values, with x's even columns, and
the high ones with its odd columns. For that x stands in two halves, even columns first
(`typed_moe.kernels._triton_widen`); so does the intermediate.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_FROM_E4M3 = tl.constexpr(2.0**120)
"""From an exponent that counts from 127 to E4M3's, which counts from 7."""
_TO_FIELDS = tl.constexpr(2.0**-120)
_FROM_E2M1 = tl.constexpr(2.0**126)
"""The same for E2M1's, which counts from 1."""

_SUNK = tl.constexpr(2.0**32)
"""By how much weights are kept smaller than they are, so that their scale and the difference of the
exponents' beginnings are one factor in bfloat16; the sums are multiplied by it in float32."""
_E2M1_LIFT = tl.constexpr(2.0**94)
_E2M1_EXPONENT = tl.constexpr(94)
_E2M1_LARGEST = tl.constexpr(255 - 94)
_E4M3_EXPONENT = tl.constexpr(88)
_E4M3_LARGEST = tl.constexpr(255 - 88)
"""126 and 120, less 32: what a group's factor has beyond its scale, and what is infinity with it."""

_FP4_PAIRS = tl.constexpr(
    """
    {
        .reg .b32 t, m, w;
        mov.b32 w, $4;
        prmt.b32 t, w, 0, 0x1404;
        and.b32 m, t, 0x70007000;
        shr.b32 m, m, 6;
        lop3.b32 $2, t, 0x80008000, m, 0xEA;
        shl.b32 t, t, 4;
        and.b32 m, t, 0x70007000;
        shr.b32 m, m, 6;
        lop3.b32 $0, t, 0x80008000, m, 0xEA;
        prmt.b32 t, w, 0, 0x3424;
        and.b32 m, t, 0x70007000;
        shr.b32 m, m, 6;
        lop3.b32 $3, t, 0x80008000, m, 0xEA;
        shl.b32 t, t, 4;
        and.b32 m, t, 0x70007000;
        shr.b32 m, m, 6;
        lop3.b32 $1, t, 0x80008000, m, 0xEA;
    }
    """
)
"""Four bytes to the fields of four bfloat16 of their low nibbles ($0, $1) and of their high ones ($2,
$3): two bytes are put into the upper bytes of a register's halves, where a nibble's sign is a bfloat16's
and its magnitude has to be moved down by six (lop3 0xEA: a & b | c)."""

_FP8_PAIRS = tl.constexpr(
    """
    {
        .reg .b32 t, m, n, w;
        mov.b32 w, $2;
        prmt.b32 t, w, 0, 0x1404;
        shr.b32 m, t, 4;
        and.b32 m, m, 0x07F007F0;
        add.u32 n, m, 0x00100010;
        and.b32 n, n, 0x08000800;
        and.b32 t, t, 0x80008000;
        or.b32 m, m, t;
        shl.b32 t, n, 4;
        sub.u32 t, t, n;
        or.b32 $0, m, t;
        prmt.b32 t, w, 0, 0x3424;
        shr.b32 m, t, 4;
        and.b32 m, m, 0x07F007F0;
        add.u32 n, m, 0x00100010;
        and.b32 n, n, 0x08000800;
        and.b32 t, t, 0x80008000;
        or.b32 m, m, t;
        shl.b32 t, n, 4;
        sub.u32 t, t, n;
        or.b32 $1, m, t;
    }
    """
)
"""Four bytes of E4M3 to the fields of four bfloat16, likewise. Where all seven bits are set, which is
NaN, the sum with one unit carries, and the carry fills up the exponent."""


@triton.jit
def e4m3(byte: tl.tensor) -> tl.tensor:
    """What a byte of float8_e4m3fn is worth, in float32.

    Its three fields are put where a float32 has them; the exponent is then off by a constant, which
    subnormals share. 0x7F and 0xFF are NaN.
    """
    bits = byte.to(tl.int32)
    moved = (bits & 0x80) << 24 | (bits & 0x7F) << 20
    value = moved.to(tl.float32, bitcast=True) * _FROM_E4M3
    return tl.where((bits & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def e8m0(byte: tl.tensor) -> tl.tensor:
    """2^(byte - 127) in float32: a bare exponent, but for 0, which is subnormal there, and 255, NaN."""
    bits = byte.to(tl.int32)
    moved = tl.where(bits == 0, 0x400000, tl.where(bits == 255, 0x7FC00000, bits << 23))
    return moved.to(tl.float32, bitcast=True)


@triton.jit
def fields_e2m1(code: tl.tensor) -> tl.tensor:
    """`e2m1` over 2^126."""
    bits = code.to(tl.int32)
    return ((bits & 8) << 28 | (bits & 7) << 22).to(tl.float32, bitcast=True)


@triton.jit
def e2m1(code: tl.tensor) -> tl.tensor:
    """What the low four bits of a code are worth, in float32, likewise."""
    return fields_e2m1(code) * _FROM_E2M1


@triton.jit
def factors(byte: tl.tensor, WEIGHTS: tl.constexpr, DEVICE: tl.constexpr) -> tl.tensor:
    """By what a group's fields are multiplied to be values over 2^32: bfloat16, exactly.

    An E8M0 scale of more than 2^33 (2^39 for MXFP8), NaN among them, is infinity.
    """
    if WEIGHTS == "nvfp4":
        factor = e4m3(byte) * _E2M1_LIFT
    elif WEIGHTS == "mxfp4":
        exponent = tl.minimum(byte.to(tl.int32), _E2M1_LARGEST) + _E2M1_EXPONENT
        factor = (exponent << 23).to(tl.float32, bitcast=True)
    else:
        exponent = tl.minimum(byte.to(tl.int32), _E4M3_LARGEST) + _E4M3_EXPONENT
        factor = (exponent << 23).to(tl.float32, bitcast=True)
    if DEVICE:
        return factor.to(tl.bfloat16)
    else:
        return factor


@triton.jit
def fp4_pairs(
    packed: tl.tensor, factor: tl.tensor, DEVICE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The low and the high nibbles of a tile of bytes times their factors, in bfloat16."""
    if DEVICE:
        # Two values to a register: at decode the instructions are as near their limit as memory is.
        low, high = tl.inline_asm_elementwise(
            _FP4_PAIRS, "=r,=r,=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
        return low * factor, high * factor
    else:
        low = (fields_e2m1(packed) * factor).to(tl.bfloat16)
        return low, (fields_e2m1(packed >> 4) * factor).to(tl.bfloat16)


@triton.jit
def fp8_values(data: tl.tensor, factor: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """A tile of E4M3 bytes times their factors, in bfloat16."""
    if DEVICE:
        fields = tl.inline_asm_elementwise(
            _FP8_PAIRS, "=r,=r,r", [data], tl.bfloat16, is_pure=True, pack=4
        )
        return fields * factor
    else:
        return (e4m3(data) * _TO_FIELDS * factor).to(tl.bfloat16)


@triton.jit
def load_halves(
    at: tl.tensor,
    used: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(BLOCK_M, BLOCK_K / PACK) of x twice: its even and its odd columns, or the same where PACK is 1."""
    low = load_rows(at, used, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
    if PACK == 1:
        return low, low
    else:
        high_at = at + WIDTH // PACK
        return low, load_rows(high_at, used, start // PACK, WIDTH // PACK, BLOCK_K // PACK)


@triton.jit
def load_rows(
    at: tl.tensor,
    used: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_M, BLOCK_K) of an operand whose rows are WIDTH wide; zeros where there is none."""
    if WIDTH % BLOCK_K == 0:
        return tl.load(at + start, mask=used[:, None], other=0.0)
    else:
        inside = tl.arange(0, BLOCK_K) < WIDTH - start
        return tl.load(at + start, mask=used[:, None] & inside[None, :], other=0.0)


@triton.jit
def load_bytes(at: tl.tensor, start: int, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """(BLOCK_K, BLOCK_N) bytes of rows that have WIDTH of them, turned; zeros behind the last."""
    if WIDTH % BLOCK_K == 0:
        return tl.load(at + start)
    else:
        inside = tl.arange(0, BLOCK_K) < WIDTH - start
        return tl.load(at + start, mask=inside[:, None], other=0)


@triton.jit
def load_scales_at(
    at: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_K / GROUP, BLOCK_N) scales of a step, as bytes."""
    return load_bytes(at, start // GROUP, WIDTH // GROUP, BLOCK_K // GROUP)


@triton.jit
def load_next_scales(
    at: tl.tensor, start: int, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Those of the step behind this one; zeros where there is none."""
    inside = tl.arange(0, BLOCK_K // GROUP) < (WIDTH - BLOCK_K - start) // GROUP
    return tl.load(at + BLOCK_K // GROUP + start // GROUP, mask=inside[:, None], other=0)


@triton.jit
def grouped_step(
    total: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    weight_at: tl.tensor,
    byte: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tl.tensor:
    """total + x @ weights over BLOCK_K values of the sum.

    x comes in halves as `load_halves` gives it; byte: (BLOCK_K / GROUP, BLOCK_N), the scales.
    """
    data = load_bytes(weight_at, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
    scale = factors(byte, WEIGHTS, DEVICE)
    scale = tl.broadcast_to(scale[:, None, :], [BLOCK_K // GROUP, GROUP // PACK, BLOCK_N])
    scale = tl.reshape(scale, [BLOCK_K // PACK, BLOCK_N])
    if PACK == 2:
        even, odd = fp4_pairs(data, scale, DEVICE)
        return widened(high, odd, widened(low, even, total, DEVICE), DEVICE)
    else:
        return widened(low, fp8_values(data, scale, DEVICE), total, DEVICE)


@triton.jit
def widened(a: tl.tensor, b: tl.tensor, total: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """total + a @ b in float32, of bfloat16; the interpreter, which has none, takes float32."""
    if DEVICE:
        return tl.dot(a, b, total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def grouped_sums(
    x_at: tl.tensor,
    used: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row: tl.tensor,
    BETWEEN: tl.constexpr,
    HALVES: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    EARLY: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """x @ w^T twice: for the matrix rows `row` and those BETWEEN further on; HALVES 1: nothing, and `row`.

    x_at: (BLOCK_M,) where each row of x begins; its rows, and those of the matrix, have WIDTH values.
    EARLY: a step's scales are loaded while the one before it runs. Triton's pipeline does as much with
    loads of four bytes a thread and more, and leaves out smaller ones.
    """
    k = tl.arange(0, BLOCK_K // PACK)
    group = tl.arange(0, BLOCK_K // GROUP)
    at = x_at[:, None] + k[None, :]
    gate_at = weight_ptr + row[None, :] * (WIDTH // PACK) + k[:, None]
    gate_scale_at = scale_ptr + row[None, :] * (WIDTH // GROUP) + group[:, None]
    up_at = gate_at + (HALVES - 1) * BETWEEN * (WIDTH // PACK)
    up_scale_at = gate_scale_at + (HALVES - 1) * BETWEEN * (WIDTH // GROUP)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up_scale = load_scales_at(up_scale_at, 0, WIDTH, GROUP, BLOCK_K)
    gate_scale = load_scales_at(gate_scale_at, 0, WIDTH, GROUP, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_K):
        if EARLY:
            next_up = load_next_scales(up_scale_at, start, WIDTH, GROUP, BLOCK_K)
            next_gate = load_next_scales(gate_scale_at, start, WIDTH, GROUP, BLOCK_K)
        else:
            up_scale = load_scales_at(up_scale_at, start, WIDTH, GROUP, BLOCK_K)
            gate_scale = load_scales_at(gate_scale_at, start, WIDTH, GROUP, BLOCK_K)
            next_up = up_scale
            next_gate = gate_scale
        low, high = load_halves(at, used, start, WIDTH, BLOCK_K, PACK)
        up = grouped_step(
            up,
            low,
            high,
            up_at,
            up_scale,
            start,
            WIDTH,
            WEIGHTS,
            GROUP,
            PACK,
            BLOCK_N,
            BLOCK_K,
            DEVICE,
        )
        if HALVES == 2:
            gate = grouped_step(
                gate,
                low,
                high,
                gate_at,
                gate_scale,
                start,
                WIDTH,
                WEIGHTS,
                GROUP,
                PACK,
                BLOCK_N,
                BLOCK_K,
                DEVICE,
            )
        up_scale = next_up
        gate_scale = next_gate
    return gate * _SUNK, up * _SUNK


@triton.jit
def halves_to_rows(column: tl.tensor, WIDTH: tl.constexpr, PACK: tl.constexpr) -> tl.tensor:
    """The matrix's row of each column of the intermediate: its even ones first where PACK is 2."""
    if PACK == 1:
        return column
    else:
        half = column // (WIDTH // 2)
        return (column - half * (WIDTH // 2)) * 2 + half
