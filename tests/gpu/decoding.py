"""Triton: the weights of the grouped formats taken apart by themselves, for a test on a card.

Importing this needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from typed_moe.kernels._triton_formats import factors, fp4_pairs, fp8_values


@triton.jit
def decode_kernel(
    data_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    low_ptr: tl.tensor,
    high_ptr: tl.tensor,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS bytes with one scale per program."""
    scale_number = tl.program_id(0)
    at = tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    data = tl.load(data_ptr + at)
    factor = factors(tl.load(scale_ptr + scale_number + at * 0), WEIGHTS, True)  # type: ignore[arg-type]
    out = scale_number * (ROWS * 4) + at
    if WEIGHTS == "mxfp8":
        tl.store(low_ptr + out, fp8_values(data, factor, True))  # type: ignore[arg-type]
    else:
        low, high = fp4_pairs(data, factor, True)  # type: ignore[arg-type]
        tl.store(low_ptr + out, low)
        tl.store(high_ptr + out, high)


def decoded(weights: str, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Every byte times these scales, over 2^32: (scales, 256) bfloat16 twice; for MXFP8 once and zeros."""
    data = torch.arange(256, dtype=torch.uint8, device="cuda")
    low = torch.zeros(len(scales), 256, dtype=torch.bfloat16, device="cuda")
    high = torch.zeros_like(low)
    decode_kernel[(len(scales),)](
        data, scales.cuda().view(torch.uint8), low, high, WEIGHTS=weights, ROWS=64
    )
    return low.cpu(), high.cpu()
