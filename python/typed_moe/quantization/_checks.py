"""What a tensor has to be before it goes into a format or out of it."""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from typed_moe.config import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Unquantized,
)
from typed_moe.quantization._record import Quantized
from typed_moe.quantization._rows import FP8_BLOCK, MX_GROUP, NVFP4_GROUP


def row_group(fmt: Format) -> int:
    """How many values along K have to be there in whole groups; 1 where any K will do."""
    match fmt:
        case MxFp8() | MxFp4() | MxInt4():
            return MX_GROUP
        case Nvfp4():
            return NVFP4_GROUP
        case Unquantized() | Bf16() | Fp8PerTensor() | Fp8PerChannel() | Fp8BlockScale():
            return 1
        case _:
            assert_never(fmt)


def check_columns(what: str, shape: torch.Size, group: int, name: str) -> None:
    """Refuse a last dimension that is empty or not in whole groups."""
    columns = shape[-1]
    if columns == 0 or columns % group != 0:
        raise ValueError(
            f"{what} has shape {tuple(shape)}, K = {columns}; the format {name!r} needs K to be "
            f"a positive multiple of {group}. Pad K to {columns + (-columns % group) or group}, "
            "or choose a format without groups along K ('fp8_per_tensor', 'fp8_block', 'bf16')."
        )


def check_floating(what: str, values: Tensor) -> None:
    """Refuse integers: they are codes already, or a mistake."""
    if not values.is_floating_point():
        raise TypeError(
            f"{what} is {values.dtype}; allowed: float32, float16 or bfloat16. Packed values "
            "are already quantised: give them to the layer as they are."
        )


def check_weight(weight: Tensor, fmt: Format) -> None:
    """Refuse a weight that is no stack of matrices of the format's shape."""
    check_floating("weight", weight)
    if weight.dim() < 2 or weight.shape[-2] == 0:
        raise ValueError(
            f"weight has shape {tuple(weight.shape)}; allowed: (..., N, K) with N and K at "
            "least 1. Give one matrix (N, K) or a stack of them (E, N, K)."
        )
    check_columns("weight", weight.shape, row_group(fmt), fmt.name)


def weight_scale_layout(
    fmt: Fp8PerTensor | Fp8PerChannel | Fp8BlockScale | MxFp8 | MxFp4 | MxInt4 | Nvfp4,
    shape: torch.Size,
) -> tuple[tuple[int, ...], torch.dtype]:
    """Shape and dtype of a weight's scales, from the weight's shape (..., N, K)."""
    experts, (rows, columns) = tuple(shape[:-2]), shape[-2:]
    match fmt:
        case Fp8PerTensor():
            return experts, torch.float32
        case Fp8PerChannel():
            return (*experts, rows), torch.float32
        case Fp8BlockScale():
            return (*experts, -(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)), torch.float32
        case MxFp8() | MxFp4():
            return (*experts, rows, columns // MX_GROUP), torch.uint8
        case MxInt4():
            return (*experts, rows, columns // MX_GROUP), torch.bfloat16
        case Nvfp4():
            return (*experts, rows, columns // NVFP4_GROUP), torch.float8_e4m3fn
        case _:
            assert_never(fmt)


def checked_scale(q: Quantized, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """The scale of `q`, refused unless it has this shape and dtype."""
    scale = q.scale
    if scale is None:
        raise ValueError(
            f"scale is None; the format {name!r} needs {dtype} scales of shape {shape}. Give "
            "the scales that belong to the data."
        )
    if tuple(scale.shape) != shape or scale.dtype != dtype:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)} and dtype {scale.dtype}; the format {name!r} "
            f"needs shape {shape} and {dtype} for data of shape {tuple(q.data.shape)}. Check "
            "that the data and the scales are of the same tensor and format."
        )
    return scale


def checked_global_scale(q: Quantized, shape: tuple[int, ...]) -> Tensor:
    """The second-level scale of an NVFP4 tensor, refused where it is missing or misshapen."""
    scale = q.global_scale
    if scale is None or tuple(scale.shape) != shape:
        got = "None" if scale is None else f"of shape {tuple(scale.shape)}"
        raise ValueError(
            f"global_scale is {got}; the format 'nvfp4' needs float32 second-level scales of "
            f"shape {shape} (`weight_scale_2` or `input_scale` of a ModelOpt checkpoint). Give "
            "the one that belongs to the data."
        )
    return scale


def check_data(q: Quantized, dtype: torch.dtype, name: str) -> None:
    """Refuse stored values of another format."""
    if q.data.dtype != dtype:
        raise ValueError(
            f"data is {q.data.dtype}; the format {name!r} stores {dtype}. Check that the data "
            "is of this format."
        )
