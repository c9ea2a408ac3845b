"""Triton: logits to experts and weights, a few rows per program.

Tile: (ROWS, J, W). The experts of a row stand in J * W places, group after group, each group padded
to a power of two, and a group is one or several runs of W places. Triton deals a tile out to the
lanes of a warp along W, then along ROWS, then along J, and to warps likewise: with W and ROWS
chosen to fit, no row is divided over warps, and a reduction over it stays in registers and
shuffles.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from typed_moe.kernels._triton_quantize import quantize_part
from typed_moe.kernels._triton_scores import TAKEN, exp, key_of, number_of, score
from typed_moe.kernels._triton_slots import close_blocks, follow, place_whole

NO_EXPERT = tl.constexpr(2**30)
"""Above every expert id."""
_LOWEST_KEY = tl.constexpr(-2139095041)
"""`key_of(-inf)`."""


@triton.jit
def row_max(x: tl.tensor) -> tl.tensor:
    """(ROWS, J, W) to (ROWS,)."""
    return tl.max(tl.max(x, 1), 1)


@triton.jit
def row_min(x: tl.tensor) -> tl.tensor:
    """(ROWS, J, W) to (ROWS,)."""
    return tl.min(tl.min(x, 1), 1)


@triton.jit
def sum_of_pairs(x: tl.tensor) -> tl.tensor:
    """(ROWS, K) to (ROWS,), K a power of two: neighbours added up, then neighbouring sums, and so on.

    `tl.sum` adds in an order that follows from how a tile lies in its warps; this is the same in all.
    """
    ROWS: tl.constexpr = x.shape[0]
    K: tl.constexpr = x.shape[1]
    if K == 1:
        return tl.reshape(x, [ROWS])
    else:
        return sum_of_pairs(tl.sum(tl.reshape(x, [ROWS, K // 2, 2]), 2))


@triton.jit
def sum_of_runs(x: tl.tensor) -> tl.tensor:
    """(ROWS, J, W) to (ROWS, W), likewise, the first half and the second half: those lie in one thread."""
    ROWS: tl.constexpr = x.shape[0]
    J: tl.constexpr = x.shape[1]
    W: tl.constexpr = x.shape[2]
    if J == 1:
        return tl.reshape(x, [ROWS, W])
    else:
        return sum_of_runs(tl.sum(tl.reshape(x, [ROWS, 2, J // 2, W]), 1))


@triton.jit
def group_max(x: tl.tensor, G: tl.constexpr) -> tl.tensor:
    """(ROWS, J, W) to (ROWS, G)."""
    best = tl.max(x, 2)
    if best.shape[1] == G:
        return best
    else:
        return tl.max(tl.reshape(best, [best.shape[0], G, best.shape[1] // G]), 2)


@triton.jit
def over_group(x: tl.tensor, J: tl.constexpr) -> tl.tensor:
    """(ROWS, G) to (ROWS, J, 1)."""
    ROWS: tl.constexpr = x.shape[0]
    G: tl.constexpr = x.shape[1]
    if G == J:
        return tl.expand_dims(x, 2)
    else:
        wide = tl.broadcast_to(tl.expand_dims(x, 2), [ROWS, G, J // G])
        return tl.expand_dims(tl.reshape(wide, [ROWS, J]), 2)


@triton.jit
def keep_groups(
    key: tl.tensor,
    expert: tl.tensor,
    NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    G: tl.constexpr,
) -> tl.tensor:
    """Keys with that of -inf on every expert outside the KEPT best groups."""
    J: tl.constexpr = key.shape[1]
    group = tl.expand_dims(tl.arange(0, G), 0)
    best = group_max(key, G)
    if TWO_BEST:
        at_best = tl.where(key == over_group(best, J), expert, NO_EXPERT)
        first = -group_max(-at_best, G)
        second = group_max(tl.where(expert == over_group(first, J), TAKEN, key), G)
        best = key_of(number_of(best) + number_of(second))
    best = tl.where(group < NUM_GROUPS, best, TAKEN)
    kept = best == TAKEN
    for _ in tl.static_range(KEPT):
        top = tl.expand_dims(tl.max(best, 1), 1)
        chosen = tl.expand_dims(tl.min(tl.where(best == top, group, G), 1), 1)
        kept = kept | (group == chosen)
        best = tl.where(group == chosen, TAKEN, best)
    inside = over_group(kept.to(tl.int32), J) != 0
    return tl.where(inside | (key == TAKEN), key, _LOWEST_KEY)


@triton.jit
def weights_of(
    x: tl.tensor,
    used: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    scale: tl.tensor,
    WEIGH: tl.constexpr,
    DIVIDE: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tl.tensor:
    """(ROWS, K) logits of the chosen experts to their weights; 0 on a row with one that is not finite.

    `used` (1, K): which columns are there, K being a power of two. `top` and `total` are the row's largest logit and its sum of exponentials, for `softmax`.
    """
    if WEIGH == "softmax":
        weight = tl.div_rn(exp(x - top[:, None], DEVICE), tl.broadcast_to(total[:, None], x.shape))
    elif WEIGH == "softmax_chosen":
        largest = tl.max(tl.where(used, x, -float("inf")), 1)
        raised = tl.where(used, exp(x - largest[:, None], DEVICE), 0.0)
        weight = tl.div_rn(raised, tl.broadcast_to(sum_of_pairs(raised)[:, None], x.shape))
    else:
        weight = score(x, WEIGH, DEVICE)
    if DIVIDE != "nothing":
        divisor = sum_of_pairs(tl.where(used, weight, 0.0))
        divisor = divisor + 1e-20 if DIVIDE == "sum_plus_epsilon" else tl.maximum(divisor, 1e-20)
        weight = tl.div_rn(weight, tl.broadcast_to(divisor[:, None], x.shape))
    weight = weight * scale
    # NaN and both infinities are not below infinity in size.
    broken = tl.where(used & ~(tl.abs(weight) < float("inf")), 1, 0)
    return tl.where((tl.max(broken, 1) == 0)[:, None], weight, 0.0)


@triton.jit
def ranking_of(
    x: tl.tensor,
    is_expert: tl.tensor,
    RANK: tl.constexpr,
    WEIGH: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """What orders the experts; a row's largest logit and its sum of exponentials, if either is read."""
    top = tl.zeros([x.shape[0]], tl.float32)
    total = top
    if WEIGH == "softmax" or RANK == "softmax":
        shown = tl.where(is_expert, x, -float("inf"))
        top = row_max(shown)
        raised = exp(shown - top[:, None, None], DEVICE)
        total = tl.sum(sum_of_runs(raised), 1)
        if RANK == "softmax":
            x = tl.div_rn(raised, tl.broadcast_to(total[:, None, None], raised.shape))
    if RANK != "softmax":
        x = score(x, RANK, DEVICE)
    return x, top, total


