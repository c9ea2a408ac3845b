"""Launching the Triton kernels: which tile, how many warps, how many programs.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from math import comb
from typing import Literal, final

import attrs
import torch
import triton
from torch import Tensor

from typed_moe.kernels._fused_rules import RouteSettings, ceil_div, power_of_two
from typed_moe.kernels._quantizing import Quantizing
from typed_moe.kernels._slots import SortedSlots, SortRequest
from typed_moe.kernels._triton_route import route_kernel
from typed_moe.kernels._triton_slots import count_kernel, place_kernel, scan_kernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton runs its kernels in NumPy on the CPU, for tests (TRITON_INTERPRET=1)."""

_LANES = 32
_MARKS_PER_WARP = 512
"""Marks that a warp of the last launch loads before it adds them up: 16 a lane."""
_MOST_PLACES = 16
"""Of a lane that gives several of its best: more do not fit its registers."""
_MOST_ROWS, _PROGRAMS = 8, 4
"""Rows of a program, at most, and programs of a chunk: a mark has 32 bits."""
_FEW_CHUNKS = 512
"""That a smaller program of that launch adds up."""
_SCANNED_CHUNKS = 1024
"""What a program of the launch between adds up at a time, of `Tile.scan_experts` experts."""
_WHOLE_SLOTS = 128
"""Slots, top_k padded to a power of two, that one program sorts: it compares each with each."""
_GIVEN_CHUNK = 128
"""Slots of a chunk of ids that another routing gave."""


@final
@attrs.frozen(kw_only=True)
class Tile:
    """How rows are divided over programs, and whether the two launches overlap.

    Attributes:
        rows: of one program; a power of two, 8 at most where slots are sorted: its bits of a mark.
        width: lanes that share a row (W of the kernel).
        levels: how many of a row's best one lane may give before all are looked through again; 0: they
            are looked through for each choice.
        warps: of one program; rows * width / 32 gives every lane one share of one row. With sorted
            slots one warp with several rows is faster: marks are not gathered from several warps.
        whole: up to how many rows one program routes and sorts in one launch.
        whole_warps: of that program, for each of its rows.
        overlap: programmatic dependent launch, where the card has it.
        scan: from how many marks on a launch of its own adds them up; one per chunk and expert.
        scan_experts: of a program of that launch.
        place_warps: of a program of the last launch.
        place_slots: that it places, where another launch added up.
        filled: of how many experts a program of it fills the last block.
    """

    rows: int
    width: int = _LANES
    levels: int = 0
    warps: int
    whole: int = 4
    whole_warps: int = 1
    overlap: bool = True
    scan: int = 8192
    scan_experts: int = 4
    place_warps: int = 4
    place_slots: int = 128
    filled: int = 8


@final
@attrs.frozen(kw_only=True, eq=False)
class Marks:
    """Which slots of each chunk are whose, and how to read it.

    Attributes:
        table: (C * P,) int32 and some more, so that reading behind the last expert is no fault.
        chunks: C.
        chunk: slots of one.
        places: P, of a chunk's experts.
        first: place of the rank's first expert, where groups are not padded.
        group_size: experts of a group, whose places are its least power of two.
        rows: of a program of the launch that wrote the marks; 0 where they are numbers of slots.
        top_k: slots of a row.
    """

    table: Tensor
    chunks: int
    chunk: int
    places: int
    first: int
    group_size: int
    rows: int
    top_k: int


@final
@attrs.frozen(kw_only=True, eq=False)
class Call:
    """One call's tensors: logits (T, E), bias (E,), and the results (T, k)."""

    settings: RouteSettings
    logits: Tensor
    bias: Tensor | None
    ids: Tensor
    weights: Tensor


