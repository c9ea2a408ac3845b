"""Which tiles `typed-moe tune` tries."""

from __future__ import annotations

import itertools
from typing import final

import attrs
import torch

from typed_moe.kernels._expert_tiles import (
    FP8_BLOCK,
    LEAST_GROUPED_ROWS,
    PERSISTENT_SIZE,
    PERSISTENT_STEPS,
    UNPACKED,
    ExpertTile,
    GemmTile,
    Operand,
    most_fp8_step,
)

_HEIGHTS = (16, 32, 64, 128)
_VALUES_PER_WARP = (4 * 32, 64 * 128)
"""Of a result tile: with fewer lanes idle, with more they do not fit the registers."""
_GROUPED = 8
_TALL = 64
"""Rows of a block from which on blocks share the weights in the L2 cache, and tiles may be copied by TMA."""
_PERSISTENT = GemmTile(block_n=PERSISTENT_SIZE, block_k=64, warps=8, stages=4, persistent=True)
"""The one form there is, but for the step and the order of the tiles."""
_LEAST_SHARED_MEMORY = 99 << 10  # bytes: what every card from compute capability 8.0 on has


@final
@attrs.frozen(kw_only=True)
class Grid:
    """The values that are tried for one product."""

    block_n: tuple[int, ...] = (32, 64, 128, 256)
    block_k: tuple[int, ...] = (64, 128, 256)
    warps: tuple[int, ...] = (4, 8)
    stages: tuple[int, ...] = (3, 4, 5, 6)
    group_m: tuple[int, ...] = (1, 8, 16)
    tma: tuple[bool, ...] = (False, True)
    persistent: tuple[bool, ...] = (False, True)

    def round(self, number: int, start: GemmTile, rows: int) -> list[GemmTile]:
        """What is tried from a tile on: width and warps, then depth, then order and way of copying.

        Three rounds of a few tiles, each from the best of the one before: all of them together would be a
        hundred to compile for each product and height.
        """
        plain = attrs.evolve(start, persistent=False)
        match number:
            case 0:
                return [
                    attrs.evolve(plain, block_n=n, warps=warps)
                    for n, warps in itertools.product(self.block_n, self.warps)
                ]
            case 1:
                return [
                    attrs.evolve(plain, block_k=k, stages=stages)
                    for k, stages in itertools.product(self.block_k, self.stages)
                ]
            case _:
                groups = self.group_m if rows >= _TALL else (1,)
                tiles = [
                    attrs.evolve(plain, group_m=group, tma=tma)
                    for group, tma in itertools.product(groups, self.tma)
                ]
                if True in self.persistent and rows == PERSISTENT_SIZE:
                    tiles += [
                        attrs.evolve(_PERSISTENT, block_k=k, group_m=group)
                        for k, group in itertools.product(self.block_k, groups)
                    ]
                return tiles


ROUNDS = 3
"""Of `Grid.round`."""


def fits(tile: GemmTile, operand: Operand, height: int) -> bool:
    """Whether a block of this height can have a tile in this operand at all."""
    least, most = _VALUES_PER_WARP
    if operand == "fp8" and not FP8_BLOCK <= tile.block_k <= most_fp8_step(tile, height):
        return False  # a step of a product is the values that share a scale
    if operand == "fp8" and tile.block_n > FP8_BLOCK:
        return False
    if tile.persistent:
        sizes = (height, tile.block_n, tile.block_k)
        return sizes == (PERSISTENT_SIZE, PERSISTENT_SIZE, PERSISTENT_STEPS.get(operand))
    if tile.tma and (height < _TALL or operand in UNPACKED):
        return False  # weights that are unpacked in registers are loaded without it
    if height < _HEIGHTS[0]:
        least //= 2
    return least <= height * tile.block_n // tile.warps <= most


@final
@attrs.frozen(kw_only=True)
class Limits:
    """What the card gives a program.

    Attributes:
        shared_memory: bytes.
        tma: whether it has a tensor memory accelerator.
    """

    shared_memory: int
    tma: bool


def limits_of(device: torch.device) -> Limits:
    """The card's; what Triton's interpreter takes on a CPU, which is anything."""
    if device.type != "cuda":
        return Limits(shared_memory=1 << 30, tma=False)
    properties = torch.cuda.get_device_properties(device)
    # PyTorch's stub does not have it.
    shared = int(getattr(properties, "shared_memory_per_block_optin", _LEAST_SHARED_MEMORY))
    return Limits(shared_memory=shared, tma=properties.major >= 9)


def of_height(tile: ExpertTile, height: int) -> ExpertTile:
    """The same products on blocks of another height; copied by descriptor in high ones alone."""
    if tile.block_m == height:
        return tile
    group = _GROUPED if height >= _TALL else 1
    first, second = (
        attrs.evolve(gemm, group_m=group, tma=gemm.tma and height >= _TALL, persistent=False)
        for gemm in (tile.first, tile.second)
    )
    return ExpertTile(block_m=height, first=first, second=second)


def heights(rows: float, operand: Operand) -> tuple[int, ...]:
    """Blocks that experts with so many rows on average can want: not far above, nor far below."""
    least = (LEAST_GROUPED_ROWS,) if operand in UNPACKED else ()
    return tuple(
        height
        for height in (*least, *_HEIGHTS)
        if height <= max(_HEIGHTS[0], 4 * rows) and (rows <= _TALL or height >= _TALL)
    )
