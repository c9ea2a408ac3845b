"""Triton: what stands around grouped products that a library computes on rows in the order of places.

Rows come sorted by expert (`typed_moe.kernels._slots`), each expert's on whole blocks. A library
multiplies them with its expert's weights; before, between and after stand the copies of the tokens' rows,
the activation and the weighted sum. A place without a slot is left as it is: what a library computes of it is not read.

Importing this needs Triton; see `typed_moe.kernels.deep_gemm`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from typed_moe.kernels._triton_activations import activate
from typed_moe.kernels._triton_experts import group_scale, setting, to_bfloat16, to_e4m3
from typed_moe.kernels._triton_slots import follow


@triton.jit(do_not_specialize=["num_slots", "places"])
def mark_kernel(
    x_scale_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    group_ptr: tl.tensor,
    place_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    places: tl.tensor,
    x_scale_token: tl.tensor,
    x_scale_group: tl.tensor,
    SLOTS: tl.constexpr,
    H: tl.constexpr,
    SCALED: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ROWS places: whose they are, and which place a slot has.

    `group`: the expert, -1 for a place without a slot. `place`: by slot; of local experts' slots alone.
    SCALED: also x's scales, (H / 128, places), places side by side; GROUPS is H / 128 and above.
    """
    follow(PDL)
    first = tl.program_id(0) * ROWS
    place = first + tl.arange(0, ROWS)
    expert = tl.load(block_experts_ptr + first // BLOCK_M)
    if expert < 0:
        tl.store(group_ptr + place, tl.full([ROWS], -1, tl.int32))
        return
    slot = tl.load(slots_ptr + place)
    used = slot < num_slots
    tl.store(group_ptr + place, tl.where(used, expert, -1))
    tl.store(place_ptr + slot, place, mask=used)
    if SCALED:
        token = (tl.where(used, slot, 0) // SLOTS).to(tl.int64)
        group = tl.arange(0, GROUPS).to(tl.int64)
        mask = used[:, None] & (group < H // 128)[None, :]
        at = token[:, None] * x_scale_token + group[None, :] * x_scale_group
        scale = tl.load(x_scale_ptr + at, mask=mask)
        tl.store(out_scale_ptr + group[None, :] * places + place[:, None], scale, mask=mask)


@triton.jit(do_not_specialize=["first_local", "num_local"])
def spread_kernel(
    x_ptr: tl.tensor,
    out_ptr: tl.tensor,
    place_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    x_stride: tl.tensor,
    H: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """A part of one token's row, read once, to the places of its slots."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + token * x_stride + n, mask=n < H)
    for one in range(SLOTS):
        slot = token * SLOTS + one
        mine = tl.load(ids_ptr + slot) - first_local
        # Of another rank's slot no place was written.
        if (mine >= 0) & (mine < num_local):
            place = tl.load(place_ptr + slot).to(tl.int64)
            tl.store(out_ptr + place * H + n, x, mask=n < H)


@triton.jit(do_not_specialize=["num_slots", "places"])
def activate_kernel(
    first_ptr: tl.tensor,
    routing_ptr: tl.tensor,
    alpha_ptr: tl.tensor,
    beta_ptr: tl.tensor,
    limit_ptr: tl.tensor,
    out_ptr: tl.tensor,
    out_scale_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    places: tl.tensor,
    I: tl.constexpr,  # noqa: E741 - the field's letter
    KIND: tl.constexpr,
    HALVES: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    HAS_BETA: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    ON_INPUT: tl.constexpr,
    QUANTIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """The activation of ROWS places' first products, 128 columns of it: the gate stands first.

    ON_INPUT: the routing weight multiplies the product, which is the same as multiplying the input.
    QUANTIZE: to float8_e4m3fn, and one scale for the 128, (I / 128, places), places side by side.
    """
    follow(PDL)
    first = tl.program_id(0) * ROWS
    expert = tl.load(block_experts_ptr + first // BLOCK_M)
    if expert < 0:
        return
    place = first + tl.arange(0, ROWS)
    slot = tl.load(slots_ptr + place)
    used = slot < num_slots
    group = tl.program_id(1)
    n = group * 128 + tl.arange(0, 128)
    mask = used[:, None] & (n < I)[None, :]
    row = place.to(tl.int64)
    at = first_ptr + row[:, None] * (HALVES * I) + n[None, :]
    gate = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    up = gate
    if HALVES == 2:
        up = tl.load(at + I, mask=mask, other=0.0).to(tl.float32)
    if ON_INPUT:
        weight = tl.load(routing_ptr + slot, mask=used, other=0.0).to(tl.float32)
        gate = gate * weight[:, None]
        up = up * weight[:, None]
    hidden = activate(
        gate,
        up,
        setting(alpha_ptr + expert, 1.0, HAS_ALPHA),
        setting(beta_ptr + expert, 0.0, HAS_BETA),
        setting(limit_ptr + expert, float("inf"), HAS_LIMIT),
        KIND,
    )
    if QUANTIZE:
        scale = group_scale(hidden)
        scale_at = out_scale_ptr + group.to(tl.int64) * places + row
        tl.store(scale_at, scale, mask=used)
        hidden = tl.div_rn(hidden, tl.broadcast_to(scale[:, None], hidden.shape))
    stored = to_e4m3(hidden, DEVICE) if QUANTIZE else to_bfloat16(hidden, DEVICE)
    tl.store(out_ptr + row[:, None] * I + n[None, :], stored, mask=mask)