def tile_of(settings: RouteSettings, num_tokens: int, *, sort: bool) -> Tile:
    """Rows and warps for a call: few rows per program until every multiprocessor has one.

    Measured on an H100: docs/routing/fused.md.
    """
    if INTERPRETED:
        # A program costs there what its operations are in number, and nothing for their width.
        return Tile(rows=8, warps=8, levels=_levels(settings), filled=128)
    if settings.places >= 1024:
        rows = 1 if num_tokens <= 512 else 4
        return Tile(rows=rows, warps=4 * rows, whole_warps=4, place_warps=8)
    levels, large = _levels(settings), settings.places > 256
    if not sort and not levels:
        rows = 1 if num_tokens <= 128 else 4 if num_tokens <= 512 else 8
        return Tile(rows=rows, warps=rows)
    if num_tokens <= 512 or not sort:
        rows = 1
    elif settings.top_k == 1:
        rows = 8
    else:
        # With levels a row has more registers, and several in a warp too many.
        rows = (1 if levels else 2) if num_tokens <= 8192 else 2 if levels else 4
    return Tile(
        rows=rows,
        warps=1,
        levels=levels,
        whole=4 if settings.places <= 128 else 1,
        whole_warps=4 if large else 1,
        place_warps=8 if large else 4,
        place_slots=256 if large else 128,
    )


def _levels(settings: RouteSettings) -> int:
    """So many that a lane has more of a row's best once in a thousand rows; 0 where that is no less work.

    A look through all is 5 instructions for each of a lane's places; each level is one.
    """
    places, top_k = settings.places // _LANES, settings.top_k
    if power_of_two(settings.group_size) < _LANES or places > _MOST_PLACES:
        return 0
    levels = 1
    while 1000 * comb(top_k, levels + 1) > _LANES**levels:
        levels += 1
    return levels if 5 * places * levels + 16 * top_k < 0.65 * 5 * places * top_k else 0


def route(
    settings: RouteSettings,
    logits: Tensor,
    bias: Tensor | None,
    sort: SortRequest | None,
    tile: Tile | None = None,
    beside: Quantizing | None = None,
) -> tuple[Tensor, Tensor, SortedSlots | None]:
    """(T, k) int32 ids and float32 weights, and the sorted slots where they are asked for.

    `beside` of T rows is quantised by the same launch, by programs of its own.
    """
    with on_device(logits.device):
        return _route_rows(settings, logits, bias, sort, tile, beside)


def _route_rows(
    settings: RouteSettings,
    logits: Tensor,
    bias: Tensor | None,
    sort: SortRequest | None,
    tile: Tile | None,
    beside: Quantizing | None,
) -> tuple[Tensor, Tensor, SortedSlots | None]:
    tokens, top_k = logits.shape[0], settings.top_k
    ids = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    if tokens == 0:
        return ids, weights, None if sort is None else _no_slots(sort, logits.device)
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    bias = None if bias is None else bias.contiguous()
    call = Call(settings=settings, logits=logits, bias=bias, ids=ids, weights=weights)
    tile = tile_of(settings, tokens, sort=sort is not None) if tile is None else tile
    if sort is None:
        _route(call, tile, "none", None, None, beside)
        return ids, weights, None
    slots = _empty_slots(sort, tokens * top_k, logits.device)
    rows = power_of_two(tokens)
    if tokens <= tile.whole and rows * power_of_two(top_k) <= _WHOLE_SLOTS:
        whole = attrs.evolve(tile, rows=rows, warps=tile.whole_warps * rows)
        _route(call, whole, "whole", slots, None, beside)
        return ids, weights, slots
    marks = _row_marks(settings, tokens, tile, sort, logits.device)
    _route(call, tile, "mark", slots, marks, beside)
    _place(slots, ids, marks, tile)
    return ids, weights, slots


def follows(device: torch.device, *, wanted: bool = True) -> dict[str, bool]:
    """The options of a launch that starts while the one before it runs: compute capability 9.0 and above."""
    pdl = wanted and _has_dependent_launch(device)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


