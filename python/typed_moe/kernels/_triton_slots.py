"""Triton: slots sorted by expert, from marks that an earlier launch made.

A slot is one of a token's k choices: slot t * k + j. Slots of one expert lie side by side in the
order of their numbers, and each expert starts on a multiple of BLOCK.

No atomics: where a slot goes is the number of slots before it, which is counted. A chunk is 4 to 32
rows, of four programs of the first launch. `marks` (C, P) has 32 bits per chunk and expert, P being
the places of a row there: a bit for each row, set where the row chose the expert. So the ones in it are
the chunk's slots of that expert, and those below a row's bit are the slots before that row's. For ids
that another routing gave, which may name an expert twice in a row, a chunk is CHUNK slots, its mark is
how many of them chose the expert, and a slot is compared with each of its chunk.

Every program of `place_kernel` adds up the chunks before its own; where that is much to add,
`scan_kernel` does it once, in a launch between the two. A slot on a block's first place says whose
the block is.

With PDL a kernel is launched while the one before it still runs. `follow` waits for that one, and only then
lets the next one start. So where the launch before is one that follows, all launches before that one are
complete, and what they wrote may be read ahead of the wait, from the L2 cache, where writes are. Where it is
a caller's or a library's nothing is read ahead, and nothing is ever written ahead.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_TAIL = tl.constexpr(256)
_OTHERS = tl.constexpr(32)


@triton.jit
def follow(PDL: tl.constexpr) -> None:
    """Wait for the launch before this one, and let the next one start, which waits likewise."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def ones_in(x: tl.tensor) -> tl.tensor:
    """How many bits of each uint32 are set: one instruction where it is compiled."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def slots_in(mark: tl.tensor, ROWS: tl.constexpr) -> tl.tensor:
    """A mark's slots. ROWS: of a program that made it; 0: it is their number."""
    if ROWS > 0:
        return ones_in(mark.to(tl.uint32, bitcast=True))
    else:
        return mark


@triton.jit
def place_of(expert: tl.tensor, GROUP_SIZE: tl.constexpr, GROUP_PAD: tl.constexpr) -> tl.tensor:
    """An expert's place in a row of marks."""
    if GROUP_SIZE == GROUP_PAD:
        return expert
    else:
        return expert // GROUP_SIZE * GROUP_PAD + expert % GROUP_SIZE


