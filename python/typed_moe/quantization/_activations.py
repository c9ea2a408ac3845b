"""Activations into a format and out of it, at run time and without a host synchronisation."""

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
from typed_moe.quantization import _rows
from typed_moe.quantization._checks import (
    check_columns,
    check_data,
    check_floating,
    checked_global_scale,
    checked_scale,
    row_group,
)
from typed_moe.quantization._record import Quantized


def quantize_activation(x: Tensor, fmt: Format, *, input_scale: Tensor | None = None) -> Quantized:
    """Quantise the operand that a format multiplies its weights with.

    A NaN stays a NaN, and makes one of its whole group where the group has a scale of its own.
    An infinity does the same under `Fp8PerChannel`, `Fp8BlockScale`, `MxFp8` and `MxFp4`; under
    the static scales it saturates. Nothing here reads a value back to the host.

    Args:
        x: float (T, K), one row a token.
        fmt: the format of the layer.
        input_scale: float32, one value: the static multiplier of `Fp8PerTensor` (amax / 448)
            or `Nvfp4` (amax / (6 * 448)). Not read for the other formats. It has to be
            positive, which is not checked here (it would synchronise).

    Returns:
        By format:
        `Fp8PerTensor` float8_e4m3fn (T, K), the scale ();
        `Fp8PerChannel` float8_e4m3fn (T, K), float32 (T, 1), one per token;
        `Fp8BlockScale` float8_e4m3fn (T, K), float32 (T, ceil(K/128)), one per 1x128;
        `MxFp8` and `MxFp4(activation="mxfp8")` float8_e4m3fn (T, K), uint8 (T, K/32);
        `Nvfp4` uint8 (T, K/2), float8_e4m3fn (T, K/16), `global_scale` ();
        `Bf16`, `MxInt4` and `MxFp4(activation="bf16")` bfloat16 (T, K), no scale;
        `Unquantized` x itself.

    Raises:
        TypeError: `x` is not floating point.
        ValueError: `x` is not (T, K), K is not in whole groups, or a static `input_scale` is
            needed and missing or not one value.
    """
    _check_activation(x, fmt)
    match fmt:
        case Unquantized():
            return Quantized(data=x, scale=None)
        case Bf16() | MxInt4() | MxFp4(activation="bf16"):
            return Quantized(data=x.to(torch.bfloat16), scale=None)
        case Fp8PerTensor():
            scale = _static_scale(input_scale, fmt)
            return Quantized(data=_rows.quantize_fp8_per_tensor(_float(x), scale), scale=scale)
        case Fp8PerChannel():
            data, scale = _rows.quantize_fp8_rows(_float(x))
            return Quantized(data=data, scale=scale.unsqueeze(-1))
        case Fp8BlockScale():
            data, scale = _rows.quantize_fp8_blocks(_float(x), block_rows=1)
            return Quantized(data=data, scale=scale)
        case MxFp8() | MxFp4():
            data, scale = _rows.quantize_mxfp8(_float(x))
            return Quantized(data=data, scale=scale)
        case Nvfp4():
            global_scale = _static_scale(input_scale, fmt)
            data, scale = _rows.quantize_nvfp4(_float(x), global_scale)
            return Quantized(data=data, scale=scale, global_scale=global_scale)
        case _:
            assert_never(fmt)


def dequantize_activation(q: Quantized, fmt: Format) -> Tensor:
    """The values that a quantised activation stands for.

    Args:
        q: as `quantize_activation` gives it.
        fmt: the format of the layer.

    Returns:
        float32 (T, K).

    Raises:
        ValueError: the data or a scale is missing, or of another shape or dtype than the
            format's.
    """
    match fmt:
        case Unquantized() | Bf16() | MxInt4() | MxFp4(activation="bf16"):
            return q.data.to(torch.float32)
        case Fp8PerTensor():
            check_data(q, torch.float8_e4m3fn, fmt.name)
            return q.data.to(torch.float32) * checked_scale(q, (), torch.float32, fmt.name)
        case Fp8PerChannel():
            check_data(q, torch.float8_e4m3fn, fmt.name)
            scale = checked_scale(q, (q.data.shape[0], 1), torch.float32, fmt.name)
            return _rows.dequantize_fp8_rows(q.data, scale.squeeze(-1))
        case Fp8BlockScale():
            check_data(q, torch.float8_e4m3fn, fmt.name)
            scale = checked_scale(q, _groups(q, _rows.FP8_BLOCK), torch.float32, fmt.name)
            return _rows.dequantize_fp8_blocks(q.data, scale, block_rows=1)
        case MxFp8() | MxFp4():
            check_data(q, torch.float8_e4m3fn, fmt.name)
            scale = checked_scale(q, _groups(q, _rows.MX_GROUP), torch.uint8, fmt.name)
            return _rows.dequantize_mxfp8(q.data, scale)
        case Nvfp4():
            check_data(q, torch.uint8, fmt.name)
            shape = _groups(q, _rows.NVFP4_GROUP // 2)
            scale = checked_scale(q, shape, torch.float8_e4m3fn, fmt.name)
            return _rows.dequantize_nvfp4(q.data, scale, checked_global_scale(q, ()))
        case _:
            assert_never(fmt)


def _check_activation(x: Tensor, fmt: Format) -> None:
    """Refuse what is no (T, K) of the format's groups."""
    check_floating("x", x)
    if x.dim() != 2:
        raise ValueError(
            f"x has shape {tuple(x.shape)}; allowed: (T, K), one row a token. Flatten the "
            "leading dimensions first."
        )
    check_columns("x", x.shape, _row_group(fmt), fmt.name)


def _row_group(fmt: Format) -> int:
    """As `row_group`, but for the formats that multiply their groups with plain bfloat16."""
    match fmt:
        case MxInt4() | MxFp4(activation="bf16"):
            return 1
        case _:
            return row_group(fmt)


def _static_scale(input_scale: Tensor | None, fmt: Fp8PerTensor | Nvfp4) -> Tensor:
    """The static scale as float32 ()."""
    if input_scale is None:
        raise ValueError(
            f"input_scale is None; the format {fmt.name!r} needs the activation's static float32 "
            "scale. Take it from the checkpoint (`input_scale`), or from `FusedMoE.calibrate`."
        )
    if input_scale.numel() != 1:
        raise ValueError(
            f"input_scale has shape {tuple(input_scale.shape)}; the format {fmt.name!r} needs "
            "one value for the whole activation. Give one expert's scale, or the largest of all."
        )
    return input_scale.to(torch.float32).reshape(())


def _groups(q: Quantized, group: int) -> tuple[int, int]:
    """Shape of the scales of (T, columns) stored values, one for each `group` columns."""
    tokens, columns = q.data.shape
    return tokens, -(-columns // group)


def _float(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32)
