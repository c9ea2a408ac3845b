"""Launching the Triton kernels: which tile, how many warps, how many programs.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Literal, final

import attrs
import torch
import triton
from torch import Tensor

from typed_moe.kernels._fused_rules import RouteSettings, ceil_div, power_of_two
from typed_moe.kernels._slots import SortedSlots, SortRequest
from typed_moe.kernels._triton_route import route_kernel
from typed_moe.kernels._triton_slots import count_kernel, place_kernel, scan_kernel

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Triton runs its kernels in NumPy on the CPU, for tests (TRITON_INTERPRET=1)."""

_LANES = 32
_COUNTS_PER_WARP = 1024
"""Bytes of chunk counts that a warp of the second launch loads before it adds them up: 32 a lane."""
_SCANNED_EXPERTS, _SCANNED_CHUNKS = 4, 1024
"""What a program of the launch between adds up at a time."""
_WHOLE_SLOTS = 128
"""Slots, top_k padded to a power of two, that one program sorts: it compares each with each."""


@final
@attrs.frozen(kw_only=True)
class Tile:
    """How rows are divided over programs, and whether the two launches overlap.

    Attributes:
        rows: of one program; 255 at most, since a chunk's counts are bytes.
        width: lanes that share a row (W of the kernel).
        warps: of one program; rows * width / 32 gives every lane one share of one row.
        whole: up to how many rows one program routes and sorts in one launch.
        whole_warps: of that program, at most.
        overlap: programmatic dependent launch, where the card has it.
        scan: from how many chunk counts on a launch of its own adds them up; one per chunk and expert.
        place_warps: of a program of the last launch.
        place_programs: of the last launch, at most, where nothing was added up for it.
    """

    rows: int
    width: int = _LANES
    warps: int
    whole: int = 4
    whole_warps: int = 8
    overlap: bool = True
    scan: int = 2048
    place_warps: int = 4
    place_programs: int = 128


@final
@attrs.frozen(kw_only=True, eq=False)
class Call:
    """One call's tensors: logits (T, E), bias (E,), and the results (T, k)."""

    settings: RouteSettings
    logits: Tensor
    bias: Tensor | None
    ids: Tensor
    weights: Tensor


def tile_of(settings: RouteSettings, num_tokens: int) -> Tile:
    """Rows and warps for a call: few rows per program until every multiprocessor has one.

    Measured on an H100: docs/routing/fused.md.
    """
    if INTERPRETED:
        # A program costs there what its operations are in number, and nothing for their width.
        return Tile(rows=8, warps=8)
    if settings.places >= 1024:
        return Tile(rows=1, warps=4) if num_tokens <= 512 else Tile(rows=4, warps=16, place_warps=8)
    rows = 1 if num_tokens <= 128 else 4 if num_tokens <= 512 else 8
    whole = 8 if settings.places <= 128 else 4
    return Tile(rows=rows, warps=rows, whole=whole, place_warps=8 if settings.places > 256 else 4)


def route(
    settings: RouteSettings,
    logits: Tensor,
    bias: Tensor | None,
    sort: SortRequest | None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, SortedSlots | None]:
    """(T, k) int32 ids and float32 weights, and the sorted slots where they are asked for."""
    with on_device(logits.device):
        return _route_rows(settings, logits, bias, sort, tile)


