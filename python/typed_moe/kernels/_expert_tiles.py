"""Tiles of the Triton expert kernels, as data: by card, by operand, by how full an expert is.

An expert's rows are padded to `block_m`, so the tile follows how many rows an expert has on average:
T * k over E, a number that the host knows without looking at the ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, final

import attrs

Operand = Literal["bf16", "fp8", "mxfp8", "fp4"]
"""What the weights are stored in: it is their loading that a tile is made for."""

_BYTES: Mapping[Operand, tuple[float, float]] = MappingProxyType(
    {"bf16": (2, 2), "fp8": (1, 1), "mxfp8": (2, 1 + 1 / 32), "fp4": (2, 1 / 2 + 1 / 16)}
)
"""Of a value of x and of a weight, its scale's part with it (for FP4 NVFP4's, which has more)."""


_LEAST = 16
"""Rows or columns of a matrix unit's product."""
PERSISTENT_SIZE = 128
"""Rows of a persistent kernel's tile, and columns of each of its halves."""
UNPACKED: frozenset[Operand] = frozenset({"mxfp8", "fp4"})
"""Operands with a byte of scale for every few values, which become bfloat16 in registers."""
LEAST_GROUPED_ROWS = 8
"""Rows where weights are unpacked: they are the product's columns there."""
PERSISTENT_STEPS: Mapping[str, int] = MappingProxyType({"bf16": 64, "fp8": 128})
"""Values of a persistent kernel's step, 128 bytes, by operand."""
FP8_BLOCK = 128
"""Values of a sum that share a scale in 128 x 128 blocks, and columns."""
FEW_ROWS = 16
"""Rows of a block up to which FP8 weights are a product's left operand, which has 64 rows on a Hopper."""


@final
@attrs.frozen(kw_only=True)
class GemmTile:
    """One grouped matrix product.

    Attributes:
        block_n: columns of the result per program; of the first matrix, of each half.
        block_k: of the sum, per step; in FP8 at few rows 256 is two steps of 128 that are loaded together.
        warps, stages: of one program.
        group_m: blocks of rows that run side by side over all columns, so that they share the
            weights in the L2 cache.
        tma: tiles are copied by the card's tensor memory accelerator, compute capability 9.0 and
            above; their descriptors cost the host some microseconds per call. MX and FP4 weights are
            loaded without it.
        persistent: by the kernels of `typed_moe.kernels._triton_hopper`, whose tile is 128 rows and two
            times 128 columns, where the card is of compute capability 9.0 and Triton has Gluon. Elsewhere
            the portable kernels run, on tiles half as wide.
    """

    block_n: int
    block_k: int
    warps: int
    stages: int
    group_m: int = 1
    tma: bool = False
    persistent: bool = False


@final
@attrs.frozen(kw_only=True)
class ExpertTile:
    """Both products of a layer.

    Attributes:
        block_m: rows of a program, and the block of `SortedSlots`.
        second_block_m: rows of a program of the second product, a divisor of `block_m`; None for as many.
    """

    block_m: int
    first: GemmTile
    second: GemmTile
    second_block_m: int | None = None

    @property
    def second_rows(self) -> int:
        """Rows of a program of the second product."""
        return self.second_block_m or self.block_m

    def shared_memory(self, operand: Operand, *, gated: bool) -> int:
        """Bytes that the deeper of the two pipelines keeps in shared memory."""
        row, weight = _BYTES[operand]
        return max(
            int(tile.stages * tile.block_k * (row * rows + weight * halves * tile.block_n))
            for tile, rows, halves in (
                (self.first, self.block_m, 2 if gated or self.first.persistent else 1),
                (self.second, self.second_rows, 2 if self.second.persistent else 1),
            )
        )


