"""Sorted slots written out by hand, to compare with."""

from __future__ import annotations

from torch import Tensor

from typed_moe.kernels import SortedSlots, SortRequest


def expect_sorted(slots: SortedSlots, ids: Tensor, request: SortRequest) -> None:
    """Every field is what plain Python makes of the ids (T, k)."""
    block, empty = request.block_size, ids.numel()
    by_expert: list[list[int]] = [[] for _ in range(request.num_local)]
    for slot, expert in enumerate(ids.flatten().tolist()):
        if 0 <= expert - request.first_local < request.num_local:
            by_expert[expert - request.first_local].append(slot)
    order: list[int] = []
    owners: list[int] = []
    offsets = [0]
    for local, mine in enumerate(by_expert):
        blocks = -(-len(mine) // block)
        order += [*mine, *([empty] * (blocks * block - len(mine)))]
        owners += [local] * blocks
        offsets.append(len(order))
    places, blocks = slots.slots.numel(), slots.block_experts.numel()
    assert places == blocks * block
    assert slots.counts.tolist() == [len(mine) for mine in by_expert]
    assert slots.offsets.tolist() == offsets
    assert slots.block_experts.tolist() == [*owners, *([-1] * (blocks - len(owners)))]
    assert len(order) <= places
    assert slots.slots[: len(order)].tolist() == order