def _route_rows(
    settings: RouteSettings,
    logits: Tensor,
    bias: Tensor | None,
    sort: SortRequest | None,
    tile: Tile | None,
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
    tile = tile_of(settings, tokens) if tile is None else tile
    if sort is None:
        _route(call, tile, "none", None, None)
        return ids, weights, None
    slots = _empty_slots(sort, tokens * top_k, logits.device)
    rows = power_of_two(tokens)
    if tokens <= tile.whole and rows * power_of_two(top_k) <= _WHOLE_SLOTS:
        warps = min(tile.whole_warps, max(1, tile.warps * rows // tile.rows))
        _route(call, attrs.evolve(tile, rows=rows, warps=warps), "whole", slots, None)
        return ids, weights, slots
    chunks = ceil_div(tokens, tile.rows)
    counts = _chunk_counts(chunks, sort, logits.device)
    _route(call, tile, "count", slots, counts)
    _place(slots, ids, counts, tile, chunk=tile.rows * top_k)
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
    chunk = 128
    slots = _empty_slots(sort, num_slots, ids.device)
    chunks = ceil_div(num_slots, chunk)
    counts = _chunk_counts(chunks, sort, ids.device)
    width = min(64, power_of_two(sort.num_local))
    count_kernel[(chunks, ceil_div(sort.num_local, width))](
        ids,
        counts,
        num_slots,
        sort.first_local,
        sort.num_local,
        CHUNK=chunk,
        L_PAD=counts.shape[1],
        L_TILE=width,
        num_warps=4,
        **follows(ids.device),
    )
    _place(slots, ids, counts, Tile(rows=1, warps=1), chunk=chunk)
    return slots


def _route(
    call: Call,
    tile: Tile,
    mode: Literal["none", "count", "whole"],
    slots: SortedSlots | None,
    chunk_counts: Tensor | None,
) -> None:
    settings, logits, rule = call.settings, call.logits, call.settings.rule
    group_pad = power_of_two(settings.group_size)
    width = min(tile.width, group_pad)
    whole = slots if mode == "whole" else None
    route_kernel[(ceil_div(logits.shape[0], tile.rows),)](
        logits,
        call.bias,
        call.ids,
        call.weights,
        chunk_counts,
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
        E=settings.num_experts,
        K=settings.top_k,
        K_PAD=power_of_two(settings.top_k),
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
        OTHERS=min(32, tile.rows * power_of_two(settings.top_k)),
        BLOCK=1 if whole is None else whole.block_size,
        L_PAD=1 if slots is None else power_of_two(slots.counts.shape[0]),
        DEVICE=not INTERPRETED,
        num_warps=tile.warps,
        **follows(logits.device, wanted=tile.overlap),
    )


def _place(
    slots: SortedSlots, ids: Tensor, chunk_counts: Tensor, tile: Tile, *, chunk: int
) -> None:
    """The last launch: every slot to its place; and before it, for many chunks, their sums."""
    chunks, local_pad = chunk_counts.shape
    scanned = chunk_counts.numel() >= tile.scan
    before = _scan(slots, chunk_counts, tile) if scanned else None
    per_program = 1 if scanned else power_of_two(ceil_div(chunks, tile.place_programs))
    programs = ceil_div(chunks, per_program)
    chunk_pad, filled = power_of_two(chunk), power_of_two(ceil_div(local_pad, programs))
    place_kernel[(programs,)](
        ids,
        chunk_counts,
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
        CHUNK=chunk,
        CHUNK_PAD=chunk_pad,
        CHUNKS=per_program,
        OTHERS=min(32, chunk_pad),
        L_PAD=local_pad,
        TILE=max(1, min(power_of_two(chunks), _COUNTS_PER_WARP * tile.place_warps // local_pad)),
        # The fewer rows of a block are looked at, whosever they are.
        FILLED=filled if filled < chunk_pad * per_program else 0,
        BLOCK=slots.block_size,
        SCANNED=scanned,
        num_warps=tile.place_warps,
        **follows(ids.device, wanted=tile.overlap),
    )


def _scan(slots: SortedSlots, chunk_counts: Tensor, tile: Tile) -> Tensor:
    """(C, L) int32: an expert's slots in earlier chunks; and all of them, in `slots.counts`."""
    chunks, local_pad = chunk_counts.shape
    before = torch.empty_like(chunk_counts, dtype=torch.int32)
    width = min(_SCANNED_EXPERTS, local_pad)
    scan_kernel[(local_pad // width,)](
        chunk_counts,
        before,
        slots.counts,
        chunks,
        slots.counts.shape[0],
        L_PAD=local_pad,
        L_TILE=width,
        TILE=min(_SCANNED_CHUNKS, power_of_two(chunks)),
        num_warps=8,
        **follows(chunk_counts.device, wanted=tile.overlap),
    )
    return before


def _chunk_counts(chunks: int, sort: SortRequest, device: torch.device) -> Tensor:
    return torch.empty((chunks, power_of_two(sort.num_local)), dtype=torch.uint8, device=device)


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