def tile_refusal(tile: ExpertTile, *, blocks: bool, grouped: bool = False) -> str | None:
    """Why no kernel can be made of a tile, or, with `blocks`, none for FP8 in blocks of 128.

    `grouped`: for MXFP8, MXFP4 and NVFP4 weights.
    """
    gemms = (tile.first, tile.second)
    rows = LEAST_GROUPED_ROWS if grouped else _LEAST
    sizes = [(tile.block_m, rows), (tile.second_rows, rows)]
    sizes += [(size, _LEAST) for gemm in gemms for size in (gemm.block_n, gemm.block_k)]
    wrong = [(size, least) for size, least in sizes if size < least or size & (size - 1)]
    if wrong:
        size, least = wrong[0]
        return f"the tile has a size of {size}; allowed: powers of two from {least} on"
    if tile.second_rows > tile.block_m:
        return (
            f"the tile's second_block_m is {tile.second_rows}, and its block_m {tile.block_m}; "
            "allowed: a divisor"
        )
    for gemm in gemms:
        fixed = (tile.block_m, tile.second_rows, gemm.block_n)
        if gemm.persistent and set(fixed) != {PERSISTENT_SIZE}:
            return (
                f"the tile is persistent with block_m {fixed[0]}, second_block_m {fixed[1]} and "
                f"block_n {fixed[2]}; allowed: {PERSISTENT_SIZE} each"
            )
        if gemm.persistent and gemm.block_k not in PERSISTENT_STEPS.values():
            steps = " and ".join(f"{step} in {name}" for name, step in PERSISTENT_STEPS.items())
            return f"the tile is persistent with block_k {gemm.block_k}; allowed: {steps}"
    return _block_refusal(tile) if blocks else None


def takes_left(gemm: GemmTile, rows: int) -> bool:
    """Whether FP8 weights are the left operand of a product with blocks of so many rows."""
    return rows <= FEW_ROWS and not gemm.tma


def most_fp8_step(gemm: GemmTile, rows: int) -> int:
    """The largest block_k in FP8: the values that share a scale, or two such steps loaded together."""
    return 2 * FP8_BLOCK if takes_left(gemm, rows) else FP8_BLOCK


def _block_refusal(tile: ExpertTile) -> str | None:
    for gemm, rows in ((tile.first, tile.block_m), (tile.second, tile.second_rows)):
        step = most_fp8_step(gemm, rows)
        for size, most in ((gemm.block_n, FP8_BLOCK), (gemm.block_k, step)):
            if size > most:
                return (
                    f"the tile has a block_n or block_k of {size}; allowed in fp8_block: up to "
                    f"{most}, {FP8_BLOCK} values share a scale"
                )
    return None


Table = tuple[tuple[float, ExpertTile], ...]
"""(rows per expert up to which it holds, tile), the least first; the last holds for all above."""

HOPPER: Mapping[Operand, Table] = MappingProxyType(
    {
        "bf16": (
            (
                0.25,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=5),
                ),
            ),
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=5),
                    second=GemmTile(block_n=64, block_k=256, warps=4, stages=3),
                ),
            ),
            (
                20,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=128, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                96,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=64, block_k=64, warps=4, stages=5),
                    second=GemmTile(block_n=128, block_k=128, warps=8, stages=3),
                ),
            ),
            (
                512,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(
                        block_n=128, block_k=64, warps=8, stages=4, group_m=16, tma=True
                    ),
                    second=GemmTile(block_n=256, block_k=64, warps=8, stages=4, group_m=16),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(
                        block_n=128, block_k=64, warps=8, stages=3, group_m=16, tma=True
                    ),
                    second=GemmTile(
                        block_n=256, block_k=64, warps=8, stages=3, group_m=16, tma=True
                    ),
                ),
            ),
        ),
        "fp8": (
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=256, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                96,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(
                        block_n=128, block_k=128, warps=8, stages=4, group_m=8, persistent=True
                    ),
                    second=GemmTile(
                        block_n=128, block_k=128, warps=8, stages=4, group_m=8, persistent=True
                    ),
                ),
            ),
        ),
        "mxfp8": (
            (
                4,
                ExpertTile(
                    block_m=8,
                    first=GemmTile(block_n=32, block_k=256, warps=4, stages=4),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=64, block_k=256, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                16,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                96,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3, group_m=8),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3, group_m=8),
                    second_block_m=64,
                ),
            ),
        ),
        "fp4": (
            (
                4,
                ExpertTile(
                    block_m=8,
                    first=GemmTile(block_n=16, block_k=256, warps=2, stages=3),
                    second=GemmTile(block_n=32, block_k=256, warps=2, stages=3),
                ),
            ),
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=64, block_k=256, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                16,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=4),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=4),
                ),
            ),
            (
                96,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(block_n=64, block_k=128, warps=4, stages=3, group_m=8),
                    second=GemmTile(block_n=128, block_k=128, warps=4, stages=3, group_m=8),
                    second_block_m=64,
                ),
            ),
        ),
    }
)
"""H100, from a sweep over Qwen3-30B-A3B and 32 experts of DeepSeek-V3 (docs/performance.md), and H200."""

