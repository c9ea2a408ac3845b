"""Triton: activations of every format in bfloat16, exactly, as the grouped weight formats read them.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from typed_moe.kernels._triton_formats import e2m1, e4m3, e8m0
from typed_moe.kernels._triton_slots import follow


@triton.jit
def widen_kernel(
    x_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    out_ptr: tl.tensor,
    x_stride: tl.tensor,
    scale_stride: tl.tensor,
    H: tl.constexpr,
    FORMAT: tl.constexpr,
    PACK: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    """One row's values times their scales, in PACK parts: columns 0, PACK, 2 PACK ..., then 1, PACK + 1 ...

    FORMAT: "bf16"; "mxfp8", float8_e4m3fn as bytes with E8M0 scales for 32 values; "nvfp4", packed
    E2M1 with E4M3 scales for 16.
    """
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[:, None]
    part = tl.arange(0, PACK)[None, :]
    column = within * PACK + part
    inside = column < H
    x_at, scale_at = x_ptr + row * x_stride, scale_ptr + row * scale_stride
    if FORMAT == "mxfp8":
        scale = e8m0(tl.load(scale_at + column // 32, mask=inside, other=0))
        x = e4m3(tl.load(x_at + column, mask=inside, other=0)) * scale
    elif FORMAT == "nvfp4":
        scale = e4m3(tl.load(scale_at + column // 16, mask=inside, other=0))
        packed = tl.load(x_at + column // 2, mask=inside, other=0).to(tl.int32)
        x = e2m1(packed >> (column % 2) * 4) * scale
    else:
        x = tl.load(x_at + column, mask=inside, other=0.0)
    out_at = out_ptr + row * H + part * (H // PACK) + within
    tl.store(out_at, x.to(tl.bfloat16), mask=inside)
