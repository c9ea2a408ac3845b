"""Triton: slots sorted by expert, from counts that an earlier launch wrote.

A slot is one of a token's k choices: slot t * k + j. Slots of one expert lie side by side in the
order of their numbers, and each expert starts on a multiple of BLOCK.

No atomics: where a slot goes is the number of slots before it, which is counted. A chunk is the
rows of one program of the first launch; `chunk_counts` (C, L) uint8, L padded to a power of two,
holds how many of them chose each local expert. Every program of `place_kernel` adds up the chunks
before its own; where that is much to add, `scan_kernel` does it once, in a launch between the two.
A slot on a block's first place says whose the block is.

With PDL a kernel is launched while the one before it still runs, and waits before it reads or writes.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

IN_MEMORY = tl.constexpr(1)
IN_REGISTERS = tl.constexpr(0)
BY_SLOTS = tl.constexpr(0)
_TAIL = tl.constexpr(256)


@triton.jit
def follow(PDL: tl.constexpr) -> None:
    """Wait for the launch before this one, and let the next one start, which waits likewise."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def place_slots(
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    next_place: tl.tensor,
    end: tl.tensor,
    first_slot: tl.tensor,
    num_slots: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNK_PAD: tl.constexpr,
    OTHERS: tl.constexpr,
    BLOCK: tl.constexpr,
    TABLES: tl.constexpr,
    FILLED: tl.constexpr,
) -> None:
    """CHUNK slots to their places.

    `next_place` and `end` are tables over the local experts: where an expert's next slot goes, and
    one past where its last one does. With TABLES = IN_MEMORY: pointers to where each starts, and to its
    count. With FILLED = BY_SLOTS an expert's last slot fills the rest of its block.
    """
    one = tl.arange(0, CHUNK_PAD)
    slot = first_slot + one
    expert = tl.load(ids_ptr + slot, mask=(one < CHUNK) & (slot < num_slots), other=-1)
    local = expert - first_local
    placed = (expert >= 0) & (local >= 0) & (local < num_local)
    rank = tl.zeros([CHUNK_PAD], tl.int32)
    for near in range(0, CHUNK_PAD, OTHERS):
        place = near + tl.arange(0, OTHERS)
        is_other = (place < CHUNK) & (first_slot + place < num_slots)
        other = tl.load(ids_ptr + first_slot + place, mask=is_other, other=-1)
        same = (other[None, :] == expert[:, None]) & (place[None, :] < one[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    entry = tl.where(placed, local, 0)
    if TABLES == IN_MEMORY:
        start = tl.load(next_place + entry)
        position = start + rank
        end_place = start + tl.load(end + entry)
    else:
        position = tl.gather(next_place, entry, 0) + rank
        end_place = tl.gather(end, entry, 0)
    tl.store(slots_ptr + position, slot, mask=placed)
    opens = placed & (position % BLOCK == 0)
    tl.store(block_experts_ptr + position // BLOCK, local, mask=opens)
    if FILLED == BY_SLOTS:
        last = placed & (position + 1 == end_place)
        rest = position[:, None] + 1 + tl.arange(0, BLOCK)[None, :]
        block_end = (position // BLOCK + 1) * BLOCK
        filler = tl.full([CHUNK_PAD, BLOCK], 0, tl.int32) + num_slots
        tl.store(slots_ptr + rest, filler, mask=last[:, None] & (rest < block_end[:, None]))


@triton.jit
def fill_blocks(
    slots_ptr: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    num_slots: tl.tensor,
    FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The places behind the last slot of FILLED experts of this program, which hold `num_slots`."""
    L_PAD: tl.constexpr = start.shape[0]
    local = tl.program_id(0) * FILLED + tl.arange(0, FILLED)
    entry = tl.minimum(local, L_PAD - 1)
    # Behind the last local expert counts are 0.
    filled = tl.gather(count, entry, 0)
    rest = filled[:, None] + tl.arange(0, BLOCK)[None, :]
    at = slots_ptr + tl.gather(start, entry, 0)[:, None] + rest
    inside = (local < L_PAD)[:, None] & (rest < ((filled + (BLOCK - 1)) // BLOCK * BLOCK)[:, None])
    tl.store(at, tl.full([FILLED, BLOCK], 0, tl.int32) + num_slots, mask=inside)


@triton.jit
def close_blocks(
    block_experts_ptr: tl.tensor,
    used_blocks: tl.tensor,
    num_blocks: tl.tensor,
    program: tl.tensor,
    num_programs: tl.tensor,
) -> None:
    """-1 for the blocks behind the last expert, shared out over the programs."""
    first = used_blocks + program * _TAIL
    while first < num_blocks:
        block = first + tl.arange(0, _TAIL)
        tl.store(block_experts_ptr + block, tl.full([_TAIL], -1, tl.int32), mask=block < num_blocks)
        first += num_programs * _TAIL


@triton.jit(do_not_specialize=["num_chunks", "num_local"])
def scan_kernel(
    chunk_counts_ptr: tl.tensor,
    before_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_chunks: tl.tensor,
    num_local: tl.tensor,
    L_PAD: tl.constexpr,
    L_TILE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """L_TILE experts: their slots, and `before` (C, L_PAD) int32, how many are in earlier chunks."""
    local = tl.program_id(0) * L_TILE + tl.arange(0, L_TILE)
    follow(PDL)
    total = tl.zeros([L_TILE], tl.int32)
    first = num_chunks - num_chunks
    while first < num_chunks:
        chunk = first + tl.arange(0, TILE)
        at = chunk[:, None] * L_PAD + local[None, :]
        inside = (chunk < num_chunks)[:, None]
        some = tl.load(chunk_counts_ptr + at, mask=inside, other=0).to(tl.int32)
        tl.store(before_ptr + at, total[None, :] + tl.cumsum(some, 0) - some, mask=inside)
        total += tl.sum(some, 0)
        first += TILE
    tl.store(counts_ptr + local, total, mask=local < num_local)


@triton.jit
def add_chunks(
    chunk_counts_ptr: tl.tensor,
    num_chunks: tl.tensor,
    first_chunk: tl.tensor,
    TILE: tl.constexpr,
    L_PAD: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(L_PAD,) slots of all chunks, and of those before `first_chunk`."""
    local = tl.arange(0, L_PAD)
    # Summed place by place, over the tile's rows once at the end.
    all_chunks = tl.zeros([TILE, L_PAD], tl.int32)
    earlier = tl.zeros([TILE, L_PAD], tl.int32)
    left = num_chunks
    while left > 0:
        chunk = left - 1 - tl.arange(0, TILE)
        at = chunk_counts_ptr + chunk[:, None] * L_PAD + local[None, :]
        some = tl.load(at, mask=(chunk >= 0)[:, None], other=0).to(tl.int32)
        all_chunks += some
        earlier += tl.where((chunk < first_chunk)[:, None], some, 0)
        left -= TILE
    return tl.sum(all_chunks, 0), tl.sum(earlier, 0)


@triton.jit(do_not_specialize=["num_slots", "num_chunks", "first_local", "num_local", "num_blocks"])
def place_kernel(
    ids_ptr: tl.tensor,
    chunk_counts_ptr: tl.tensor,
    before_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_slots: tl.tensor,
    num_chunks: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    num_blocks: tl.tensor,
    CHUNK: tl.constexpr,
    CHUNK_PAD: tl.constexpr,
    CHUNKS: tl.constexpr,
    OTHERS: tl.constexpr,
    L_PAD: tl.constexpr,
    TILE: tl.constexpr,
    FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCANNED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """CHUNKS chunks of CHUNK slots: each slot to its place. Program 0 writes counts and offsets.

    SCANNED: `scan_kernel` has written counts and `before`; CHUNKS is 1. FILLED: of how many experts a
    program fills the last block, or BY_SLOTS.
    """
    program = tl.program_id(0)
    first_chunk = program * CHUNKS
    local = tl.arange(0, L_PAD)
    is_local = local < num_local
    follow(PDL)
    # Columns behind the last local expert hold anything.
    if SCANNED:
        count = tl.load(counts_ptr + local, mask=is_local, other=0)
        earlier = tl.load(before_ptr + program * L_PAD + local, mask=is_local, other=0)
    else:
        count, earlier = add_chunks(chunk_counts_ptr, num_chunks, first_chunk, TILE, L_PAD)
        count = tl.where(is_local, count, 0)
    padded = (count + (BLOCK - 1)) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    used = tl.sum(padded, 0)
    if program == 0:
        if not SCANNED:
            tl.store(counts_ptr + local, count, mask=is_local)
        tl.store(offsets_ptr + local, start, mask=is_local)
        tl.store(offsets_ptr + num_local, used)

    next_place = start + earlier
    for step in range(CHUNKS):
        place_slots(
            slots_ptr,
            block_experts_ptr,
            ids_ptr,
            next_place,
            start + count,
            (first_chunk + step) * CHUNK,
            num_slots,
            first_local,
            num_local,
            CHUNK,
            CHUNK_PAD,
            OTHERS,
            BLOCK,
            IN_REGISTERS,
            FILLED,
        )
        if CHUNKS > 1:
            at_chunk = chunk_counts_ptr + (first_chunk + step) * L_PAD + local
            here = is_local & (first_chunk + step < num_chunks)
            next_place += tl.load(at_chunk, mask=here, other=0).to(tl.int32)
    if FILLED != BY_SLOTS:
        fill_blocks(slots_ptr, start, count, num_slots, FILLED, BLOCK)
    close_blocks(block_experts_ptr, used // BLOCK, num_blocks, program, tl.num_programs(0))


@triton.jit(do_not_specialize=["num_slots", "first_local", "num_local"])
def count_kernel(
    ids_ptr: tl.tensor,
    chunk_counts_ptr: tl.tensor,
    num_slots: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    CHUNK: tl.constexpr,
    L_PAD: tl.constexpr,
    L_TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One chunk's slots per local expert, for ids that another routing gave. -1 counts nowhere."""
    program = tl.program_id(0)
    follow(PDL)
    slot = program * CHUNK + tl.arange(0, CHUNK)
    expert = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1)
    local = tl.program_id(1) * L_TILE + tl.arange(0, L_TILE)
    # An id of -1, and of another rank, is no local expert's number plus the first one's.
    count = tl.sum((expert[:, None] == (local + first_local)[None, :]).to(tl.int32), 0)
    at = chunk_counts_ptr + program * L_PAD + local
    tl.store(at, count.to(tl.uint8), mask=local < num_local)