NARROW = 3072
"""Values of a token, the hidden size, up to which a card's narrow tables hold."""

HOPPER_NARROW: Mapping[Operand, Table] = MappingProxyType(
    {
        "bf16": (
            *HOPPER["bf16"][:4],
            (362, HOPPER["bf16"][4][1]),
            (
                2**31,
                ExpertTile(
                    block_m=128,
                    first=GemmTile(
                        block_n=128, block_k=64, warps=8, stages=4, group_m=4, persistent=True
                    ),
                    second=GemmTile(
                        block_n=128, block_k=64, warps=8, stages=4, group_m=8, persistent=True
                    ),
                ),
            ),
        ),
    }
)
"""The same, where they are others for narrow layers: the persistent kernels gain in bfloat16 at hidden sizes
of 2048 and 2880 from 512 rows of an expert on, and lose at 4096 and above (docs/performance.md)."""

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
        "mxfp8": (
            (
                4,
                ExpertTile(
                    block_m=8,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                64,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=2, group_m=8),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=2, group_m=8),
                ),
            ),
        ),
        "fp4": (
            (
                4,
                ExpertTile(
                    block_m=8,
                    first=GemmTile(block_n=32, block_k=256, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=256, warps=4, stages=3),
                ),
            ),
            (
                8,
                ExpertTile(
                    block_m=16,
                    first=GemmTile(block_n=32, block_k=256, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=256, warps=4, stages=3),
                ),
            ),
            (
                64,
                ExpertTile(
                    block_m=32,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=3),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=3),
                ),
            ),
            (
                2**31,
                ExpertTile(
                    block_m=64,
                    first=GemmTile(block_n=32, block_k=128, warps=4, stages=2, group_m=8),
                    second=GemmTile(block_n=64, block_k=128, warps=4, stages=2, group_m=8),
                ),
            ),
        ),
    }
)
"""The rule for a card that nobody measured: pipelines that fit the 99 KB of shared memory that every
card from compute capability 8.0 on has."""

_CARDS: tuple[tuple[str, Mapping[Operand, Table], Mapping[Operand, Table]], ...] = (
    ("H100", HOPPER, HOPPER_NARROW),
    ("H200", HOPPER, HOPPER_NARROW),
    ("H800", HOPPER, HOPPER_NARROW),
    ("H20", HOPPER, HOPPER_NARROW),
    ("GH200", HOPPER, HOPPER_NARROW),
)
"""By a part of the name that the driver gives, the first that fits: tables, and those of narrow layers."""


def table_of(card: str, operand: Operand, hidden_size: int) -> Table:
    """The tiles for a card's name, `torch.cuda.get_device_name`, and a layer's hidden size."""
    for part, tables, narrow in _CARDS:
        if part in card:
            return (
                narrow.get(operand, tables[operand]) if hidden_size <= NARROW else tables[operand]
            )
    return ANY_CARD[operand]


def tile_of(table: Table, rows_per_expert: float) -> ExpertTile:
    """The tile for experts with so many rows on average."""
    for most, tile in table:
        if rows_per_expert <= most:
            return tile
    return table[-1][1]
