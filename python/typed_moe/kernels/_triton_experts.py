"""Triton: an expert layer's two matrix products, grouped by expert, and the sum over a token's slots.

Slots come sorted by expert (`typed_moe.kernels._slots`): a block of BLOCK_M places belongs to one
expert, so a program multiplies one block's rows with one tile of that expert's weights. The first
product gathers its rows by slot and ends with the activation; the intermediate stands in the order
of the places. The second one reads it as it stands and writes each row to its slot. The third
kernel adds a token's slots, in order: no atomics, the same bits in every run.

FP8 says how an operand in float8_e4m3fn is multiplied: "none" (bfloat16), "native" (the card's
matrix units take it), "bits" (a byte becomes a bfloat16 in registers). WEIGHTS says what scales the
weights have. "block": DeepSeek's, one float32 for 1 x 128 of an activation and for 128 x 128 of a
weight, so that a step of BLOCK_K = 128 has one product of scales for each row, applied in float32.
"plain": none in the sum; those of a whole matrix multiply its result. "mxfp8", "mxfp4", "nvfp4": one
for GROUP values of the sum and one column, PACK values to an element of two bytes, and x is bfloat16
(`typed_moe.kernels._triton_formats`).

`DEVICE` is False in the interpreter, which has no bfloat16 arithmetic: operands become float32.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from typed_moe.kernels._triton_activations import activate, clamp
from typed_moe.kernels._triton_formats import (
    e4m3,
    grouped_sums,
    halves_apart,
    load_packed,
    load_rows,
    load_turned,
    parts_to_rows,
    rows_of_halves,
)
from typed_moe.kernels._triton_slots import follow

_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_STEP_OF_SUBNORMALS = tl.constexpr(24576.0)
_ONE = tl.constexpr(1)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """total + a @ b in float32."""
    if DEVICE:
        return tl.dot(a, b, total)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")


@triton.jit
def operand(x: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    """A loaded tile as the matrix units take it: bytes of E4M3 become bfloat16, exactly."""
    if FP8 == "bits":
        return e4m3(x).to(tl.bfloat16)
    else:
        return x


@triton.jit
def largest(x: tl.tensor) -> tl.tensor:
    """(R, N) to (R,): the largest magnitude; a NaN, which a maximum may drop, is a row's largest."""
    amax = tl.max(tl.abs(x), 1)
    return tl.where(tl.max(tl.where(x == x, 0, 1), 1) == 0, amax, float("nan"))  # noqa: PLR0124


@triton.jit
def group_scale(x: tl.tensor) -> tl.tensor:
    """(R, 128) to (R,): amax / 448, not under 2^-126, and 1 for zeros; a NaN or infinity stays."""
    amax = largest(x)
    scale = tl.div_rn(amax, tl.full(amax.shape, 448.0, tl.float32))
    scale = tl.where(scale < _SMALLEST_NORMAL, _SMALLEST_NORMAL, scale)
    return tl.where(amax == 0.0, 1.0, scale)