@triton.jit
def take_one_by_one(
    key: tl.tensor, expert: tl.tensor, K: tl.constexpr, K_PAD: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """The K best of every row, one after the other, each looked for among all.

    Returns (ROWS, K_PAD) ids, and the keys with `TAKEN` on the chosen ones.
    """
    column = tl.arange(0, K_PAD)[None, :]
    ids = tl.zeros([key.shape[0], K_PAD], tl.int32)
    for step in range(K):
        best = row_max(key)
        chosen = row_min(tl.where(key == best[:, None, None], expert, NO_EXPERT))
        hit = expert == chosen[:, None, None]
        key = tl.where(hit, TAKEN, key)
        ids = tl.where(column == step, chosen[:, None], ids)
    return ids, key


@triton.jit
def move_up(hit: tl.tensor, queue: tl.tuple, LEVELS: tl.constexpr) -> tl.tuple:
    """Every lane's queue without its first where it was hit, and `TAKEN` behind its last."""
    moved: tl.tuple = ()
    for level in tl.static_range(LEVELS - 1):
        moved = moved + (tl.where(hit, queue[level + 1], queue[level]),)  # noqa: RUF005 - Triton
    return moved + (tl.where(hit, TAKEN, queue[LEVELS - 1]),)  # noqa: RUF005 - Triton


@triton.jit
def take_from_heads(
    heads: tl.tuple,
    experts: tl.tuple,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The K best of every row, each looked for among the (ROWS, W) best of every lane.

    Returns (ROWS, K_PAD) ids, (ROWS,) the key of the last, and (ROWS, W) how many a lane gave.
    """
    ROWS: tl.constexpr = heads[0].shape[0]
    column = tl.arange(0, K_PAD)[None, :]
    ids = tl.zeros([ROWS, K_PAD], tl.int32)
    last = tl.zeros([ROWS], tl.int32)
    given = tl.zeros(heads[0].shape, tl.int32)
    for step in range(K):
        last = tl.max(heads[0], 1)
        chosen = tl.min(tl.where(heads[0] == last[:, None], experts[0], NO_EXPERT), 1)
        hit = experts[0] == chosen[:, None]
        heads = move_up(hit, heads, LEVELS)
        experts = move_up(hit, experts, LEVELS)
        given += hit.to(tl.int32)
        ids = tl.where(column == step, chosen[:, None], ids)
    return ids, last, given


@triton.jit
def take_best(
    key: tl.tensor,
    expert: tl.tensor,
    is_row: tl.tensor,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The K best of every row: (ROWS, K_PAD) ids, and (ROWS, J, W) which they are.

    LEVELS: how many a lane may give. Where one of this program's rows needs more of a lane, all of
    them are taken again, one by one. 0: they are from the start.
    """
    if LEVELS == 0:
        ids, key = take_one_by_one(key, expert, K, K_PAD)
        return ids, key == TAKEN
    else:
        heads: tl.tuple = ()
        experts: tl.tuple = ()
        for _ in tl.static_range(LEVELS):
            best = tl.max(key, 1)
            at = tl.min(tl.where(key == tl.expand_dims(best, 1), expert, NO_EXPERT), 1)
            key = tl.where(expert == tl.expand_dims(at, 1), TAKEN, key)
            heads = heads + (best,)  # noqa: RUF005 - Triton
            experts = experts + (at,)  # noqa: RUF005 - Triton
        ids, last, given = take_from_heads(heads, experts, K, K_PAD, LEVELS)
        taken = tl.zeros(key.shape, tl.int1)
        for level in tl.static_range(LEVELS):
            at = tl.where(given > level, experts[level], -1)
            taken = taken | (expert == tl.expand_dims(at, 1))
        # A tie with the last one is among these, since a lower id would come first.
        missed = tl.max((tl.max(key, 1) >= last[:, None]).to(tl.int32), 1)
        if tl.max(tl.where(is_row, missed, 0), 0) != 0:
            for level in tl.static_range(LEVELS):
                back = tl.expand_dims(experts[LEVELS - 1 - level], 1)
                key = tl.where(expert == back, tl.expand_dims(heads[LEVELS - 1 - level], 1), key)
            ids, key = take_one_by_one(key, expert, K, K_PAD)
            taken = key == TAKEN
        return ids, taken


@triton.jit
def mark_rows(
    marks_ptr: tl.tensor, taken: tl.tensor, is_row: tl.tensor, program: tl.tensor
) -> None:
    """This program's 8 bits of the marks: bit r is set where its row r chose the expert.

    In one dimension, so that neighbours in a row are written by neighbours in a warp.
    """
    ROWS: tl.constexpr = taken.shape[0]
    PLACES: tl.constexpr = taken.shape[1] * taken.shape[2]
    bit = tl.where(is_row, tl.full([ROWS], 1, tl.int32) << tl.arange(0, ROWS), 0)
    mark = tl.reshape(tl.sum(tl.where(taken, bit[:, None, None], 0), 0), [PLACES])
    first = (program // 4).to(tl.int64) * (4 * PLACES) + program % 4
    tl.store(marks_ptr + first + tl.arange(0, PLACES) * 4, mark.to(tl.uint8))


@triton.jit
def sort_rows(
    slots_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    ids: tl.tensor,
    taken: tl.tensor,
    num_tokens: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    num_blocks: tl.tensor,
    K: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """The sorted slots of all rows, where one program has them all.

    `ids` (ROWS, K_PAD), best first, and `taken` (ROWS, J, W), where they are. All is in one dimension
    here, so that neighbours in memory are written by neighbours in a warp.
    """
    ROWS: tl.constexpr = taken.shape[0]
    PLACES: tl.constexpr = taken.shape[1] * taken.shape[2]
    is_row = (tl.arange(0, ROWS) < num_tokens)[:, None, None]
    place = tl.arange(0, PLACES)
    local = place // GROUP_PAD * GROUP_SIZE + place % GROUP_PAD - first_local
    is_local = (place % GROUP_PAD < GROUP_SIZE) & (local >= 0) & (local < num_local)
    count = tl.reshape(tl.sum((taken & is_row).to(tl.int32), 0), [PLACES])
    count = tl.where(is_local, count, 0)
    padded = (count + (BLOCK - 1)) // BLOCK * BLOCK
    start = tl.cumsum(padded, 0) - padded
    used = tl.sum(padded, 0)
    tl.store(counts_ptr + local, count, mask=is_local)
    tl.store(offsets_ptr + local, start, mask=is_local)
    tl.store(offsets_ptr + num_local, used)
    place_whole(
        slots_ptr,
        block_experts_ptr,
        ids,
        start,
        count,
        num_tokens,
        first_local,
        num_local,
        K,
        GROUP_SIZE,
        GROUP_PAD,
        BLOCK,
    )
    nothing = num_tokens - num_tokens
    close_blocks(block_experts_ptr, used // BLOCK, num_blocks, nothing, nothing + 1)


# The bias is read as if there were one per row, `bias_row_stride` being 0, so that it is dealt out to
# lanes as the logits are.
@triton.jit
def route_rows(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    rows: tl.tensor,
    is_row: tl.tensor,
    expert: tl.tensor,
    is_expert: tl.tensor,
    row_stride: tl.tensor,
    bias_row_stride: tl.tensor,
    scale: tl.tensor,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
    RANK: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVIDE: tl.constexpr,
    BIASED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    G: tl.constexpr,
    DEVICE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """These rows' ids and weights, best first. Returns (ROWS, K_PAD) ids and (ROWS, J, W) which they are."""
    row_start = logits_ptr + rows.to(tl.int64) * row_stride
    x = tl.load(
        row_start[:, None, None] + expert,
        mask=is_expert & is_row[:, None, None],
        other=-float("inf"),
    ).to(tl.float32)

    # 2: there is a NaN. 0: nothing above -inf. Both are routed as zeros and weigh 0.
    is_number = x == x  # noqa: PLR0124 - NaN
    state = row_max(tl.where(is_number, tl.where(x > -float("inf"), 1, 0), 2))
    usable = state == 1
    x = tl.where(usable[:, None, None], x, 0.0)
    ranking, top, total = ranking_of(x, is_expert, RANK, WEIGH, DEVICE)
    if BIASED:
        bias_start = bias_ptr + rows * bias_row_stride
        bias = tl.load(bias_start[:, None, None] + expert, mask=is_expert, other=0.0)
        ranking += bias.to(tl.float32)
    key = tl.where(is_expert, key_of(ranking), TAKEN)
    expert = tl.where(is_expert, expert, NO_EXPERT)
    if NUM_GROUPS > 1:
        key = keep_groups(key, expert, NUM_GROUPS, KEPT, TWO_BEST, G)
    ids, taken = take_best(key, expert, is_row, K, K_PAD, LEVELS)

    # The chosen logits again, from the cache: to carry them along would be a reduction per choice.
    column = tl.arange(0, K_PAD)[None, :]
    used = (column < K) & is_row[:, None]
    picked = tl.load(row_start[:, None] + ids, mask=used, other=0.0).to(tl.float32)
    picked = tl.where(usable[:, None], picked, 0.0)
    weight = weights_of(picked, column < K, top, total, scale, WEIGH, DIVIDE, DEVICE)
    weight = tl.where(usable[:, None], weight, 0.0)
    out = rows[:, None].to(tl.int64) * K + column
    tl.store(ids_ptr + out, ids, mask=used)
    tl.store(weights_ptr + out, weight, mask=used)
    return ids, taken


# `do_not_specialize`: one compilation serves every T and stride. And a stride of unknown alignment
# keeps Triton from dealing W out in vectors of four: it is dealt out one place to a lane.
@triton.jit(
    do_not_specialize=[
        "num_tokens",
        "row_stride",
        "bias_row_stride",
        "first_local",
        "num_local",
        "num_blocks",
        "num_routing",
    ]
)
def route_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    marks_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    block_experts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    row_stride: tl.tensor,
    bias_row_stride: tl.tensor,
    scale: tl.tensor,
    first_local: tl.tensor,
    num_local: tl.tensor,
    num_blocks: tl.tensor,
    x_ptr: tl.tensor,
    given_ptr: tl.tensor,
    quantized_ptr: tl.tensor,
    quantized_scale_ptr: tl.tensor,
    x_stride: tl.tensor,
    num_routing: tl.tensor,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    LEVELS: tl.constexpr,
    RANK: tl.constexpr,
    WEIGH: tl.constexpr,
    DIVIDE: tl.constexpr,
    BIASED: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    KEPT: tl.constexpr,
    TWO_BEST: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    GROUP_PAD: tl.constexpr,
    G: tl.constexpr,
    J: tl.constexpr,
    ROWS: tl.constexpr,
    W: tl.constexpr,
    SORT: tl.constexpr,
    BLOCK: tl.constexpr,
    FORM: tl.constexpr,
    H: tl.constexpr,
    VALUES: tl.constexpr,
    PACK: tl.constexpr,
    DEVICE: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """ROWS rows: ids and weights, best first.

    `SORT` is `none`; `mark`, which also writes which of these rows chose each local expert;
    or `whole`, for a grid of one program, which writes the sorted slots and all that goes with
    them.

    FORM other than "none": `num_routing` programs route, and those behind them each quantise a part of the
    activations, which nothing here depends on.
    """
    follow(PDL)
    program = tl.program_id(0)
    if FORM != "none":  # noqa: SIM102 - where it is, nothing below is compiled
        if program >= num_routing:
            quantize_part(
                x_ptr,
                given_ptr,
                quantized_ptr,
                quantized_scale_ptr,
                x_stride,
                program - num_routing,
                H,
                FORM,
                VALUES,
                PACK,
                DEVICE,
            )
            return
    place = tl.arange(0, J)[None, :, None] * W + tl.arange(0, W)[None, None, :]
    within = place % GROUP_PAD
    expert = (place // GROUP_PAD) * GROUP_SIZE + within
    is_expert = (within < GROUP_SIZE) & (expert < E)
    rows = program * ROWS + tl.arange(0, ROWS)
    ids, taken = route_rows(
        logits_ptr,
        bias_ptr,
        ids_ptr,
        weights_ptr,
        rows,
        rows < num_tokens,
        expert,
        is_expert,
        row_stride,
        bias_row_stride,
        scale,
        K,
        K_PAD,
        LEVELS,
        RANK,
        WEIGH,
        DIVIDE,
        BIASED,
        NUM_GROUPS,
        KEPT,
        TWO_BEST,
        G,
        DEVICE,
    )
    if SORT == "mark":
        mark_rows(marks_ptr, taken, rows < num_tokens, program)
    elif SORT == "whole":
        sort_rows(
            slots_ptr,
            counts_ptr,
            offsets_ptr,
            block_experts_ptr,
            ids,
            taken,
            num_tokens,
            first_local,
            num_local,
            num_blocks,
            K,
            GROUP_SIZE,
            GROUP_PAD,
            BLOCK,
        )
