"""E8M0, the scale of the MX formats: a bare exponent byte, 2^(byte - 127), 255 for NaN.

Source: OCP Microscaling Formats (MX) specification 1.0, sections 5.4.1 and 6.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E8M0_NAN = 255
_MANTISSA_BITS = 23  # of a float32, whose exponent has the bias of E8M0


def e8m0_from_amax(amax: Tensor, largest_exponent: int) -> Tensor:
    """The scale of a group by the specification's floor rule.

    2^(floor(log2(amax)) - largest_exponent), with the exponent read from the bits of `amax`:
    log2 rounds up just below a power of two. A group whose scale would be under 2^-127 gets
    2^-127, and so does a group of zeros; a NaN or an infinity gives NaN.

    Args:
        amax: float32, any shape, not negative: the largest magnitude of each group.
        largest_exponent: the exponent of the element format's largest value: 8 for E4M3,
            2 for E2M1.

    Returns:
        uint8 of the same shape.
    """
    exponent = amax.view(torch.int32) >> _MANTISSA_BITS
    scale = (exponent - largest_exponent).clamp_(min=0)
    return torch.where(exponent == 255, E8M0_NAN, scale).to(torch.uint8)


def e8m0_reciprocal(scale: Tensor) -> Tensor:
    """What a group is multiplied by before it is rounded: 2^(127 - byte).

    Exact and never subnormal, since `e8m0_from_amax` gives at most 252 for a finite group;
    NaN for 255.

    Args:
        scale: uint8, any shape.

    Returns:
        float32 of the same shape.
    """
    bits = (254 - scale.to(torch.int32)) << _MANTISSA_BITS
    return torch.where(scale == E8M0_NAN, torch.nan, bits.view(torch.float32))


def e8m0_decode(scale: Tensor) -> Tensor:
    """The multiplier of each scale: 2^(byte - 127), NaN for 255.

    Written in two exact factors, because 2^-127 has no place in the exponent bits of a normal
    float32.

    Args:
        scale: uint8, any shape.

    Returns:
        float32 of the same shape.
    """
    bits = (scale.to(torch.int32) + 1) << _MANTISSA_BITS
    value = torch.where(scale >= 254, 2.0**127, bits.view(torch.float32) * 0.5)
    return torch.where(scale == E8M0_NAN, torch.nan, value)
