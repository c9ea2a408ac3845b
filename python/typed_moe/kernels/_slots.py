"""Slots sorted by expert: what a kernel that runs experts reads next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import attrs
from torch import Tensor

from typed_moe.config import check_count


@final
@attrs.frozen(kw_only=True)
class SortRequest:
    """Whose slots are sorted, and to which multiple.

    Attributes:
        first_local: the rank's first expert, by its global id.
        num_local: how many it has.
        block_size: slots per block; every expert starts on a multiple of it.

    Raises:
        TypeError, ValueError: a number that is none, or is out of range.
    """

    first_local: int
    num_local: int
    block_size: int

    def __attrs_post_init__(self) -> None:
        check_count("first_local", self.first_local, least=0)
        check_count("num_local", self.num_local, least=1)
        check_count("block_size", self.block_size, least=1)

    def num_blocks(self, num_slots: int) -> int:
        """Blocks that any choice of experts fits in: an expert with a slot wastes less than one."""
        waste = min(num_slots, self.num_local) * (self.block_size - 1)
        return (num_slots + waste) // self.block_size


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class SortedSlots:
    """Slot t * k + j is token t's j-th expert; those of one expert lie side by side, in order.

    L local experts, B blocks. Expert e (counted from the rank's first) has `counts[e]` slots at
    `slots[offsets[e]]` and behind it; the places up to `offsets[e + 1]` hold T * k, which is no
    slot. What lies behind the last expert is not written. Slots of other ranks' experts, and of ids
    of -1, are in no place.

    Attributes:
        slots: (B * block_size,) int32.
        counts: (L,) int32, slots per expert.
        offsets: (L + 1,) int32, multiples of block_size; the last is the places in use.
        block_experts: (B,) int32, whose each block is, counted from the rank's first expert; -1
            for a block that is not in use.
        block_size: places per block.
        first_local: the rank's first expert, by its global id.
    """

    slots: Tensor
    counts: Tensor
    offsets: Tensor
    block_experts: Tensor
    block_size: int
    first_local: int
