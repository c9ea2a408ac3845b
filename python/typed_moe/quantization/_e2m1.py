"""E2M1, the 4-bit float: encode, decode, pack and unpack.

One sign bit, two exponent bits, one mantissa bit. The codes 0 to 7 mean 0, 0.5, 1, 1.5, 2, 3,
4 and 6, the codes 8 to 15 the same with a minus sign; there is no infinity and no NaN.
Both directions are arithmetic rather than a table: a table would have to be copied to the
device at each call, which a CUDA graph cannot capture.

Source: OCP Microscaling Formats (MX) specification 1.0, section 5.3.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

E2M1_MAX = 6.0


def e2m1_encode(values: Tensor) -> Tensor:
    """The nearest E2M1 code of each value, ties to the even code, beyond 6 saturated.

    The codes of one sign are a concave function of the magnitude a, made of three lines: 2a up
    to 2, a + 2 up to 4, a/2 + 4 up to 6. The least of the three rounded lines is the rounded
    code. Each line is rounded before its offset is added, because a + 2 may be inexact; the
    offsets are even, so they do not move a tie.

    Args:
        values: float32, any shape. A NaN has no code; its group's scale has to say NaN.

    Returns:
        uint8 of the same shape, codes 0 to 15.
    """
    magnitude = values.abs().clamp_(max=E2M1_MAX)
    code = torch.round(magnitude * 2.0)
    torch.minimum(code, torch.round(magnitude).add_(2.0), out=code)
    torch.minimum(code, magnitude.mul_(0.5).round_().add_(4.0), out=code)
    code.nan_to_num_(nan=0.0)
    return code.to(torch.uint8).bitwise_or_(torch.signbit(values).to(torch.uint8).mul_(8))


def e2m1_decode(codes: Tensor) -> Tensor:
    """The value of each E2M1 code.

    The inverse of `e2m1_encode`: the greatest of the lines c/2, c - 2 and 2c - 8 of the
    magnitude's code c.

    Args:
        codes: uint8, any shape, 0 to 15.

    Returns:
        float32 of the same shape.
    """
    code = codes.bitwise_and(7).to(torch.float32)
    magnitude = torch.maximum(code * 0.5, code - 2.0)
    magnitude = torch.maximum(magnitude, code * 2.0 - 8.0)
    return torch.where(codes > 7, -magnitude, magnitude)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two codes a byte: uint8 (..., K) to uint8 (..., K/2), the even index in the low nibble."""
    return codes[..., 0::2] | codes[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """One code a byte: uint8 (..., K/2) to uint8 (..., K), the low nibble first."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)
