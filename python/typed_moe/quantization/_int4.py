"""int4, four bits in two's complement: encode and decode.

The codes 0 to 7 mean themselves, 8 to 15 mean -8 to -1. Packing is that of E2M1: two codes a
byte, the even index in the low nibble.

Source: FlashInfer 0.7.2.post1, `trace/templates/moe.py`, `_trtllm_mxint4_block_scale_moe_reference`.
"""

from __future__ import annotations

import torch
from torch import Tensor

INT4_MIN, INT4_MAX = -8.0, 7.0


def int4_encode(values: Tensor) -> Tensor:
    """The code of the nearest whole number, ties to the even one, saturated at -8 and 7.

    Args:
        values: float32, any shape, finite.

    Returns:
        uint8 of the same shape, codes 0 to 15.
    """
    whole = torch.round(values).clamp_(INT4_MIN, INT4_MAX)
    return whole.to(torch.int8).bitwise_and_(0xF).view(torch.uint8)


def int4_decode(codes: Tensor) -> Tensor:
    """The whole number of each code.

    Args:
        codes: uint8, any shape, 0 to 15.

    Returns:
        float32 of the same shape, -8 to 7.
    """
    # Flipping the sign bit counts the codes from -8 up.
    return codes.bitwise_xor(8).to(torch.float32) - 8.0
