"""Gluon, Triton's lower level: both matrix products on a Hopper card, for experts with many rows.

The products are those of `typed_moe.kernels._triton_experts`, for bfloat16 and FP8. One program stays on
each multiprocessor and goes round over tiles of 128 places and two tiles of 128 columns side by side: of the
gate and of the up projection, or two neighbours where there is no gate. Its warps have two roles. One
warpgroup loads: weights by the tensor memory accelerator, x's rows by slot. Two multiply, 64 rows each, so
that one brings an FP8 sum to float32 with its scales, outside of the matrix units, while the other one's
product runs, and the next tile is loaded while a tile is written. Tiles pass through a ring of STAGES
buffers, `full` and `empty` by their barriers; the roles count the same steps, so that a step's buffer and
phase follow from its number.

Importing this needs a Triton with Gluon; see `typed_moe.kernels._triton_hopper_launch`.
"""

from __future__ import annotations

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from typed_moe.kernels._triton_activations import activate, clamp
from typed_moe.kernels._triton_experts import tile_at
from typed_moe.kernels._triton_slots import follow

PLACES = tl.constexpr(128)
"""Of a tile: a block of the sorted slots."""
ROWS = tl.constexpr(64)
"""Of a warpgroup: those of one instruction."""
COLUMNS = tl.constexpr(128)
"""Of one of a tile's two halves."""
_THREADS = tl.constexpr(128)
_SMALLEST_NORMAL = tl.constexpr(2.0**-126)
_LOG2_E = tl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def gathered(width: int) -> gl.BlockedLayout:
    """Of rows that are loaded: sixteen bytes a thread, a row of a step to eight of them."""
    return gl.BlockedLayout([1, width // 8], [4, 8], [4, 1], [1, 0])


@gluon.constexpr_function
def multiplied(size: int) -> gl.NVMMADistributedLayout:
    """Of a sum of 64 x 128 over values of `size` bytes, as the matrix units leave it."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 32 // size])


@gluon.constexpr_function
def multiplied_together(size: int) -> gl.NVMMADistributedLayout:
    """Of a sum of 64 x 256: both halves' columns, by one instruction."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 32 // size])


@gluon.constexpr_function
def one_each(warps: int) -> gl.BlockedLayout:
    """Of scales that are loaded: one to a thread."""
    return gl.BlockedLayout([1], [32], [warps], [0])


@gluon.constexpr_function
def stored(size: int) -> gl.BlockedLayout:
    """Of what is written, `size` bytes each: sixteen bytes a thread, rows of 128."""
    width = 16 // size
    return gl.BlockedLayout([1, width], [width // 4, 128 // width], [4, 1], [1, 0])


@gluon.jit
def row_of(
    slots_ptr: gl.tensor,
    place: gl.tensor,
    num_slots: gl.tensor,
    SLOTS: gl.constexpr,
    GATHER: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """x's rows of places, tokens or the places themselves, and which of them are read.

    A place without a slot has no token, and becomes zeros. One row in its stead, the same one for every
    such place of every program, would be asked for by all of them at once, from one part of the L2 cache.
    """
    if GATHER:
        slot = gl.load(slots_ptr + place)
        used = slot < num_slots
        return (gl.where(used, slot, 0) // SLOTS).to(gl.int64), used
    else:
        return place.to(gl.int64), place >= 0


@gluon.jit
def load(
    x_ptr: gl.tensor,
    x_tiles: tma.tensor_descriptor,
    w_tiles: tma.tensor_descriptor,
    slots_ptr: gl.tensor,
    block_experts_ptr: gl.tensor,
    num_slots: gl.tensor,
    num_blocks: gl.tensor,
    x_stride: gl.tensor,
    x_scale_ptr: gl.tensor,
    x_scale_row: gl.tensor,
    x_scale_group: gl.tensor,
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    scale_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    SLOTS: gl.constexpr,
    K: gl.constexpr,
    HEIGHT: gl.constexpr,
    APART: gl.constexpr,
    TILE: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    GATHER: gl.constexpr,
    SCALED: gl.constexpr,
    BYTES: gl.constexpr,
) -> None:
    """The loading warpgroup: every step's rows of x, their scales, and the two weight tiles."""
    LAYOUT: gl.constexpr = gathered(BLOCK_K)
    one = gl.arange(0, PLACES, layout=gl.SliceLayout(1, LAYOUT))
    k = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    own = gl.arange(0, PLACES, layout=one_each(4))
    step = gl.to_tensor(0)
    for tile in range(gl.program_id(0), num_blocks * TILES, gl.num_programs(0)):  # type: ignore[call-overload]
        block, column = tile_at(tile, num_blocks, TILES, GROUP_M)
        row = gl.load(block_experts_ptr + block) * HEIGHT + column * TILE
        place = block * PLACES
        from_row, used = row_of(slots_ptr, place + one, num_slots, SLOTS, GATHER)
        at = x_ptr + from_row[:, None] * x_stride + k[None, :]
        scale_row, scaled = row_of(slots_ptr, place + own, num_slots, SLOTS, GATHER)
        scale_at = x_scale_ptr + scale_row * x_scale_row
        for start in range(0, K, BLOCK_K):
            stage = step % STAGES
            # Parity of the phase before this one; a barrier's first is even.
            mbarrier.wait(empty.index(stage), (step // STAGES + 1) & 1)
            ready = full.index(stage)
            mbarrier.expect(ready, BYTES)
            weights = w_ring.index(stage)
            tma.async_copy_global_to_shared(w_tiles, [row, start], ready, weights.slice(0, COLUMNS))
            tma.async_copy_global_to_shared(
                w_tiles, [row + APART, start], ready, weights.slice(COLUMNS, COLUMNS)
            )
            if GATHER:
                # As in Triton's own pipelines, no fence stands between these copies and the matrix units.
                async_copy.async_copy_global_to_shared(
                    x_ring.index(stage), at + start, mask=used[:, None]
                )
            else:
                tma.async_copy_global_to_shared(x_tiles, [place, start], ready, x_ring.index(stage))
            if SCALED:
                async_copy.async_copy_global_to_shared(
                    scale_ring.index(stage), scale_at, mask=scaled
                )
                scale_at += x_scale_group
            if GATHER or SCALED:
                async_copy.mbarrier_arrive(ready, increment_count=False)
            step += 1


@gluon.jit
def setting(at: gl.tensor, plain: float, GIVEN: gl.constexpr) -> gl.tensor:
    """As in `typed_moe.kernels._triton_experts`."""
    if GIVEN:
        return gl.load(at)
    else:
        return gl.to_tensor(plain)


@gluon.jit
def pinned(total: gl.tensor) -> gl.tensor:
    """The same values; nothing that makes them is moved behind this.

    Otherwise the compiler brings one product's sum to float32 while the next one is under way, and that takes
    more registers than there are.
    """
    return gl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def promoted_sums(
    left_scale_at: gl.tensor,
    right_scale_at: gl.tensor,
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    scale_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    first_step: gl.tensor,
    HALF: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
    SCALED: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Both sums of FP8, each step's brought to float32 and, SCALED, multiplied with its two scales."""
    mma: gl.constexpr = multiplied(1)
    left = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    right = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    nothing = gl.zeros([ROWS, COLUMNS], gl.float32, mma)
    x_scale = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, mma))
    # Read a step ahead of their use.
    left_scale = setting(left_scale_at, 1.0, SCALED)
    right_scale = setting(right_scale_at, 1.0, SCALED)
    for number in range(STEPS):
        step = first_step + number
        stage = step % STAGES
        phase = step // STAGES & 1
        after = gl.minimum(number + 1, STEPS - 1)
        next_left = setting(left_scale_at + after, 1.0, SCALED)
        next_right = setting(right_scale_at + after, 1.0, SCALED)
        mbarrier.wait(full.index(stage), phase)
        x = x_ring.index(stage).slice(HALF * ROWS, ROWS)
        if SCALED:
            scales = scale_ring.index(stage).slice(HALF * ROWS, ROWS)
            x_scale = scales.load(gl.SliceLayout(1, mma))
        weights = w_ring.index(stage).slice(0, COLUMNS).permute((1, 0))
        part = warpgroup_mma(x, weights, nothing, use_acc=False)
        left = pinned(left + part * (x_scale * left_scale)[:, None])
        # Passes at once: where one block of instructions ends.
        mbarrier.wait(full.index(stage), phase)
        weights = w_ring.index(stage).slice(COLUMNS, COLUMNS).permute((1, 0))
        part = warpgroup_mma(x, weights, nothing, use_acc=False)
        mbarrier.arrive(empty.index(stage), count=1)
        right += part * (x_scale * right_scale)[:, None]
        left_scale = next_left
        right_scale = next_right
    return left, right


@gluon.jit
def sums(
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    first_step: gl.tensor,
    HALF: gl.constexpr,
    STEPS: gl.constexpr,
    STAGES: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """Both sums in bfloat16, a step's product started before that of the step before it has ended.

    One instruction has both halves' columns, so that x is read from shared memory once for the two.
    """
    mma: gl.constexpr = multiplied(2)
    total = gl.zeros([ROWS, 2 * COLUMNS], gl.float32, multiplied_together(2))
    for number in range(STEPS):
        step = first_step + number
        stage = step % STAGES
        mbarrier.wait(full.index(stage), step // STAGES & 1)
        x = x_ring.index(stage).slice(HALF * ROWS, ROWS)
        weights = w_ring.index(stage).permute((1, 0))
        total = warpgroup_mma(x, weights, total, is_async=True)
        total = warpgroup_mma_wait(1, (total,))
        if number > 0:
            mbarrier.arrive(empty.index((step - 1) % STAGES), count=1)
    total = warpgroup_mma_wait(0, (total,))
    mbarrier.arrive(empty.index((first_step + STEPS - 1) % STAGES), count=1)
    left, right = total.reshape([ROWS, 2, COLUMNS]).permute((0, 2, 1)).split()
    # The same registers under another name.
    left = gl.convert_layout(left, mma, assert_trivial=True)
    return left, gl.convert_layout(right, mma, assert_trivial=True)


@gluon.jit
def swish(x: gl.tensor, alpha: gl.tensor) -> gl.tensor:
    """x * sigmoid(alpha * x), by the card's approximate exponential and reciprocal."""
    power = gl.exp2(x * (alpha * -_LOG2_E))
    return x * gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [power + 1.0], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def activated(
    left: gl.tensor,
    right: gl.tensor,
    alpha: gl.tensor,
    beta: gl.tensor,
    limit: gl.tensor,
    KIND: gl.constexpr,
    TILE: gl.constexpr,
    HAS_BETA: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """The activation: of gate and up projection, in the first of the two, or of either half.

    SwiGLU in fewer instructions than `activate` takes: nothing is multiplied meanwhile.
    """
    if KIND == "Swiglu":
        if HAS_LIMIT:
            left = gl.where(left > limit, limit, left)
            right = clamp(right, -limit, limit)
        if HAS_BETA:
            right = right + beta
        return swish(left, alpha) * right, right
    elif TILE == COLUMNS:
        return activate(left, right, alpha, beta, limit, KIND), right
    else:
        upper = activate(left, left, alpha, beta, limit, KIND)
        return upper, activate(right, right, alpha, beta, limit, KIND)


@gluon.jit
def biased(
    left: gl.tensor,
    right: gl.tensor,
    bias_at: gl.tensor,
    column: gl.tensor,
    N: gl.constexpr,
    APART: gl.constexpr,
    TILE: gl.constexpr,
    FP8: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """The sums and their columns' biases; columns behind the last one have any."""
    LAYOUT: gl.constexpr = multiplied(1 if FP8 else 2)
    n = column * TILE + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    beside = gl.minimum(n, N - 1) + APART if TILE == COLUMNS else gl.minimum(n + APART, N - 1)
    left = left + gl.load(bias_at + gl.minimum(n, N - 1))[None, :]
    return left, right + gl.load(bias_at + beside)[None, :]


@gluon.jit
def larger(one: gl.tensor, other: gl.tensor) -> gl.tensor:
    """NaN if either is."""
    return gl.maximum(one, other, propagate_nan=tl.PropagateNan.ALL)


@gluon.jit
def group_scale(x: gl.tensor) -> gl.tensor:
    """As in `typed_moe.kernels._triton_experts`."""
    amax = gl.reduce(gl.abs(x), 1, larger)
    scale = tl.div_rn(amax, gl.to_tensor(448.0))
    scale = gl.where(scale < _SMALLEST_NORMAL, _SMALLEST_NORMAL, scale)
    return gl.where(amax == 0.0, 1.0, scale)


@gluon.jit
def write(
    total: gl.tensor,
    out_ptr: gl.tensor,
    out_scale_ptr: gl.tensor,
    row: gl.tensor,
    used: gl.tensor,
    group: gl.tensor,
    N: gl.constexpr,
    QUANTIZE: gl.constexpr,
) -> None:
    """64 rows of a group of 128 columns to their rows of `out`, in whole lines."""
    LAYOUT: gl.constexpr = stored(2 if QUANTIZE == "none" else 1)
    if QUANTIZE == "group":
        scale = group_scale(total)
        at_group = out_scale_ptr + row * (N // 128) + group
        gl.store(at_group, scale, mask=used & (group < N // 128))
        # One division a row; a quotient may differ from the input's quantisation in its last bit.
        total = total * tl.div_rn(gl.to_tensor(1.0), scale)[:, None]
    # The conversion to float8_e4m3fn saturates.
    values = total.to(gl.bfloat16 if QUANTIZE == "none" else gl.float8e4nv)
    to_row = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))
    is_used = gl.convert_layout(used, gl.SliceLayout(1, LAYOUT))
    n = group * COLUMNS + gl.arange(0, COLUMNS, layout=gl.SliceLayout(0, LAYOUT))
    gl.store(
        out_ptr + to_row[:, None] * N + n[None, :],
        gl.convert_layout(values, LAYOUT),
        mask=is_used[:, None] & (n < N)[None, :],
    )


@gluon.jit
def both_sums(
    w_scale_ptr: gl.tensor,
    expert: gl.tensor,
    column: gl.tensor,
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    scale_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    first_step: gl.tensor,
    HALF: gl.constexpr,
    STEPS: gl.constexpr,
    HEIGHT: gl.constexpr,
    APART: gl.constexpr,
    TILE: gl.constexpr,
    STAGES: gl.constexpr,
    FP8: gl.constexpr,
    SCALED: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor]:
    """A tile's two sums over 64 rows, with the scales that they have in the sum."""
    if FP8:
        # A half behind the last column has some row's scales; it is not written.
        left_row = column * (TILE // 128)
        right_row = gl.minimum(left_row + APART // 128, HEIGHT // 128 - 1)
        w_scale_at = w_scale_ptr + expert.to(gl.int64) * (HEIGHT // 128 * STEPS)
        return promoted_sums(
            w_scale_at + left_row * STEPS,
            w_scale_at + right_row * STEPS,
            x_ring,
            w_ring,
            scale_ring,
            full,
            empty,
            first_step,
            HALF,
            STEPS,
            STAGES,
            SCALED,
        )
    else:
        return sums(x_ring, w_ring, full, empty, first_step, HALF, STEPS, STAGES)


@gluon.jit
def places_of(
    slots_ptr: gl.tensor,
    block_experts_ptr: gl.tensor,
    tile: gl.tensor,
    num_blocks: gl.tensor,
    row: gl.tensor,
    HALF: gl.constexpr,
    TILES: gl.constexpr,
    GROUP_M: gl.constexpr,
) -> tuple[gl.tensor, gl.tensor, gl.tensor, gl.tensor, gl.tensor]:
    """A tile's column; of its upper or lower half the first place, the expert, the first slot and all."""
    block, column = tile_at(tile, num_blocks, TILES, GROUP_M)
    place = block * PLACES + HALF * ROWS
    expert = gl.load(block_experts_ptr + block)
    return column, place, expert, gl.load(slots_ptr + place), gl.load(slots_ptr + place + row)


@gluon.jit
def multiply(
    w_scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    routing_ptr: gl.tensor,
    alpha_ptr: gl.tensor,
    beta_ptr: gl.tensor,
    limit_ptr: gl.tensor,
    output_scale_ptr: gl.tensor,
    stored_scale_ptr: gl.tensor,
    out_ptr: gl.tensor,
    out_scale_ptr: gl.tensor,
    slots_ptr: gl.tensor,
    block_experts_ptr: gl.tensor,
    num_slots: gl.tensor,
    num_blocks: gl.tensor,
    x_ring: gl.shared_memory_descriptor,
    w_ring: gl.shared_memory_descriptor,
    scale_ring: gl.shared_memory_descriptor,
    full: gl.shared_memory_descriptor,
    empty: gl.shared_memory_descriptor,
    K: gl.constexpr,
    N: gl.constexpr,
    HEIGHT: gl.constexpr,
    APART: gl.constexpr,
    TILE: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    KIND: gl.constexpr,
    FP8: gl.constexpr,
    SCALED: gl.constexpr,
    QUANTIZE: gl.constexpr,
    HAS_ALPHA: gl.constexpr,
    HAS_BETA: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_OUTPUT_SCALE: gl.constexpr,
    ON_INPUT: gl.constexpr,
    HALF: gl.constexpr,
) -> None:
    """A multiplying warpgroup: half a tile's rows, from the ring to memory."""
    mma: gl.constexpr = multiplied(1 if FP8 else 2)
    STEPS: gl.constexpr = K // BLOCK_K
    row = gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    num_tiles = num_blocks * TILES
    first_step = gl.to_tensor(0)
    # A program without a tile, and a call without a block, read the first one for nothing.
    tile = gl.maximum(gl.minimum(gl.program_id(0), num_tiles - 1), 0)
    column, place, expert, first_slot, slot = places_of(
        slots_ptr, block_experts_ptr, tile, gl.maximum(num_blocks, 1), row, HALF, TILES, GROUP_M
    )
    for tile in range(gl.program_id(0), num_tiles, gl.num_programs(0)):  # type: ignore[call-overload]
        # Whose the next tile is, and its slots, are read while this one's products run.
        after = gl.minimum(tile + gl.num_programs(0), num_tiles - 1)
        next_column, next_place, next_expert, next_first_slot, next_slot = places_of(
            slots_ptr, block_experts_ptr, after, num_blocks, row, HALF, TILES, GROUP_M
        )
        # Slots stand first in their block: the lower half may have none.
        if first_slot < num_slots:
            used = slot < num_slots
            left, right = both_sums(
                w_scale_ptr,
                expert,
                column,
                x_ring,
                w_ring,
                scale_ring,
                full,
                empty,
                first_step,
                HALF,
                STEPS,
                HEIGHT,
                APART,
                TILE,
                STAGES,
                FP8,
                SCALED,
            )
            output_scale = setting(output_scale_ptr + expert, 1.0, HAS_OUTPUT_SCALE)
            left = left * output_scale
            right = right * output_scale
            if ON_INPUT:
                weight = gl.load(routing_ptr + slot, mask=used, other=0.0).to(gl.float32)
                left = left * weight[:, None]
                right = right * weight[:, None]
            if HAS_BIAS:
                bias_at = bias_ptr + expert.to(gl.int64) * HEIGHT
                left, right = biased(left, right, bias_at, column, N, APART, TILE, FP8)
            to_row = slot.to(gl.int64)
            if KIND != "":
                to_row = (place + row).to(gl.int64)
                left, right = activated(
                    left,
                    right,
                    setting(alpha_ptr + expert, 1.0, HAS_ALPHA),
                    setting(beta_ptr + expert, 0.0, HAS_BETA),
                    setting(limit_ptr + expert, float("inf"), HAS_LIMIT),
                    KIND,
                    TILE,
                    HAS_BETA,
                    HAS_LIMIT,
                )
            if QUANTIZE == "tensor":
                stored_scale = gl.load(stored_scale_ptr + expert)
                if TILE == COLUMNS:
                    stored_scale = tl.div_rn(stored_scale, output_scale)
                left = left * stored_scale
                right = right * stored_scale
            for side in gl.static_range(TILE // COLUMNS):
                write(
                    left if side == 0 else right,
                    out_ptr,
                    out_scale_ptr,
                    to_row,
                    used,
                    column * (TILE // COLUMNS) + side,
                    N,
                    QUANTIZE,
                )
        else:
            for number in range(STEPS):
                step = first_step + number
                mbarrier.wait(full.index(step % STAGES), step // STAGES & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
        first_step += STEPS
        column = next_column
        place = next_place
        expert = next_expert
        first_slot = next_first_slot
        slot = next_slot


@gluon.jit(do_not_specialize=["num_slots"])
def product_kernel(
    x_ptr: gl.tensor,
    x_tiles: tma.tensor_descriptor,
    w_tiles: tma.tensor_descriptor,
    x_scale_ptr: gl.tensor,
    w_scale_ptr: gl.tensor,
    bias_ptr: gl.tensor,
    routing_ptr: gl.tensor,
    alpha_ptr: gl.tensor,
    beta_ptr: gl.tensor,
    limit_ptr: gl.tensor,
    output_scale_ptr: gl.tensor,
    stored_scale_ptr: gl.tensor,
    out_ptr: gl.tensor,
    out_scale_ptr: gl.tensor,
    slots_ptr: gl.tensor,
    block_experts_ptr: gl.tensor,
    offsets_ptr: gl.tensor,
    num_local: gl.tensor,
    num_slots: gl.tensor,
    x_stride: gl.tensor,
    x_scale_row: gl.tensor,
    x_scale_group: gl.tensor,
    SLOTS: gl.constexpr,
    K: gl.constexpr,
    N: gl.constexpr,
    HEIGHT: gl.constexpr,
    APART: gl.constexpr,
    TILE: gl.constexpr,
    TILES: gl.constexpr,
    BLOCK_K: gl.constexpr,
    STAGES: gl.constexpr,
    GROUP_M: gl.constexpr,
    KIND: gl.constexpr,
    GATHER: gl.constexpr,
    FP8: gl.constexpr,
    SCALED: gl.constexpr,
    QUANTIZE: gl.constexpr,
    HAS_ALPHA: gl.constexpr,
    HAS_BETA: gl.constexpr,
    HAS_LIMIT: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_OUTPUT_SCALE: gl.constexpr,
    ON_INPUT: gl.constexpr,
    PDL: gl.constexpr,
) -> None:
    """x @ w^T by expert: the first product, KIND its activation, or the second one, where KIND is "".

    x (rows, K); w (L * HEIGHT, K), HEIGHT rows to an expert. A tile's halves are APART rows of w from each
    other, and TILES tiles of TILE columns make N. GATHER: x's rows are tokens, else places. `x_tiles` and
    `w_tiles` are tensor descriptors, 128 rows high. The rest is as in the kernels of
    `typed_moe.kernels._triton_experts`.
    """
    x_ring = gl.allocate_shared_memory(w_tiles.dtype, [STAGES, PLACES, BLOCK_K], w_tiles.layout)
    w_ring = gl.allocate_shared_memory(
        w_tiles.dtype, [STAGES, 2 * COLUMNS, BLOCK_K], w_tiles.layout
    )
    scale_ring = gl.allocate_shared_memory(
        gl.float32, [STAGES, PLACES], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        # The one that expects bytes; and, where rows or scales are copied by threads, every one of them.
        mbarrier.init(full.index(stage), count=1 + _THREADS if GATHER or SCALED else 1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    follow(PDL)
    num_blocks = gl.load(offsets_ptr + num_local) // PLACES
    # Of a step, by the tensor memory accelerator: both weight tiles, and x's where its rows are not gathered.
    HIGH: gl.constexpr = COLUMNS * 2 if GATHER else COLUMNS * 2 + PLACES
    BYTES: gl.constexpr = HIGH * BLOCK_K * (1 if FP8 else 2)
    gl.warp_specialize(
        [
            (
                load,
                (
                    x_ptr,
                    x_tiles,
                    w_tiles,
                    slots_ptr,
                    block_experts_ptr,
                    num_slots,
                    num_blocks,
                    x_stride,
                    x_scale_ptr,
                    x_scale_row,
                    x_scale_group,
                    x_ring,
                    w_ring,
                    scale_ring,
                    full,
                    empty,
                    SLOTS,
                    K,
                    HEIGHT,
                    APART,
                    TILE,
                    TILES,
                    BLOCK_K,
                    STAGES,
                    GROUP_M,
                    GATHER,
                    SCALED,
                    BYTES,
                ),
            ),
            (
                multiply,
                (
                    w_scale_ptr,
                    bias_ptr,
                    routing_ptr,
                    alpha_ptr,
                    beta_ptr,
                    limit_ptr,
                    output_scale_ptr,
                    stored_scale_ptr,
                    out_ptr,
                    out_scale_ptr,
                    slots_ptr,
                    block_experts_ptr,
                    num_slots,
                    num_blocks,
                    x_ring,
                    w_ring,
                    scale_ring,
                    full,
                    empty,
                    K,
                    N,
                    HEIGHT,
                    APART,
                    TILE,
                    TILES,
                    BLOCK_K,
                    STAGES,
                    GROUP_M,
                    KIND,
                    FP8,
                    SCALED,
                    QUANTIZE,
                    HAS_ALPHA,
                    HAS_BETA,
                    HAS_LIMIT,
                    HAS_BIAS,
                    HAS_OUTPUT_SCALE,
                    ON_INPUT,
                    0,
                ),
            ),
            (
                multiply,
                (
                    w_scale_ptr,
                    bias_ptr,
                    routing_ptr,
                    alpha_ptr,
                    beta_ptr,
                    limit_ptr,
                    output_scale_ptr,
                    stored_scale_ptr,
                    out_ptr,
                    out_scale_ptr,
                    slots_ptr,
                    block_experts_ptr,
                    num_slots,
                    num_blocks,
                    x_ring,
                    w_ring,
                    scale_ring,
                    full,
                    empty,
                    K,
                    N,
                    HEIGHT,
                    APART,
                    TILE,
                    TILES,
                    BLOCK_K,
                    STAGES,
                    GROUP_M,
                    KIND,
                    FP8,
                    SCALED,
                    QUANTIZE,
                    HAS_ALPHA,
                    HAS_BETA,
                    HAS_LIMIT,
                    HAS_BIAS,
                    HAS_OUTPUT_SCALE,
                    ON_INPUT,
                    1,
                ),
            ),
        ],
        [4, 4],
        [232, 232],
    )
