"""The formats once more, in float64 and from their definitions, for the tests to compare with.

Nothing here imports the package. A minifloat is its list of magnitudes by code; rounding is a
search in that list. Slow and plain on purpose.
"""

from __future__ import annotations

import torch
from torch import Tensor


def magnitudes(exponent_bits: int, mantissa_bits: int, largest: float) -> Tensor:
    """Every magnitude of a minifloat by its code, up to the largest finite one; float64."""
    bias = 2 ** (exponent_bits - 1) - 1
    values: list[float] = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            if exponent == 0:
                values.append(fraction * 2.0 ** (1 - bias))
            else:
                values.append((1 + fraction) * 2.0 ** (exponent - bias))
    return torch.tensor([value for value in values if value <= largest], dtype=torch.float64)


E2M1 = magnitudes(2, 1, 6.0)
E4M3 = magnitudes(4, 3, 448.0)
INT4 = torch.arange(9, dtype=torch.float64)
"""8 with a minus sign only."""


def nearest_code(values: Tensor, grid: Tensor) -> Tensor:
    """The code of the nearest magnitude, ties to the even code, saturating; int64, no sign."""
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = values.double().abs()
    code = torch.searchsorted(middles, magnitude)
    tie = magnitude == middles[code.clamp(max=len(middles) - 1)]
    return code + (tie & (code % 2 == 1))


def nearest(values: Tensor, grid: Tensor) -> Tensor:
    """The nearest value of the grid, with its sign; float64."""
    return torch.copysign(grid[nearest_code(values, grid)], values.double())


def near_tie(values: Tensor, grid: Tensor) -> Tensor:
    """Whether a value is within a few float32 roundings of the middle between two grid values.

    Only there may two correct float32 implementations disagree.
    """
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = values.double().abs()
    above = torch.searchsorted(middles, magnitude).clamp(max=len(middles) - 1)
    below = (above - 1).clamp(min=0)
    distance = torch.minimum((magnitude - middles[above]).abs(), (magnitude - middles[below]).abs())
    return distance <= magnitude * 2.0**-21


def step(values: Tensor, grid: Tensor) -> Tensor:
    """Distance between the two grid values around each value; 0 beyond the largest."""
    magnitude = values.double().abs()
    above = torch.searchsorted(grid, magnitude, right=True)
    distance = grid[above.clamp(max=len(grid) - 1)] - grid[above - 1]
    return torch.where(magnitude >= grid[-1], 0.0, distance)


def e8m0(scale: Tensor) -> Tensor:
    """Multipliers of E8M0 bytes, float64, where 2^-127 is nothing special."""
    value = torch.exp2(scale.double() - 127)
    return torch.where(scale == 255, torch.nan, value)


def codes(packed: Tensor) -> Tensor:
    """Four-bit codes of packed bytes, one by one, low nibble first; int64."""
    flat = torch.empty(*packed.shape[:-1], packed.shape[-1] * 2, dtype=torch.int64)
    flat[..., 0::2] = packed.long() % 16
    flat[..., 1::2] = packed.long() // 16
    return flat


def int4(packed: Tensor) -> Tensor:
    """Values of packed int4 bytes, float64: the upper half of the codes is negative."""
    code = codes(packed)
    return torch.where(code >= 8, code - 16, code).double()


def e2m1(packed: Tensor) -> Tensor:
    """Values of packed FP4 bytes, float64."""
    code = codes(packed)
    return torch.where(code >= 8, -E2M1[code % 8], E2M1[code % 8])