@cache
def _has_dependent_launch(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def sort_slots(ids: Tensor, sort: SortRequest) -> SortedSlots:
    """The sorted slots of ids (T, k) that another routing gave, -1 left out."""
    with on_device(ids.device):
        return _sort_ids(ids, sort)


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _sort_ids(ids: Tensor, sort: SortRequest) -> SortedSlots:
    num_slots = ids.numel()
    if num_slots == 0:
        return _no_slots(sort, ids.device)
    ids = ids.to(torch.int32).contiguous()
    slots = _empty_slots(sort, num_slots, ids.device)
    chunks = ceil_div(num_slots, _GIVEN_CHUNK)
    local_pad = power_of_two(sort.num_local)
    table = _table(chunks, local_pad, sort, ids.device)
    width = min(64, power_of_two(sort.num_local))
    count_kernel[(chunks, ceil_div(sort.num_local, width))](
        ids,
        table,
        num_slots,
        sort.first_local,
        sort.num_local,
        CHUNK=_GIVEN_CHUNK,
        L_PAD=local_pad,
        L_TILE=width,
        num_warps=4,
        **follows(ids.device),
    )
    marks = Marks(
        table=table,
        chunks=chunks,
        chunk=_GIVEN_CHUNK,
        places=local_pad,
        first=0,
        group_size=local_pad,
        rows=0,
        top_k=1,
    )
    _place(slots, ids, marks, Tile(rows=1, warps=1, place_slots=_GIVEN_CHUNK))
    return slots


def _route(
    call: Call,
    tile: Tile,
    mode: Literal["none", "mark", "whole"],
    slots: SortedSlots | None,
    marks: Marks | None,
    beside: Quantizing | None,
) -> None:
    settings, logits, rule = call.settings, call.logits, call.settings.rule
    group_pad = power_of_two(settings.group_size)
    width = min(tile.width, group_pad)
    whole = slots if mode == "whole" else None
    # The last chunk's bits are all written, by programs that have no rows.
    programs = ceil_div(logits.shape[0], tile.rows) if marks is None else marks.chunks * _PROGRAMS
    route_kernel[(programs + (0 if beside is None else beside.programs),)](
        logits,
        call.bias,
        call.ids,
        call.weights,
        None if marks is None else marks.table.view(torch.uint8),
        None if whole is None else whole.slots,
        None if whole is None else whole.counts,
        None if whole is None else whole.offsets,
        None if whole is None else whole.block_experts,
        logits.shape[0],
        logits.stride(0),
        0,
        settings.scale,
        0 if slots is None else slots.first_local,
        0 if slots is None else slots.counts.shape[0],
        0 if slots is None else slots.block_experts.shape[0],
        *((None,) * 4 if beside is None else beside.pointers),
        0 if beside is None else beside.x.stride(0),
        programs,
        E=settings.num_experts,
        K=settings.top_k,
        K_PAD=power_of_two(settings.top_k),
        LEVELS=tile.levels if width == _LANES else 0,
        RANK=rule.rank,
        WEIGH=rule.weigh,
        DIVIDE=rule.divide,
        BIASED=rule.biased,
        NUM_GROUPS=settings.num_expert_group,
        KEPT=settings.topk_group,
        TWO_BEST=settings.two_best,
        GROUP_SIZE=settings.group_size,
        GROUP_PAD=group_pad,
        G=power_of_two(settings.num_expert_group),
        J=settings.places // width,
        ROWS=tile.rows,
        W=width,
        SORT=mode,
        BLOCK=1 if whole is None else whole.block_size,
        FORM="none" if beside is None else beside.form,
        H=0 if beside is None else beside.x.shape[1],
        VALUES=0 if beside is None else beside.part,
        PACK=0 if beside is None else beside.pack,
        DEVICE=not INTERPRETED,
        num_warps=tile.warps,
        **follows(logits.device, wanted=tile.overlap),
    )


def _place(slots: SortedSlots, ids: Tensor, marks: Marks, tile: Tile) -> None:
    """The last launch: every slot to its place; and before it, for many chunks, their sums."""
    chunks, local_pad = marks.chunks, power_of_two(slots.counts.shape[0])
    scanned = chunks * local_pad >= tile.scan
    before = _scan(slots, marks, tile) if scanned else None
    width = tile.place_slots if scanned else power_of_two(marks.chunk)
    placing = ceil_div(ids.numel(), width) if scanned else chunks
    filled = min(tile.filled, local_pad)
    place_kernel[(placing + local_pad // filled,)](
        ids,
        marks.table,
        before,
        slots.slots,
        slots.counts,
        slots.offsets,
        slots.block_experts,
        ids.numel(),
        chunks,
        slots.first_local,
        slots.counts.shape[0],
        slots.block_experts.shape[0],
        placing,
        marks.first,
        K=marks.top_k,
        ROWS=marks.rows,
        PLACES=marks.places,
        GROUP_SIZE=marks.group_size,
        GROUP_PAD=power_of_two(marks.group_size),
        CHUNK=marks.chunk,
        SLOTS=width,
        L_PAD=local_pad,
        TILE=max(1, min(power_of_two(chunks), _MARKS_PER_WARP * tile.place_warps // local_pad)),
        FILLED=filled,
        BLOCK=slots.block_size,
        SCANNED=scanned,
        num_warps=tile.place_warps,
        **follows(ids.device, wanted=tile.overlap),
    )


def _scan(slots: SortedSlots, marks: Marks, tile: Tile) -> Tensor:
    """(C, L) int64: an expert's slots in earlier chunks, and its mark; its slots, in `slots.counts`."""
    local_pad = power_of_two(slots.counts.shape[0])
    before = marks.table.new_empty(marks.chunks * local_pad, dtype=torch.int64)
    width = min(tile.scan_experts, local_pad)
    scan_kernel[(ceil_div(slots.counts.shape[0], width),)](
        marks.table,
        before,
        slots.counts,
        marks.chunks,
        marks.first,
        slots.counts.shape[0],
        # No more is asked than whether marks are bits, and then one compilation serves all.
        ROWS=min(marks.rows, 1),
        PLACES=marks.places,
        GROUP_SIZE=marks.group_size,
        GROUP_PAD=power_of_two(marks.group_size),
        L_PAD=local_pad,
        L_TILE=width,
        TILE=min(_SCANNED_CHUNKS, power_of_two(marks.chunks)),
        num_warps=8 if marks.chunks <= _FEW_CHUNKS else 16,
        **follows(before.device, wanted=tile.overlap),
    )
    return before


def _row_marks(
    settings: RouteSettings, tokens: int, tile: Tile, sort: SortRequest, device: torch.device
) -> Marks:
    """What the routing launch writes: 8 bits per expert and program, four programs to a chunk."""
    assert tile.rows <= _MOST_ROWS, "a program has 8 bits of a mark"
    chunks = ceil_div(tokens, _PROGRAMS * tile.rows)
    return Marks(
        table=_table(chunks, settings.places, sort, device),
        chunks=chunks,
        chunk=_PROGRAMS * tile.rows * settings.top_k,
        places=settings.places,
        first=sort.first_local,
        group_size=settings.group_size if settings.num_expert_group > 1 else settings.places,
        rows=tile.rows,
        top_k=settings.top_k,
    )


def _table(chunks: int, places: int, sort: SortRequest, device: torch.device) -> Tensor:
    # Experts are read up to a power of two, which is up to twice as many; padded, twice as far on.
    spare = 4 * (sort.first_local + sort.num_local)
    return torch.empty(chunks * places + spare, dtype=torch.int32, device=device)


def _empty_slots(sort: SortRequest, num_slots: int, device: torch.device) -> SortedSlots:
    num_blocks = sort.num_blocks(num_slots)

    def int32(count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device=device)

    return SortedSlots(
        slots=int32(num_blocks * sort.block_size),
        counts=int32(sort.num_local),
        offsets=int32(sort.num_local + 1),
        block_experts=int32(num_blocks),
        block_size=sort.block_size,
        first_local=sort.first_local,
    )


def _no_slots(sort: SortRequest, device: torch.device) -> SortedSlots:
    """Of no tokens: nothing is launched but two fills."""
    empty = _empty_slots(sort, 0, device)
    empty.counts.zero_()
    empty.offsets.zero_()
    return empty
