"""Triton: slots sorted by expert, in one pass over counts that an earlier launch wrote.

A slot is one of a token's k choices: slot t * k + j. Slots of one expert lie side by side in the
order of their numbers, and each expert starts on a multiple of BLOCK.

No atomics: where a slot goes is the number of slots before it, which is counted. A chunk is the
rows of one program of the first launch; `chunk_counts` (C, L) uint8 holds how many of them chose
each local expert.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait


@triton.jit
def write_blocks(
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    count: tl.tensor,
    start: tl.tensor,
    is_local: tl.tensor,
    first_block: tl.tensor,
    end_block: tl.tensor,
    num_blocks: tl.tensor,
    filler: tl.tensor,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Whose each of these blocks is, and `filler` in the places behind an expert's last slot.

    `count`, `start`, `is_local`: (P,), local experts in the order of their ids.
    """
    padded = (count + (BLOCK - 1)) // BLOCK * BLOCK
    used = tl.sum(padded, 0)
    # `while` and not `range` here and below: a bound is a tensor in the interpreter, and NumPy no
    # longer makes an index of one.
    base = first_block
    while base < end_block:
        block = base + tl.arange(0, TILE)
        at = block * BLOCK
        inside = (block < end_block) & (block < num_blocks)
        # The experts that end at or before this block, and the last real slot's end of those that
        # start at or before it: both grow with the expert, so that a sum and a maximum find them.
        ended = (start + padded)[None, :] <= at[:, None]
        expert = tl.sum((ended & is_local[None, :]).to(tl.int32), 1)
        begun = (start[None, :] <= at[:, None]) & (count > 0)[None, :]
        end = tl.max(tl.where(begun, (start + count)[None, :], 0), 1)
        owned = at < used
        tl.store(block_experts_ptr + block, tl.where(owned, expert, -1), mask=inside)
        end = tl.where(owned, end, 0)
        position = at[:, None] + tl.arange(0, BLOCK)[None, :]
        empty = (position >= end[:, None]) & inside[:, None]
        tl.store(slots_ptr + position, tl.full(position.shape, 0, tl.int32) + filler, mask=empty)
        base += TILE


@triton.jit(
    do_not_specialize=[
        "num_slots",
        "num_chunks",
        "first_local",
        "num_local",
        "num_blocks",
        "blocks_per_program",
    ]
)
def place_kernel(
    ids_ptr: tl.tensor,
    chunk_counts_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_chunks: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    num_blocks: tl.tensor,
    blocks_per_program: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNK_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    OTHERS: tl.constexpr,
    L_PAD: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """CHUNKS chunks of CHUNK slots: each slot to its place. Program 0 writes counts and offsets."""
    program = tl.program_id(0)
    first_chunk = program * CHUNKS
    local = tl.arange(0, L_PAD)
    is_local = local < num_local
    if PDL:
        gdc_wait()
    count = tl.zeros([L_PAD], tl.int32)
    before = tl.zeros([L_PAD], tl.int32)
    left = num_chunks
    while left > 0:
        chunk = left - 1 - tl.arange(0, TILE)
        at = chunk_counts_ptr + chunk.to(tl.int64)[:, None] * num_local + local[None, :]
        mask = (chunk >= 0)[:, None] & is_local[None, :]
        some = tl.load(at, mask=mask, other=0).to(tl.int32)
        count += tl.sum(some, 0)
        before += tl.sum(tl.where((chunk < first_chunk)[:, None], some, 0), 0)
        left -= TILE
    padded = (count + (BLOCK - 1)) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    if program == 0:
        tl.store(counts_ptr + local, count, mask=is_local)
        tl.store(offsets_ptr + local, start, mask=is_local)
        tl.store(offsets_ptr + num_local, tl.sum(padded, 0))

    next_place = start + before
    one = tl.arange(0, CHUNK_PAD)
    for step in range(CHUNKS):
        first_slot = (first_chunk + step) * CHUNK
        slot = first_slot + one
        is_slot = (one < CHUNK) & (slot < num_slots)
        mine = tl.load(ids_ptr + slot, mask=is_slot, other=-1) - first_local
        placed = is_slot & (mine >= 0) & (mine < num_local)
        mine = tl.where(placed, mine, 0)
        rank = tl.zeros([CHUNK_PAD], tl.int32)
        for near in range(0, CHUNK_PAD, OTHERS):
            place = near + tl.arange(0, OTHERS)
            is_other = (place < CHUNK) & (first_slot + place < num_slots)
            other = tl.load(ids_ptr + first_slot + place, mask=is_other, other=-1) - first_local
            same = (other[None, :] == mine[:, None]) & (place[None, :] < one[:, None])
            rank += tl.sum(same.to(tl.int32), 1)
        tl.store(slots_ptr + tl.gather(next_place, mine, 0) + rank, slot, mask=placed)
        if CHUNKS > 1:
            chunk_at = chunk_counts_ptr + (first_chunk + step).to(tl.int64) * num_local + local
            here = is_local & (first_chunk + step < num_chunks)
            next_place += tl.load(chunk_at, mask=here, other=0).to(tl.int32)

    first_block = program * blocks_per_program
    write_blocks(
        slots_ptr,
        block_experts_ptr,
        count,
        start,
        is_local,
        first_block,
        tl.minimum(first_block + blocks_per_program, num_blocks),
        num_blocks,
        num_slots,
        BLOCK,
        BLOCK_TILE,
    )


@triton.jit(do_not_specialize=["num_slots", "first_local", "num_local"])
def count_kernel(
    ids_ptr: tl.tensor,
    chunk_counts_ptr: tl.tensor,
    num_slots: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNK_PAD: tl.constexpr,
    L_TILE: tl.constexpr,
) -> None:
    """One chunk's slots per local expert, for ids that another routing gave. -1 counts nowhere."""
    program = tl.program_id(0)
    one = tl.arange(0, CHUNK_PAD)
    slot = program * CHUNK + one
    mine = tl.load(ids_ptr + slot, mask=(one < CHUNK) & (slot < num_slots), other=-1)
    local = tl.program_id(1) * L_TILE + tl.arange(0, L_TILE)
    # An id of -1, and of another rank, is no local expert's number plus the first one's.
    count = tl.sum((mine[:, None] == (local + first_local)[None, :]).to(tl.int32), 0)
    at = chunk_counts_ptr + program.to(tl.int64) * num_local + local
    tl.store(at, count.to(tl.uint8), mask=local < num_local)
