"""Where a layer's experts lie: the shard of a tensor- and expert-parallel layout."""

from __future__ import annotations

from typing import final

import attrs

from typed_moe.config._counts import check_count


@final
@attrs.frozen(kw_only=True)
class Placement:
    """One rank's share of the experts.

    Expert parallelism gives a rank whole experts, `num_experts / ep_size` of them from
    `local_expert_offset` on. Tensor parallelism gives it a slice of every expert's
    intermediate width; its output is then a partial sum, which the caller or the layer's
    `TokenExchange` adds over the ranks.

    Attributes:
        tp_size, tp_rank: tensor-parallel ranks, and which of them this is.
        ep_size, ep_rank: expert-parallel ranks, and which of them this is.

    Raises:
        TypeError: a size or a rank is no int.
        ValueError: a size is below 1, or a rank is not in [0, size).
    """

    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0

    def __attrs_post_init__(self) -> None:
        for name, size, rank in (
            ("tp", self.tp_size, self.tp_rank),
            ("ep", self.ep_size, self.ep_rank),
        ):
            check_count(f"{name}_size", size, least=1)
            check_count(f"{name}_rank", rank, least=0)
            if rank >= size:
                raise ValueError(
                    f"{name}_rank is {rank}; allowed: 0 to {name}_size - 1 = {size - 1}"
                )

    def num_local_experts(self, num_experts: int) -> int:
        """How many of `num_experts` experts this rank holds.

        Raises:
            ValueError: `num_experts` is not a multiple of `ep_size`.
        """
        if num_experts % self.ep_size:
            raise ValueError(
                f"num_experts is {num_experts}, not a multiple of ep_size = {self.ep_size}; "
                "choose an ep_size that divides it"
            )
        return num_experts // self.ep_size

    def local_expert_offset(self, num_experts: int) -> int:
        """The global id of this rank's first expert."""
        return self.ep_rank * self.num_local_experts(num_experts)

    def local_intermediate_size(self, intermediate_size: int) -> int:
        """This rank's slice of an expert's intermediate width.

        Raises:
            ValueError: `intermediate_size` is not a multiple of `tp_size`.
        """
        if intermediate_size % self.tp_size:
            raise ValueError(
                f"intermediate_size is {intermediate_size}, not a multiple of "
                f"tp_size = {self.tp_size}; choose a tp_size that divides it"
            )
        return intermediate_size // self.tp_size