@triton.jit
def rank_of(
    ids_ptr: tl.tensor,
    slot: tl.tensor,
    expert: tl.tensor,
    mark: tl.tensor,
    num_slots: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """How many slots of its chunk are before each, of the same expert."""
    if ROWS > 0:
        row = slot // K
        bit = row % ROWS + row // ROWS % 4 * 8
        below = (tl.full(slot.shape, 1, tl.uint32) << bit.to(tl.uint32)) - 1
        return ones_in(mark.to(tl.uint32, bitcast=True) & below)
    else:
        return rank_by_comparing(ids_ptr, slot, expert, num_slots)


@triton.jit
def rank_by_comparing(
    ids_ptr: tl.tensor, slot: tl.tensor, expert: tl.tensor, num_slots: tl.tensor
) -> tl.tensor:
    """How many of these slots are before each, of the same expert: each is compared with each."""
    SLOTS: tl.constexpr = slot.shape[0]
    first = tl.min(slot, 0)
    rank = tl.zeros([SLOTS], tl.int32)
    for near in range(0, SLOTS, _OTHERS):
        earlier = first + near + tl.arange(0, _OTHERS)
        other = tl.load(ids_ptr + earlier, mask=earlier < num_slots, other=-1)
        same = (other[None, :] == expert[:, None]) & (earlier[None, :] < slot[:, None])
        rank += tl.sum(same.to(tl.int32), 1)
    return rank


@triton.jit
def fill_blocks(
    slots_ptr: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    program: tl.tensor,
    num_slots: tl.tensor,
    FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The places behind the last slot of FILLED experts, which hold `num_slots`."""
    entry = program * FILLED + tl.arange(0, FILLED)
    # Behind the last local expert counts are 0.
    filled = tl.gather(count, entry, 0)
    rest = filled[:, None] + tl.arange(0, BLOCK)[None, :]
    at = slots_ptr + tl.gather(start, entry, 0)[:, None] + rest
    inside = rest < ((filled + (BLOCK - 1)) // BLOCK * BLOCK)[:, None]
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


# `first` stays specialised: where it is a multiple of 16, neighbouring experts are loaded together.
@triton.jit(do_not_specialize=["num_chunks", "num_local"])
def scan_kernel(
    marks_ptr: tl.tensor,
    before_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_chunks: tl.tensor,
    first: tl.tensor,
    num_local: tl.tensor,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    L_PAD: tl.constexpr,
    L_TILE: tl.constexpr,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """L_TILE experts: their slots, and `before` (C, L_PAD) int64.

    Its upper half is how many of an expert's slots are in earlier chunks, its lower half the mark.
    """
    local = tl.program_id(0) * L_TILE + tl.arange(0, L_TILE)
    follow(PDL)
    place = place_of(first + local, GROUP_SIZE, GROUP_PAD)
    total = tl.zeros([L_TILE], tl.int32)
    done = num_chunks - num_chunks
    while done < num_chunks:
        chunk = done + tl.arange(0, TILE)
        row = chunk.to(tl.int64)[:, None]
        inside = (chunk < num_chunks)[:, None]
        mark = tl.load(marks_ptr + row * PLACES + place[None, :], mask=inside, other=0)
        some = slots_in(mark, ROWS)
        earlier = total[None, :] + tl.cumsum(some, 0) - some
        both = (earlier.to(tl.int64) << 32) | mark.to(tl.uint32, bitcast=True).to(tl.int64)
        tl.store(before_ptr + row * L_PAD + local[None, :], both, mask=inside)
        total += tl.sum(some, 0)
        done += TILE
    tl.store(counts_ptr + local, total, mask=local < num_local)


@triton.jit
def add_chunks(
    marks_ptr: tl.tensor,
    place: tl.tensor,
    num_chunks: tl.tensor,
    first_chunk: tl.tensor,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """(L_PAD,) slots of all chunks, and of those before `first_chunk`.

    `place` (L_PAD,): the experts' in a row of marks.
    """
    L_PAD: tl.constexpr = place.shape[0]
    # Summed place by place, over the tile's rows once at the end.
    all_chunks = tl.zeros([TILE, L_PAD], tl.int32)
    earlier = tl.zeros([TILE, L_PAD], tl.int32)
    left = num_chunks
    while left > 0:
        chunk = left - 1 - tl.arange(0, TILE)
        at = marks_ptr + chunk[:, None] * PLACES + place[None, :]
        mark = tl.load(at, mask=(chunk >= 0)[:, None], other=0)
        some = slots_in(mark, ROWS)
        all_chunks += some
        earlier += tl.where((chunk < first_chunk)[:, None], some, 0)
        left -= TILE
    return tl.sum(all_chunks, 0), tl.sum(earlier, 0)


@triton.jit(
    do_not_specialize=[
        "num_slots",
        "num_chunks",
        "first_local",
        "num_local",
        "num_blocks",
        "num_placing",
        "first",
    ]
)
def place_kernel(
    ids_ptr: tl.tensor,
    marks_ptr: tl.tensor,
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
    num_placing: tl.tensor,
    first: tl.tensor,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    PLACES: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    CHUNK: tl.constexpr,
    SLOTS: tl.constexpr,
    L_PAD: tl.constexpr,
    TILE: tl.constexpr,
    FILLED: tl.constexpr,
    BLOCK: tl.constexpr,
    SCANNED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """`num_placing` programs place slots, the others fill blocks. Program 0 writes counts and offsets.

    A program places a chunk of CHUNK slots, or, SCANNED, SLOTS of them: `scan_kernel` has written
    counts and `before`. FILLED: of how many experts a program fills the last block.
    """
    program = tl.program_id(0)
    local = tl.arange(0, L_PAD)
    is_local = local < num_local
    one = tl.arange(0, SLOTS)
    # What is behind the last local expert holds anything.
    if SCANNED:
        slot = program * SLOTS + one
        # Before the wait: `scan_kernel` let this launch start when it had itself waited for the one
        # that wrote the ids. From L2, where that one's writes are.
        expert = tl.load(ids_ptr + slot, mask=slot < num_slots, other=-1, cache_modifier=".cg")
        follow(PDL)
        count = tl.load(counts_ptr + local, mask=is_local, other=0)
        earlier = count
    else:
        slot = program * CHUNK + one
        follow(PDL)
        is_slot = (one < CHUNK) & (slot < num_slots)
        expert = tl.load(ids_ptr + slot, mask=is_slot, other=-1)
        place = place_of(first + local, GROUP_SIZE, GROUP_PAD)
        count, earlier = add_chunks(marks_ptr, place, num_chunks, program, TILE, ROWS, PLACES)
        count = tl.where(is_local, count, 0)
    padded = (count + (BLOCK - 1)) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    used = tl.sum(padded, 0)
    if program == 0:
        if not SCANNED:
            tl.store(counts_ptr + local, count, mask=is_local)
        tl.store(offsets_ptr + local, start, mask=is_local)
        tl.store(offsets_ptr + num_local, used)
    if program < num_placing:
        placed = (expert >= first_local) & (expert - first_local < num_local)
        entry = tl.where(placed, expert - first_local, 0)
        chunk = (slot // CHUNK).to(tl.int64)
        if SCANNED:
            both = tl.load(before_ptr + chunk * L_PAD + entry, mask=placed, other=0)
            mark = both.to(tl.int32)
            position = tl.gather(start, entry, 0) + (both >> 32).to(tl.int32)
        else:
            at = chunk * PLACES + place_of(first + entry, GROUP_SIZE, GROUP_PAD)
            mark = tl.load(marks_ptr + at, mask=placed, other=0)
            position = tl.gather(start + earlier, entry, 0)
        position += rank_of(ids_ptr, slot, expert, mark, num_slots, K, ROWS)
        tl.store(slots_ptr + position, slot, mask=placed)
        opens = placed & (position % BLOCK == 0)
        tl.store(block_experts_ptr + position // BLOCK, entry, mask=opens)
    else:
        filling = program - num_placing
        fill_blocks(slots_ptr, start, count, filling, num_slots, FILLED, BLOCK)
    close_blocks(block_experts_ptr, used // BLOCK, num_blocks, program, tl.num_programs(0))


@triton.jit
def place_whole(
    slots_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    ids: tl.tensor,
    start: tl.tensor,
    count: tl.tensor,
    num_tokens: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """All slots to their places, by the one program there is; an expert's last one fills its block.

    `ids` (ROWS, K_PAD), and by place where each expert starts and its slots.
    """
    K_PAD: tl.constexpr = ids.shape[1]
    SLOTS: tl.constexpr = ids.shape[0] * K_PAD
    one = tl.arange(0, SLOTS)
    row, column = one // K_PAD, one % K_PAD
    slot = row * K + column
    expert = tl.reshape(ids, [SLOTS])
    local = expert - first_local
    placed = (column < K) & (row < num_tokens) & (local >= 0) & (local < num_local)
    # Slots that are in no place differ from all others.
    whose = tl.where(placed, expert, -one - 1)
    same = (whose[None, :] == whose[:, None]) & (one[None, :] < one[:, None])
    rank = tl.sum(same.to(tl.int32), 1)
    at = tl.where(placed, place_of(expert, GROUP_SIZE, GROUP_PAD), 0)
    position = tl.gather(start, at, 0) + rank
    tl.store(slots_ptr + position, slot, mask=placed)
    opens = placed & (position % BLOCK == 0)
    tl.store(block_experts_ptr + position // BLOCK, local, mask=opens)
    last = placed & (rank + 1 == tl.gather(count, at, 0))
    rest = position[:, None] + 1 + tl.arange(0, BLOCK)[None, :]
    block_end = (position // BLOCK + 1) * BLOCK
    filler = tl.full([SLOTS, BLOCK], 0, tl.int32) + num_tokens * K
    tl.store(slots_ptr + rest, filler, mask=last[:, None] & (rest < block_end[:, None]))


@triton.jit(do_not_specialize=["num_slots", "first_local", "num_local"])
def count_kernel(
    ids_ptr: tl.tensor,
    marks_ptr: tl.tensor,
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
    at = marks_ptr + program.to(tl.int64) * L_PAD + local
    tl.store(at, count, mask=local < num_local)
