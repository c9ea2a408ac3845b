"""Launching what happens to activations before the first product: into a format, and into bfloat16.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
from torch import Tensor

from typed_moe.kernels._expert_operands import Operands
from typed_moe.kernels._triton_launch import INTERPRETED, follows, on_device
from typed_moe.kernels._triton_quantize import (
    quantize_mx_kernel,
    quantize_nvfp4_kernel,
    quantize_tensor_kernel,
)
from typed_moe.kernels._triton_widen import widen_kernel

_VALUES = 1024
"""Of one program."""
_Form = Literal["bf16", "mxfp8", "nvfp4"]


def widen(operands: Operands) -> Tensor:
    """(T, H) bfloat16: a record's activations times their scales; in `pack` parts for its weights."""
    x, scale = operands.hidden, operands.hidden_scale
    form: _Form = "bf16" if scale is None else "mxfp8" if scale.dtype is torch.uint8 else "nvfp4"
    return _widened(x, scale, form, operands.second.shape[1], operands.pack)


def widen_mxfp8(x: Tensor, pack: int) -> Tensor:
    """(T, H) bfloat16 in `pack` parts: what `quantize_mxfp8` makes of the values."""
    out = _like(x)
    _quantize_mxfp8(x, out, None, pack)
    return out


def widen_nvfp4(x: Tensor, global_scale: Tensor, pack: int) -> Tensor:
    """The same of `quantize_nvfp4`, times the static scale's inverse."""
    out = _like(x)
    _quantize_nvfp4(x, global_scale, out, None, pack)
    return out


def widen_bf16(x: Tensor, pack: int) -> Tensor:
    """(T, H) bfloat16 in `pack` parts."""
    return _widened(x, None, "bf16", x.shape[1], pack)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.bfloat16, device=x.device)


def _widened(x: Tensor, scale: Tensor | None, form: _Form, width: int, pack: int) -> Tensor:
    tokens = x.shape[0]
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
            PACK=pack,
            BLOCK=_VALUES // pack,
            num_warps=4,
            **follows(x.device),
        )
    return out


def quantize_tensor(x: Tensor, scale: Tensor) -> Tensor:
    """(T, H) float8_e4m3fn by one static scale."""
    tokens, width = x.shape
    data = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    if tokens == 0:
        return data
    with on_device(x.device):
        quantize_tensor_kernel[(tokens, triton.cdiv(width, _VALUES))](
            x,
            scale,
            data,
            x.stride(0),
            H=width,
            BLOCK=_VALUES,
            DEVICE=not INTERPRETED,
            num_warps=4,
            **follows(x.device),
        )
    return data


def quantize_mxfp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H) float8_e4m3fn and (T, H / 32) uint8."""
    tokens, width = x.shape
    data = torch.empty((tokens, width), dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((tokens, width // 32), dtype=torch.uint8, device=x.device)
    _quantize_mxfp8(x, data, scale, 0)
    return data, scale


def _quantize_mxfp8(x: Tensor, out: Tensor, scale: Tensor | None, pack: int) -> None:
    tokens, width = x.shape
    if tokens == 0:
        return
    with on_device(x.device):
        quantize_mx_kernel[(tokens, triton.cdiv(width, _VALUES))](
            x,
            out,
            out if scale is None else scale,
            x.stride(0),
            H=width,
            GROUPS=_VALUES // 32,
            PACK=pack,
            DEVICE=not INTERPRETED,
            num_warps=4,
            **follows(x.device),
        )


def quantize_nvfp4(x: Tensor, global_scale: Tensor) -> tuple[Tensor, Tensor]:
    """(T, H / 2) uint8 and (T, H / 16) float8_e4m3fn under a static scale."""
    tokens, width = x.shape
    data = torch.empty((tokens, width // 2), dtype=torch.uint8, device=x.device)
    scale = torch.empty((tokens, width // 16), dtype=torch.float8_e4m3fn, device=x.device)
    _quantize_nvfp4(x, global_scale, data, scale, 0)
    return data, scale


def _quantize_nvfp4(
    x: Tensor, global_scale: Tensor, out: Tensor, scale: Tensor | None, pack: int
) -> None:
    tokens, width = x.shape
    if tokens == 0:
        return
    with on_device(x.device):
        quantize_nvfp4_kernel[(tokens, triton.cdiv(width, _VALUES))](
            x,
            global_scale,
            out,
            out if scale is None else scale,
            x.stride(0),
            H=width,
            GROUPS=_VALUES // 16,
            PACK=pack,
            DEVICE=not INTERPRETED,
            num_warps=4,
            **follows(x.device),
        )
