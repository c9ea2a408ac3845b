"""Launching what happens to activations before the first product: into a format, and into bfloat16.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from typed_moe.kernels._expert_operands import Operands
from typed_moe.kernels._quantizing import Quantizing
from typed_moe.kernels._triton_launch import INTERPRETED, follows, on_device
from typed_moe.kernels._triton_quantize import quantize_parts_kernel
from typed_moe.kernels._triton_widen import widen_kernel

_VALUES = 1024
"""Of one program."""


def widen(operands: Operands) -> Tensor:
    """(T, H) bfloat16: a record's activations times their scales; in `pack` parts for its weights."""
    x, scale = operands.hidden, operands.hidden_scale
    tokens, width = x.shape[0], operands.second.shape[1]
    form = "bf16" if scale is None else "mxfp8" if scale.dtype is torch.uint8 else "nvfp4"
    out = torch.empty((tokens, width), dtype=torch.bfloat16, device=x.device)
    if tokens == 0:
        return out
    with on_device(x.device):
        widen_kernel[(tokens, triton.cdiv(width, _VALUES))](
            x if scale is None else x.view(torch.uint8),
            x if scale is None else scale.view(torch.uint8),
            out,
            x.stride(0),
            0 if scale is None else scale.stride(0),
            H=width,
            FORMAT=form,
            PACK=operands.pack,
            BLOCK=_VALUES // operands.pack,
            num_warps=4,
            **follows(x.device),
        )
    return out


def quantize(quantizing: Quantizing) -> None:
    """In a launch of its own."""
    x = quantizing.x
    tokens, width = x.shape
    # As many loads in flight as with two rows a program, which was faster than one.
    values = quantizing.part * (2 if quantizing.form == "block" else 1)
    with on_device(x.device):
        quantize_parts_kernel[(tokens * triton.cdiv(width, values),)](
            *quantizing.pointers,
            x.stride(0),
            H=width,
            FORM=quantizing.form,
            VALUES=values,
            PACK=quantizing.pack,
            DEVICE=not INTERPRETED,
            num_warps=4,
            **follows(x.device),
        )
