"""Tiles of the Triton expert kernels, as data: by card, by operand, by how full an expert is.

An expert's rows are padded to `block_m`, so the tile follows how many rows an expert has on average:
T * k over E, a number that the host knows without looking at the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, final

import attrs

Operand = Literal["bf16", "fp8"]
"""What the weights are stored in: it is their loading that a tile is made for."""


@final
@attrs.frozen(kw_only=True)
class GemmTile:
    """One grouped matrix product.

    Attributes:
        block_n: columns of the result per program; of the first matrix, of each half.
        block_k: of the sum, per step.
        warps, stages: of one program.
        group_m: blocks of rows that run side by side over all columns, so that they share the
            weights in the L2 cache.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 1


@final
@attrs.frozen(kw_only=True)
class ExpertTile:
    """Both products of a layer; `block_m` is the block of `SortedSlots`."""

    block_m: int
    first: GemmTile
    second: GemmTile

    def shared_memory(self, operand: Operand, *, gated: bool) -> int:
        """Bytes that the deeper of the two pipelines keeps in shared memory."""
        size = 2 if operand == "bf16" else 1
        return max(
            tile.stages * tile.block_k * size * (self.block_m + halves * tile.block_n)
            for tile, halves in ((self.first, 2 if gated else 1), (self.second, 1))
        )


Table = tuple[tuple[int, ExpertTile], ...]
"""(rows per expert up to which it holds, tile), the least first; the last holds for all above."""

HOPPER: Mapping[Operand, Table] = MappingProxyType(
    {
        "bf16": (
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=5),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=5),
                ),
            ),
            (
                32,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=64, block_k=64, warps=4, stages=5),
                    second=GemmTile(block_n=128, block_k=64, warps=4, stages=5),
                ),
            ),
            (
                96,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=64, block_k=64, warps=4, stages=4),
                    second=GemmTile(block_n=128, block_k=64, warps=4, stages=4),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(block_n=128, block_k=64, warps=8, stages=4, group_m=8),
                    second=GemmTile(block_n=256, block_k=64, warps=8, stages=4, group_m=8),
                ),
            ),
        ),
        "fp8": (
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=6),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=6),
                ),
            ),
            (
                32,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=5),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=5),
                ),
            ),
            (
                96,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=128, block_k=128, warps=8, stages=4),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(block_n=128, block_k=128, warps=8, stages=4, group_m=8),
                    second=GemmTile(block_n=128, block_k=128, warps=8, stages=4, group_m=8),
                ),
            ),
        ),
    }
)
"""H100 and H200: starting values, not yet from a sweep (`python -m tests.gpu.bench_experts --sweep`)."""

ANY_CARD: Mapping[Operand, Table] = MappingProxyType(
    {
        "bf16": (
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=64, warps=4, stages=4),
                    second=GemmTile(block_n=64, block_k=64, warps=4, stages=4),
                ),
            ),
            (
                64,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=64, block_k=64, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=64, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(block_n=64, block_k=32, warps=8, stages=4, group_m=8),
                    second=GemmTile(block_n=128, block_k=32, warps=8, stages=4, group_m=8),
                ),
            ),
        ),
        "fp8": (
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=4),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                64,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=64,
                    # 64 columns of either half are more than the registers hold on 8.0, where every
                    # byte of a weight is converted in them.
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=3, group_m=8),
                    second=GemmTile(block_n=128, block_k=128, warps=8, stages=3, group_m=8),
                ),
            ),
        ),
    }
)
"""The rule for a card that nobody measured: pipelines that fit the 99 KB of shared memory that every
card from compute capability 8.0 on has."""

_CARDS: tuple[tuple[str, Mapping[Operand, Table]], ...] = (
    ("H100", HOPPER),
    ("H200", HOPPER),
    ("H800", HOPPER),
    ("H20", HOPPER),
    ("GH200", HOPPER),
)
"""By a part of the name that the driver gives, the first that fits."""


def table_of(card: str, operand: Operand) -> Table:
    """The tiles for a card's name, `torch.cuda.get_device_name`."""
    for part, tables in _CARDS:
        if part in card:
            return tables[operand]
    return ANY_CARD[operand]


def tile_of(table: Table, rows_per_expert: float) -> ExpertTile:
    """The tile for experts with so many rows on average."""
    for most, tile in table:
        if rows_per_expert <= most:
            return tile
    return table[-1][1]