@triton.jit
def to_bfloat16(x: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """Rounded to nearest even. The interpreter's own cast cuts bits off, so they are rounded first."""
    if not DEVICE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def on_e4m3(quotient: tl.tensor) -> tl.tensor:
    """The nearest value of float8_e4m3fn, saturated at 448, ties to even, in float32; NaN stays."""
    most = tl.full([], 448.0, tl.float32)
    quotient = clamp(quotient, -most, most)
    bits = quotient.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
    # Below 2^-6 the grid's step is 2^-9, which is one unit in the last place of 1.5 * 2^14.
    small = (quotient + _STEP_OF_SUBNORMALS) - _STEP_OF_SUBNORMALS
    # A comparison with NaN is false: what has no bits to round is the sum's.
    return tl.where(tl.abs(quotient) >= 0.015625, bits.to(tl.float32, bitcast=True), small)


@triton.jit
def to_e4m3(quotient: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """Saturated at 448 and rounded to float8_e4m3fn; rounded as above."""
    if DEVICE:
        most = tl.full([], 448.0, tl.float32)
        quotient = clamp(quotient, -most, most)
    else:
        quotient = on_e4m3(quotient)
    return quotient.to(tl.float8e4nv)


@triton.jit
def is_there(
    row: tl.tensor,
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """Whether a row is some slot's: by place, or always where BLOCK_M is 0."""
    if BLOCK_M == 0:
        return row >= 0
    else:
        has_expert = tl.load(block_experts_ptr + row // BLOCK_M) >= 0
        # What stands in a block without an expert was not written.
        return tl.load(slots_ptr + row, mask=has_expert, other=num_slots) < num_slots


@triton.jit(do_not_specialize=["num_slots", "num_rows"])
def quantize_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    H: tl.constexpr,
    GROUPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """GROUPS groups of 128 values of ROWS rows each to float8_e4m3fn and their scales.

    BLOCK_M above 0: rows are places in blocks of so many, those without a slot are left out, and ROWS is 1.
    """
    follow(PDL)
    first_row = tl.program_id(0) * ROWS
    if not is_there(first_row, slots_ptr, block_experts_ptr, num_slots, BLOCK_M):
        return
    one = tl.arange(0, ROWS * GROUPS)
    row = (first_row + one // GROUPS).to(tl.int64)
    group = tl.program_id(1) * GROUPS + one % GROUPS
    inside = (row < num_rows) & (group < H // 128)
    at = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    x_at = x_ptr + row[:, None] * x_stride + at
    x = tl.load(x_at, mask=inside[:, None], other=0.0).to(tl.float32)
    scale = group_scale(x)
    quotient = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
    tl.store(out_ptr + row[:, None] * H + at, to_e4m3(quotient, DEVICE), mask=inside[:, None])
    tl.store(scale_ptr + row * (H // 128) + group, scale, mask=inside)


@triton.jit
def tile_at(
    program: tl.tensor, num_blocks: tl.tensor, COLUMNS: tl.constexpr, GROUP_M: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(block, column) of a program: GROUP_M blocks run over all columns before the next ones do."""
    in_group = GROUP_M * COLUMNS
    first = program // in_group * GROUP_M
    height = tl.minimum(num_blocks - first, GROUP_M)
    inside = program % in_group
    return first + inside % height, inside // height


@triton.jit
def load_weights(
    at: tl.tensor,
    first_row: tl.tensor,
    start: int,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """(BLOCK_K, BLOCK_N) of a matrix whose rows are WIDTH wide, turned.

    TMA: `at` is a tensor descriptor, and `first_row` the tile's first row in it.
    """
    if TMA:
        return tl.trans(at.load([first_row, start]))  # type: ignore[attr-defined]
    elif WIDTH % BLOCK_K == 0:
        return tl.load(at + start)
    else:
        inside = tl.arange(0, BLOCK_K) < WIDTH - start
        return tl.load(at + start, mask=inside[:, None], other=0.0)


@triton.jit
def load_scales(at: tl.tensor, used: tl.tensor, SCALED: tl.constexpr) -> tl.tensor:
    """(BLOCK_M,) scales of rows; 1 where they have none."""
    if SCALED:
        return tl.load(at, mask=used, other=0.0)
    else:
        return used.to(tl.float32)


@triton.jit
def step(
    total: tl.tensor,
    a: tl.tensor,
    b: tl.tensor,
    scale: tl.tensor,
    FP8: tl.constexpr,
    WEIGHTS: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tl.tensor:
    """total + a @ b, times the scales of both where weights have them in blocks."""
    if WEIGHTS == "plain" and FP8 == "native" and DEVICE:
        # Hopper's FP8 units add with fewer bits; after a whole step their sum goes to float32.
        return tl.dot(a, b, total, max_num_imprecise_acc=a.shape[1])
    elif WEIGHTS == "plain":
        return product(a, b, total, DEVICE)
    else:
        nothing = tl.zeros(total.shape, tl.float32)
        return total + product(a, b, nothing, DEVICE) * scale


@triton.jit
def block_scale(at: tl.tensor, row_scale: tl.tensor, WEIGHTS: tl.constexpr) -> tl.tensor:
    """(BLOCK_M, 1) what a step's product is multiplied by; not read where the sum has no scales."""
    if WEIGHTS == "block":
        row_scale = row_scale * tl.load(at)
    return row_scale[:, None]


@triton.jit
def setting(at: tl.tensor, plain: float, GIVEN: tl.constexpr) -> tl.tensor:
    """An activation's setting, a scalar: as given, or that of its plain form."""
    if GIVEN:
        return tl.load(at)
    else:
        return tl.full([], plain, tl.float32)


@triton.jit
def plain_sums(
    x_ptr: tl.tensor,
    x_stride: tl.tensor,
    x_scale_ptr: tl.tensor,
    x_scale_token: tl.tensor,
    x_scale_group: tl.tensor,
    token: tl.tensor,
    used: tl.tensor,
    weight_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    expert: tl.tensor,
    column: tl.tensor,
    row: tl.tensor,
    HALVES: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the field's letter
    FP8: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """x @ w13^T for the expert's rows `row` of the gate, where there is one, and of the up projection."""
    k = tl.arange(0, BLOCK_K)
    x_at = x_ptr + token[:, None] * x_stride + k[None, :]
    gate_row = (expert * (HALVES * I)).to(tl.int32) + column * BLOCK_N
    up_row = gate_row + (HALVES - 1) * I
    if TMA:
        gate_at = weight_ptr
        up_at = weight_ptr
    else:
        gate_at = weight_ptr + expert * (HALVES * I * H) + row[None, :] * H + k[:, None]
        up_at = gate_at + (HALVES - 1) * I * H
    scale_row = expert * (HALVES * (I // 128)) + column * BLOCK_N // 128
    gate_scale_at = weight_scale_ptr + scale_row * (H // 128)
    up_scale_at = gate_scale_at + (HALVES - 1) * (I // 128) * (H // 128)
    gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, H, BLOCK_K):
        group = start // 128
        x = operand(load_rows(x_at, used, start, H, BLOCK_K), FP8)
        x_scale = load_scales(
            x_scale_ptr + token * x_scale_token + x_scale_group * group, used, SCALED
        )
        weights = operand(load_weights(up_at, up_row, start, H, BLOCK_K, TMA), FP8)
        scale = block_scale(up_scale_at + group, x_scale, WEIGHTS)
        up = step(up, x, weights, scale, FP8, WEIGHTS, DEVICE)
        if HALVES == 2:
            weights = operand(load_weights(gate_at, gate_row, start, H, BLOCK_K, TMA), FP8)
            scale = block_scale(gate_scale_at + group, x_scale, WEIGHTS)
            gate = step(gate, x, weights, scale, FP8, WEIGHTS, DEVICE)
    return gate, up


@triton.jit
def left_sums(
    x_at: tl.tensor,
    x_scale_at: tl.tensor,
    x_scale_group: tl.tensor,
    used: tl.tensor,
    weight_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    row: tl.tensor,
    HALVES: tl.constexpr,
    WIDTH: tl.constexpr,
    FP8: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """`grouped_sums` for FP8, without scales or with those of blocks.

    Hopper's matrix units take FP8 where the left operand has 64 rows at least; with 16 tokens there
    Triton converts both operands to float16. The scales of a step are loaded while the one before it runs.
    With BLOCK_K above 128 so many steps of 128 are loaded together.
    """
    # Triton's `min` is of tensors.
    STEP: tl.constexpr = 128 if BLOCK_K > 128 else BLOCK_K  # type: ignore[assignment]  # noqa: FURB136
    k = tl.arange(0, STEP)
    at = x_at[None, :] + k[:, None]
    weight_at = weight_ptr + row[:, None] * WIDTH + k[None, :]
    scale_at = weight_scale_ptr + row // 128 * (WIDTH // 128)
    every = row >= 0
    total = tl.zeros([HALVES * BLOCK_N, BLOCK_M], tl.float32)
    scale = load_scales(scale_at, every, SCALED)
    x_scale = load_scales(x_scale_at, used, SCALED)
    for start in tl.range(0, WIDTH, STEP, loop_unroll_factor=BLOCK_K // STEP):
        # Behind the last step its own again, not masked: then the loop is compiled without one.
        group = tl.minimum(start + STEP, WIDTH - 1) // 128
        next_scale = load_scales(scale_at + group, every, SCALED)
        next_x_scale = load_scales(x_scale_at + x_scale_group * group, used, SCALED)
        weights = load_packed(weight_at, start, WIDTH, STEP)
        x = load_turned(at, used, start, WIDTH, STEP)
        both = scale[:, None] * x_scale[None, :]
        total = step(total, weights, x, both, FP8, WEIGHTS, DEVICE)
        scale = next_scale
        x_scale = next_x_scale
    return halves_apart(total, HALVES, BLOCK_M, BLOCK_N)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def first_kernel(
    x_ptr: tl.tensor,
    x_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    routing_ptr: tl.tensor,
    alpha_ptr: tl.tensor,
    beta_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    output_scale_ptr: tl.tensor,
    stored_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    x_stride: tl.tensor,
    x_scale_token: tl.tensor,
    x_scale_group: tl.tensor,
    SLOTS: tl.constexpr,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the field's letter
    KIND: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_OUTPUT_SCALE: tl.constexpr,
    ON_INPUT: tl.constexpr,
    FP8: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    SCALED: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    LEFT: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """activation(x @ w13^T) of one block and BLOCK_N columns, to the block's places.

    SLOTS slots per token; HALVES is 2 where there is a gate, whose rows stand first. ON_INPUT: the
    routing weight multiplies the row, which is the same as multiplying its product. SCALED: x has
    scales by group of 128. HAS_OUTPUT_SCALE: the product is multiplied by its expert's output scale,
    and the result by its stored scale, which for a gated activation holds the output scale too.
    QUANTIZE: the result is written in bfloat16 ("none"), in float8_e4m3fn ("tensor"), or so with one
    scale per row ("group"; BLOCK_N is 128). A pointer to what is not there points anywhere and is
    not read.
    """
    follow(PDL)
    block, column = tile_at(tl.program_id(0), num_blocks, (I + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Both before the branch, so that one does not wait for the other.
    expert = tl.load(block_experts_ptr + block).to(tl.int64)
    slot = tl.load(slots_ptr + place)
    if expert < 0:
        return
    used = slot < num_slots
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    token = (tl.where(used, slot, 0) // SLOTS).to(tl.int64)
    # Columns behind the last one read it again; they are not written.
    row = parts_to_rows(tl.minimum(n, I - 1), I, PACK)
    if GROUP > 0:
        gate, up = grouped_sums(
            x_ptr + token * x_stride,
            used,
            weight_ptr,
            weight_scale_ptr,
            rows_of_halves(expert * (HALVES * I), column * BLOCK_N, I, HALVES, PACK, BLOCK_N),
            HALVES,
            H,
            WEIGHTS,
            GROUP,
            PACK,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DEVICE,
        )
    elif LEFT:
        gate, up = left_sums(
            x_ptr + token * x_stride,
            x_scale_ptr + token * x_scale_token,
            x_scale_group,
            used,
            weight_ptr,
            weight_scale_ptr,
            rows_of_halves(expert * (HALVES * I), column * BLOCK_N, I, HALVES, PACK, BLOCK_N),
            HALVES,
            H,
            FP8,
            WEIGHTS,
            SCALED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DEVICE,
        )
    else:
        gate, up = plain_sums(
            x_ptr,
            x_stride,
            x_scale_ptr,
            x_scale_token,
            x_scale_group,
            token,
            used,
            weight_ptr,
            weight_scale_ptr,
            expert,
            column,
            row,
            HALVES,
            H,
            I,
            FP8,
            WEIGHTS,
            SCALED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            TMA,
            DEVICE,
        )
    stored_scale = tl.full([], 1.0, tl.float32)
    if HAS_OUTPUT_SCALE:
        output_scale = tl.load(output_scale_ptr + expert)
        stored_scale = tl.load(stored_scale_ptr + expert)
        up = up * output_scale
        gate = gate * output_scale
        if HALVES == 2:
            stored_scale = tl.div_rn(stored_scale, output_scale)
    if ON_INPUT:
        weight = tl.load(routing_ptr + slot, mask=used, other=0.0).to(tl.float32)
        up = up * weight[:, None]
        gate = gate * weight[:, None]
    if HAS_BIAS:
        bias_at = bias_ptr + expert * (HALVES * I) + row
        up = up + tl.load(bias_at + (HALVES - 1) * I)[None, :]
        gate = gate + tl.load(bias_at)[None, :]
    hidden = activate(
        gate,
        up,
        setting(alpha_ptr + expert, 1.0, HAS_ALPHA),
        setting(beta_ptr + expert, 0.0, HAS_BETA),
        setting(limit_ptr + expert, float("inf"), HAS_LIMIT),
        KIND,
    )
    if HAS_OUTPUT_SCALE:
        hidden = hidden * stored_scale
    mask = used[:, None] & (n < I)[None, :]
    if QUANTIZE == "group":
        scale = group_scale(hidden)
        tl.store(out_scale_ptr + place * (I // 128) + column, scale, mask=used)
        hidden = tl.div_rn(hidden, tl.broadcast_to(scale[:, None], hidden.shape))
    stored = to_bfloat16(hidden, DEVICE) if QUANTIZE == "none" else to_e4m3(hidden, DEVICE)
    tl.store(out_ptr + place[:, None] * I + n[None, :], stored, mask=mask)


@triton.jit(do_not_specialize=["num_slots", "num_blocks"])
def second_kernel(
    hidden_ptr: tl.tensor,
    hidden_scale_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    weight_scale_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    output_scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_blocks: tl.tensor,
    H: tl.constexpr,
    I: tl.constexpr,  # noqa: E741 - the field's letter
    HAS_BIAS: tl.constexpr,
    HAS_OUTPUT_SCALE: tl.constexpr,
    FP8: tl.constexpr,
    WEIGHTS: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    SCALED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    TMA: tl.constexpr,
    LEFT: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """hidden @ w2^T of one block and BLOCK_N columns, each row to its slot's row of `out`.

    PARTS blocks here are one of the sorted slots' blocks.
    SCALED: hidden is float8_e4m3fn with one scale per 128 values. FP8 "bits": it is bfloat16.
    """
    block, column = tile_at(tl.program_id(0), num_blocks, (H + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Ahead of the wait: slots were sorted before the first product, which is before this.
    expert = tl.load(block_experts_ptr + block // PARTS, cache_modifier=".cg").to(tl.int64)
    slot = tl.load(slots_ptr + place, cache_modifier=".cg")
    leading = tl.load(slots_ptr + block * BLOCK_M, cache_modifier=".cg")
    follow(PDL)
    if expert < 0:
        return
    # Slots stand first in their block: a part may have none. A whole block has some, and need not look.
    if PARTS > 1 and leading >= num_slots:
        return
    used = slot < num_slots
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.minimum(n, H - 1)
    if GROUP > 0:
        _, total = grouped_sums(
            hidden_ptr + place * I,
            used,
            weight_ptr,
            weight_scale_ptr,
            expert * H + row,
            _ONE,
            I,
            WEIGHTS,
            GROUP,
            PACK,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DEVICE,
        )
    elif LEFT:
        _, total = left_sums(
            hidden_ptr + place * I,
            hidden_scale_ptr + place * (I // 128),
            tl.full([], 1, tl.int32),
            used,
            weight_ptr,
            weight_scale_ptr,
            expert * H + row,
            _ONE,
            I,
            FP8,
            WEIGHTS,
            SCALED,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            DEVICE,
        )
    else:
        k = tl.arange(0, BLOCK_K)
        if TMA:
            hidden_at = hidden_ptr
            weight_at = weight_ptr
        else:
            hidden_at = hidden_ptr + place[:, None] * I + k[None, :]
            weight_at = weight_ptr + expert * (H * I) + row[None, :] * I + k[:, None]
        hidden_scale_at = hidden_scale_ptr + place * (I // 128)
        weight_row = (expert * H).to(tl.int32) + column * BLOCK_N
        tile_row = expert * (H // 128) + column * BLOCK_N // 128
        weight_scale_at = weight_scale_ptr + tile_row * (I // 128)
        total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, I, BLOCK_K):
            group = start // 128
            if TMA:
                # Rows without a slot hold anything, and are not written.
                hidden = hidden_at.load([block * BLOCK_M, start])  # type: ignore[attr-defined]
            else:
                hidden = load_rows(hidden_at, used, start, I, BLOCK_K)
            scale = load_scales(hidden_scale_at + group, used, SCALED)
            weights = operand(load_weights(weight_at, weight_row, start, I, BLOCK_K, TMA), FP8)
            scale = block_scale(weight_scale_at + group, scale, WEIGHTS)
            total = step(total, hidden, weights, scale, FP8, WEIGHTS, DEVICE)
    if HAS_OUTPUT_SCALE:
        total = total * tl.load(output_scale_ptr + expert)
    if HAS_BIAS:
        total = total + tl.load(bias_ptr + expert * H + row)[None, :]
    out_at = out_ptr + slot.to(tl.int64)[:, None] * H + n[None, :]
    tl.store(out_at, to_bfloat16(total, DEVICE), mask=used[:, None] & (n < H)[None, :])


@triton.jit(do_not_specialize=["first_local", "num_local"])
def combine_kernel(
    rows_ptr: tl.tensor,
    place_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    out_ptr: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BY_PLACE: tl.constexpr,
    BLOCK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One token's rows added up in float32, slot after slot; those of no local expert are left out.

    Rows stand by slot, and the launch before is this package's second product; or, BY_PLACE, where
    `place` says of their slot, and it is a library's.
    """
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if BY_PLACE:
        follow(PDL)
    local: tl.tuple = ()
    weights: tl.tuple = ()
    # Ahead of the wait, by slot: what was chosen was written before the products.
    for one in tl.static_range(SLOTS):
        slot = token * SLOTS + one
        mine = tl.load(ids_ptr + slot, cache_modifier=".cg") - first_local
        is_local = (mine >= 0) & (mine < num_local)
        local = local + (is_local,)  # noqa: RUF005 - Triton
        if WEIGHTED:
            weight = tl.load(weights_ptr + slot, cache_modifier=".cg").to(tl.float32)
            weights = weights + (tl.where(is_local, weight, 0.0),)  # noqa: RUF005 - Triton
    if not BY_PLACE:
        follow(PDL)
    for one in tl.static_range(SLOTS):
        # Rows of other ranks' experts were not written, nor their slots' places.
        at = token * SLOTS + one
        if BY_PLACE:
            at = tl.load(place_ptr + at, mask=local[one], other=0).to(tl.int64)
        row = tl.load(rows_ptr + at * H + n, mask=(n < H) & local[one], other=0.0).to(tl.float32)
        if WEIGHTED:
            row = row * weights[one]
        total += row
    tl.store(out_ptr + token * H + n, to_bfloat16(total, DEVICE), mask=n < H)
