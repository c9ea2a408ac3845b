"""Triton: weights that have a scale for every few values of the sum, in bfloat16 by way of registers.

MXFP8 and MXFP4 have a power of two for 32 values, NVFP4 a float8_e4m3fn for 16. A value times its scale
has at most six significant bits, so that it is exact in bfloat16, and the product runs on the card's
bfloat16 units. `tl.dot_scaled` does as much for E8M0 below compute capability 10.0, but in 3.6 not for
E4M3, and the interpreter has none.

Weights are loaded as int16, PACK values each: four of FP4, two of FP8. That is as wide as the bfloat16
which they become, so that they come from shared memory in the order of a product's operand. Taking a tile
of them apart along the sum would move it between threads. It is cheaper to multiply PACK times: the lowest
values with x's columns 0, PACK, 2 PACK ..., the next ones with columns 1, PACK + 1 ... For that x stands in
PACK parts (`typed_moe.kernels._triton_widen`); so does the intermediate.

Weights are the left operand, whose rows are the matrix's: a product may take it from registers, where they
are taken apart, and x is the right one, of which eight columns are enough.

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
_E4M3_LIFT = tl.constexpr(2.0**88)
"""126 and 120, less 32: what a group's factor has beyond its scale."""

_FP4_FIELDS = tl.constexpr(
    """
    {
        .reg .b32 m, w;
        mov.b32 w, $4;
        and.b32 m, w, 0x000F000F;
        mul.lo.u32 m, m, 0x1040;
        and.b32 $0, m, 0x81C081C0;
        and.b32 m, w, 0x00F000F0;
        mul.lo.u32 m, m, 0x0104;
        and.b32 $1, m, 0x81C081C0;
        shr.b32 w, w, 8;
        and.b32 m, w, 0x000F000F;
        mul.lo.u32 m, m, 0x1040;
        and.b32 $2, m, 0x81C081C0;
        and.b32 m, w, 0x00F000F0;
        mul.lo.u32 m, m, 0x0104;
        and.b32 $3, m, 0x81C081C0;
    }
    """
)
"""Two elements of four nibbles to the fields of bfloat16: one output for each nibble, of both. A bfloat16's
sign is twelve bits above the lowest nibble's, its magnitude six: one multiplication shifts by both, and
what is in neither place is masked. Integers are multiplied beside the units that mask and shift."""

_FP8_FIELDS = tl.constexpr(
    """
    {
        .reg .b32 t, m, n, w;
        mov.b32 w, $2;
        shl.b32 m, w, 4;
        and.b32 m, m, 0x07F007F0;
        shl.b32 t, w, 8;
        add.u32 n, m, 0x00100010;
        lop3.b32 m, t, 0x80008000, m, 0xEA;
        and.b32 n, n, 0x08000800;
        mad.lo.u32 $0, n, 15, m;
        shr.b32 m, w, 4;
        and.b32 m, m, 0x07F007F0;
        add.u32 n, m, 0x00100010;
        lop3.b32 m, w, 0x80008000, m, 0xEA;
        and.b32 n, n, 0x08000800;
        mad.lo.u32 $1, n, 15, m;
    }
    """
)
"""Two elements of two E4M3 bytes to the fields of bfloat16, likewise (lop3 0xEA: a & b | c). Where all
seven bits are set, which is NaN, the sum with one unit carries, and the carry fills up the exponent."""

_E8M0_BITS = tl.constexpr(
    """
    {
        .reg .b32 t, w;
        mov.b32 w, $2;
        prmt.b32 t, w, 0, 0x4140;
        shl.b32 $0, t, 7;
        prmt.b32 t, w, 0, 0x4342;
        shl.b32 $1, t, 7;
    }
    """
)
"""Four bytes of E8M0 to four bfloat16: 0 is zero there, 255 infinity."""

