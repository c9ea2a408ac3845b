"""Triton: the weights of the grouped formats taken apart by themselves, for a test on a card.

Importing this needs Triton.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from typed_moe.kernels._triton_formats import factors, fp4_values, fp8_values


@triton.jit
def decode_kernel(
    data_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS * 4 elements of two bytes with one scale per program: their values, one part after the other."""
    scale_number = tl.program_id(0)
    at = tl.arange(0, ROWS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    data = tl.load(data_ptr + at)
    factor = factors(tl.load(scale_ptr + scale_number + at * 0), WEIGHTS, True)  # type: ignore[arg-type]
    if WEIGHTS == "mxfp8":
        out = out_ptr + scale_number * (ROWS * 8) + at
        low, high = fp8_values(data, factor, True)  # type: ignore[arg-type]
        tl.store(out, low)
        tl.store(out + ROWS * 4, high)
    else:
        out = out_ptr + scale_number * (ROWS * 16) + at
        a, b, c, d = fp4_values(data, factor, True)  # type: ignore[arg-type]
        tl.store(out, a)
        tl.store(out + ROWS * 4, b)
        tl.store(out + ROWS * 8, c)
        tl.store(out + ROWS * 12, d)


def decoded(weights: str, data: Tensor, scales: Tensor) -> Tensor:
    """Every byte of `data` (256,) times these scales, over 2^32: (scales, values) bfloat16, in order."""
    elements = data.cuda().view(torch.int16)
    parts = 2 if weights == "mxfp8" else 4
    out = torch.empty(len(scales), parts, len(elements), dtype=torch.bfloat16, device="cuda")
    decode_kernel[(len(scales),)](
        elements,
        scales.cuda().view(torch.uint8),
        out,
        WEIGHTS=weights,
        ROWS=len(elements) // 4,
    )
    return out.mT.flatten(1).cpu()