_E4M3_FIELDS = tl.constexpr(
    """
    {
        .reg .b32 t, m, n, w;
        mov.b32 w, $2;
        prmt.b32 t, w, 0, 0x1404;
        shr.b32 m, t, 4;
        and.b32 m, m, 0x07F007F0;
        add.u32 n, m, 0x00100010;
        lop3.b32 m, t, 0x80008000, m, 0xEA;
        and.b32 n, n, 0x08000800;
        mad.lo.u32 $0, n, 15, m;
        prmt.b32 t, w, 0, 0x3424;
        shr.b32 m, t, 4;
        and.b32 m, m, 0x07F007F0;
        add.u32 n, m, 0x00100010;
        lop3.b32 m, t, 0x80008000, m, 0xEA;
        and.b32 n, n, 0x08000800;
        mad.lo.u32 $1, n, 15, m;
    }
    """
)
"""Four bytes of E4M3 to the fields of four bfloat16, in their order."""


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

    An E8M0 scale of more than 2^33 (2^39 for MXFP8), NaN among them, is infinity; the least, 2^-127, is
    zero.
    """
    lift = _E4M3_LIFT if WEIGHTS == "mxfp8" else _E2M1_LIFT
    if DEVICE:
        if WEIGHTS == "nvfp4":
            fields = tl.inline_asm_elementwise(
                _E4M3_FIELDS, "=r,=r,r", [byte], tl.bfloat16, is_pure=True, pack=4
            )
            scale = fields * tl.full([], _FROM_E4M3, tl.bfloat16)
        else:
            scale = tl.inline_asm_elementwise(
                _E8M0_BITS, "=r,=r,r", [byte], tl.bfloat16, is_pure=True, pack=4
            )
        return scale * tl.full([], lift, tl.bfloat16)
    elif WEIGHTS == "nvfp4":
        return e4m3(byte) * lift
    else:
        scale = (byte.to(tl.int32) << 23).to(tl.float32, bitcast=True)
        return scale * lift


@triton.jit
def fp4_values(
    packed: tl.tensor, factor: tl.tensor, DEVICE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """The four nibbles, from the lowest on, of a tile of int16 times their factors, in bfloat16."""
    if DEVICE:
        # Two values to a register: at decode the instructions are as near their limit as memory is.
        a, b, c, d = tl.inline_asm_elementwise(
            _FP4_FIELDS,
            "=r,=r,=r,=r,r",
            [packed],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
        return a * factor, b * factor, c * factor, d * factor
    else:
        return (
            (fields_e2m1(packed) * factor).to(tl.bfloat16),
            (fields_e2m1(packed >> 4) * factor).to(tl.bfloat16),
            (fields_e2m1(packed >> 8) * factor).to(tl.bfloat16),
            (fields_e2m1(packed >> 12) * factor).to(tl.bfloat16),
        )


@triton.jit
def fp8_values(
    packed: tl.tensor, factor: tl.tensor, DEVICE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The lower and the upper E4M3 byte of a tile of int16 times their factors, in bfloat16."""
    if DEVICE:
        low, high = tl.inline_asm_elementwise(
            _FP8_FIELDS, "=r,=r,r", [packed], (tl.bfloat16, tl.bfloat16), is_pure=True, pack=2
        )
        return low * factor, high * factor
    else:
        low = (e4m3(packed & 0xFF) * _TO_FIELDS * factor).to(tl.bfloat16)
        return low, (e4m3((packed >> 8) & 0xFF) * _TO_FIELDS * factor).to(tl.bfloat16)


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
def load_turned(
    at: tl.tensor,
    used: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """The same turned: (BLOCK_K, BLOCK_M)."""
    if WIDTH % BLOCK_K == 0:
        return tl.load(at + start, mask=used[None, :], other=0.0)
    else:
        inside = tl.arange(0, BLOCK_K) < WIDTH - start
        return tl.load(at + start, mask=used[None, :] & inside[:, None], other=0.0)


@triton.jit
def load_packed(at: tl.tensor, start: int, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr) -> tl.tensor:
    """(BLOCK_N, BLOCK_K) elements of rows that have WIDTH of them; zeros behind the last."""
    if WIDTH % BLOCK_K == 0:
        return tl.load(at + start)
    else:
        inside = tl.arange(0, BLOCK_K) < WIDTH - start
        return tl.load(at + start, mask=inside[None, :], other=0.0)


@triton.jit
def load_scales_at(
    at: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_N, BLOCK_K / GROUP) scales of a step, as bytes."""
    return load_packed(at, start // GROUP, WIDTH // GROUP, BLOCK_K // GROUP)


@triton.jit
def load_next_scales(
    at: tl.tensor, start: int, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
) -> tl.tensor:
    """Those of the step behind this one; anything where there is none."""
    if WIDTH % BLOCK_K == 0:
        return tl.load(at + tl.minimum(start + BLOCK_K, WIDTH - BLOCK_K) // GROUP)
    inside = tl.arange(0, BLOCK_K // GROUP) < (WIDTH - BLOCK_K - start) // GROUP
    return tl.load(at + BLOCK_K // GROUP + start // GROUP, mask=inside[None, :], other=0)


@triton.jit
def grouped_step(
    total: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    third: tl.tensor,
    fourth: tl.tensor,
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
    """total + weights @ x over BLOCK_K values of the sum.

    x comes in parts as `load_parts` gives it; byte: (BLOCK_N, BLOCK_K / GROUP), the scales.
    """
    packed = load_packed(weight_at, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
    factor = factors(byte, WEIGHTS, DEVICE)
    factor = tl.broadcast_to(factor[:, :, None], [BLOCK_N, BLOCK_K // GROUP, GROUP // PACK])
    factor = tl.reshape(factor, [BLOCK_N, BLOCK_K // PACK])
    if PACK == 4:
        a, b, c, d = fp4_values(packed, factor, DEVICE)
        total = widened(b, second, widened(a, first, total, DEVICE), DEVICE)
        return widened(d, fourth, widened(c, third, total, DEVICE), DEVICE)
    else:
        low, high = fp8_values(packed, factor, DEVICE)
        return widened(high, second, widened(low, first, total, DEVICE), DEVICE)


@triton.jit
def widened(a: tl.tensor, b: tl.tensor, total: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """total + a @ b in float32, of bfloat16; the interpreter, which has none, takes float32."""
    if DEVICE:
        return tl.dot(a, b, total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def load_parts(
    at: tl.tensor,
    used: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PACK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """x's PACK parts, (BLOCK_K / PACK, BLOCK_M): columns 0, PACK, 2 PACK ..., then 1, PACK + 1 ...

    Where they are two, they come twice.
    """
    first = load_turned(at, used, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
    second_at = at + WIDTH // PACK
    second = load_turned(second_at, used, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
    if PACK == 2:
        return first, second, first, second
    else:
        third_at = at + WIDTH // PACK * 2
        third = load_turned(third_at, used, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
        fourth_at = at + WIDTH // PACK * 3
        fourth = load_turned(fourth_at, used, start // PACK, WIDTH // PACK, BLOCK_K // PACK)
        return first, second, third, fourth


@triton.jit
def grouped_sums(
    x_at: tl.tensor,
    used: tl.tensor,
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    row: tl.tensor,
    HALVES: tl.constexpr,
    WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """x @ w^T for the matrix rows `row`, (BLOCK_M, BLOCK_N): of the gate and of the up projection.

    HALVES 1: the same twice. With two, `row` is as `rows_of_halves` has it: of sixteen rows of a product
    a thread has both of some eight apart, so that gate and up meet without a detour.
    x_at: (BLOCK_M,) where each row of x begins; its rows, and those of the matrix, have WIDTH values.
    Weights are the left operand, which may come from registers, and x, turned, the right one.
    A step's scales are loaded into registers while the one before it runs. Triton's pipeline would bring
    larger ones by way of shared memory, and then has both operands loaded for the width of a byte, in
    an order that costs a move for every register.
    """
    k = tl.arange(0, BLOCK_K // PACK)
    group = tl.arange(0, BLOCK_K // GROUP)
    at = x_at[None, :] + k[:, None]
    weight_at = weight_ptr + row[:, None] * (WIDTH // PACK) + k[None, :]
    scale_at = scale_ptr + row[:, None] * (WIDTH // GROUP) + group[None, :]
    total = tl.zeros([HALVES * BLOCK_N, BLOCK_M], tl.float32)
    scale = load_scales_at(scale_at, 0, WIDTH, GROUP, BLOCK_K)
    for start in range(0, WIDTH, BLOCK_K):
        following = load_next_scales(scale_at, start, WIDTH, GROUP, BLOCK_K)
        first, second, third, fourth = load_parts(at, used, start, WIDTH, BLOCK_K, PACK)
        total = grouped_step(
            total,
            first,
            second,
            third,
            fourth,
            weight_at,
            scale,
            start,
            WIDTH,
            WEIGHTS,
            GROUP,
            PACK,
            HALVES * BLOCK_N,
            BLOCK_K,
            DEVICE,
        )
        scale = following
    return halves_apart(total * _SUNK, HALVES, BLOCK_M, BLOCK_N)


@triton.jit
def halves_apart(
    total: tl.tensor, HALVES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """A sum over `rows_of_halves`, turned: (BLOCK_M, BLOCK_N) of the gate and of the up projection."""
    if HALVES == 1:
        total = tl.trans(total)
        return total, total
    else:
        total = tl.reshape(total, [BLOCK_N // 8, 2, 8, BLOCK_M])
        gate, up = tl.split(tl.permute(total, 3, 0, 2, 1))
        return tl.reshape(gate, [BLOCK_M, BLOCK_N]), tl.reshape(up, [BLOCK_M, BLOCK_N])


@triton.jit
def rows_of_halves(
    first: tl.tensor,
    column: tl.tensor,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The first matrix's rows, counted from `first`, for BLOCK_N columns of the intermediate from `column` on.

    Where it has a gate, whose WIDTH rows stand first, eight rows of it are followed by the same eight of
    the up projection. Columns behind the last one are the last one again.
    """
    at = tl.arange(0, HALVES * BLOCK_N)
    if HALVES == 1:
        return first + parts_to_rows(tl.minimum(column + at, WIDTH - 1), WIDTH, PACK)
    else:
        n = tl.minimum(column + at // 16 * 8 + at % 8, WIDTH - 1)
        return first + parts_to_rows(n, WIDTH, PACK) + at // 8 % 2 * WIDTH


@triton.jit
def parts_to_rows(column: tl.tensor, WIDTH: tl.constexpr, PACK: tl.constexpr) -> tl.tensor:
    """The matrix's row of each column of the intermediate, which stands in PACK parts as x does."""
    if PACK == 1:
        return column
    else:
        part = column // (WIDTH // PACK)
        return (column - part * (WIDTH // PACK)) * PACK + part
