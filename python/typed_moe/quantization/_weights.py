"""Expert weights into a format and out of it.

Each expert's matrix is quantised on its own, and in chunks of rows: a float32 copy of a whole
stack of experts would not fit beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
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
    values_per_byte,
)
from typed_moe.quantization import _rows
from typed_moe.quantization._checks import (
    check_data,
    check_weight,
    checked_global_scale,
    checked_scale,
    weight_scale_layout,
)
from typed_moe.quantization._record import Quantized
from typed_moe.quantization._scales import calibration_scale

_CHUNK_VALUES = 1 << 20  # 4 MiB as float32: stays in a CPU's cache, and fills a GPU
_Scaled = Fp8PerTensor | Fp8PerChannel | Fp8BlockScale | MxFp8 | MxFp4 | MxInt4 | Nvfp4


def quantize_weight(weight: Tensor, fmt: Format) -> Quantized:
    """Quantise a stack of expert matrices, each on its own.

    Args:
        weight: float (..., N, K), the leading dimensions the experts. K is the dimension that
            the product sums over, N the outputs.
        fmt: the format to store it in.

    Returns:
        The values and, by format, their scales:
        `Fp8PerTensor` float32 (...,), amax / 448;
        `Fp8PerChannel` float32 (..., N), amax / 448 of each row;
        `Fp8BlockScale` float32 (..., ceil(N/128), ceil(K/128)), amax / 448, the
        `weight_scale_inv` of DeepSeek checkpoints;
        `MxFp8` and `MxFp4` uint8 (..., N, K/32), E8M0 exponent bytes;
        `MxInt4` bfloat16 (..., N, K/32), the larger of max / 7 and -min / 8;
        `Nvfp4` float8_e4m3fn (..., N, K/16) and `global_scale` float32 (...,), amax / (6 * 448).
        `Unquantized` gives the weight itself, `Bf16` a bfloat16 copy (or itself).

    Raises:
        TypeError: the weight is not floating point.
        ValueError: it has fewer than two dimensions, K is not in whole groups, or a value is
            NaN or infinite. The check for those synchronises with the host, once.

    Source: DeepSeek-V3 technical report, section 3.3.2; OCP MX specification 1.0, section 6.3;
    NVIDIA ModelOpt `NVFP4QTensor`.
    """
    check_weight(weight, fmt)
    amax = _finite_amax(weight)
    match fmt:
        case Unquantized():
            return Quantized(data=weight, scale=None)
        case Bf16():
            return Quantized(data=weight.to(torch.bfloat16), scale=None)
        case _:
            return _quantize_scaled(weight.detach(), fmt, amax)


def dequantize_weight(q: Quantized, fmt: Format) -> Tensor:
    """The values that a quantised stack of expert matrices stands for.

    Args:
        q: as `quantize_weight` gives it, or read from a checkpoint.
        fmt: the format it is stored in.

    Returns:
        float32 (..., N, K).

    Raises:
        ValueError: the data or a scale is missing, or of another shape or dtype than the
            format's.
    """
    match fmt:
        case Unquantized() | Bf16():
            return q.data.to(torch.float32)
        case _:
            return _dequantize_scaled(q, fmt)


def _finite_amax(weight: Tensor) -> Tensor:
    """Largest magnitude of each matrix, float32 (...,); refuses NaN and infinity."""
    values = weight.detach()
    low, high = values.amin(dim=(-2, -1)), values.amax(dim=(-2, -1))
    amax = torch.maximum(-low, high).to(torch.float32)
    bad = ~torch.isfinite(amax)
    if bool(bad.any()):
        experts = bad.flatten().nonzero().flatten().tolist()
        raise ValueError(
            f"weight has a NaN, an infinity or a value beyond float32 in the matrices {experts} "
            "(counted over the leading dimensions); allowed: finite values only. Check the "
            "checkpoint those experts came from."
        )
    return amax


def _chunks(shape: torch.Size) -> Iterator[tuple[int, range]]:
    """Each expert with each range of its rows, whole 128-row blocks but for the last."""
    num_experts, num_rows, num_columns = shape
    step = max(1, _CHUNK_VALUES // (num_columns * _rows.FP8_BLOCK)) * _rows.FP8_BLOCK
    for expert in range(num_experts):
        for start in range(0, num_rows, step):
            yield expert, range(start, min(start + step, num_rows))


def _scales_of(scale: Tensor, fmt: _Scaled, expert: int, rows: range) -> Tensor:
    """The part of a weight's scales, as a view, that belongs to these rows of one expert."""
    if isinstance(fmt, Fp8PerTensor):
        return scale.flatten()[expert]
    if isinstance(fmt, Fp8PerChannel):
        return scale.view(-1, scale.shape[-1])[expert, rows.start : rows.stop]
    size = _rows.FP8_BLOCK if isinstance(fmt, Fp8BlockScale) else 1
    return _stacked(scale)[expert, rows.start // size : -(-rows.stop // size)]


def _quantize_scaled(weight: Tensor, fmt: _Scaled, amax: Tensor) -> Quantized:
    """Fill the format's tensors chunk by chunk."""
    data = _empty_data(weight, fmt)
    layout, dtype = weight_scale_layout(fmt, weight.shape)
    scale = torch.empty(layout, dtype=dtype, device=weight.device)
    global_scale = None
    if isinstance(fmt, Fp8PerTensor):
        scale = calibration_scale(amax, fmt)
    if isinstance(fmt, Nvfp4):
        global_scale = calibration_scale(amax, fmt)
    stack, stack_data = _flattened(weight), _stacked(data)
    for expert, rows in _chunks(stack.shape):
        values = stack[expert, rows.start : rows.stop].to(torch.float32)
        chunk = stack_data[expert, rows.start : rows.stop]
        chunk_scale = _scales_of(scale, fmt, expert, rows)
        _quantize_chunk(values, fmt, chunk, chunk_scale, _of_expert(global_scale, expert))
    return Quantized(data=data, scale=scale, global_scale=global_scale)


def _quantize_chunk(
    values: Tensor, fmt: _Scaled, data: Tensor, scale: Tensor, global_scale: Tensor | None
) -> None:
    """Write rows of one expert into `data`, and their scales into `scale`."""
    match fmt:
        case Fp8PerTensor():
            data.copy_(_rows.quantize_fp8_per_tensor(values, scale))
            return
        case Fp8PerChannel():
            result = _rows.quantize_fp8_rows(values)
        case Fp8BlockScale():
            result = _rows.quantize_fp8_blocks(values, _rows.FP8_BLOCK)
        case MxFp8():
            result = _rows.quantize_mxfp8(values)
        case MxFp4():
            result = _rows.quantize_mxfp4(values)
        case MxInt4():
            result = _rows.quantize_mxint4(values)
        case Nvfp4():
            assert global_scale is not None
            result = _rows.quantize_nvfp4(values, global_scale)
        case _:
            assert_never(fmt)
    data.copy_(result[0])
    scale.copy_(result[1])


def _dequantize_scaled(q: Quantized, fmt: _Scaled) -> Tensor:
    """Fill the float32 result chunk by chunk."""
    packing = values_per_byte(fmt)
    check_data(q, torch.float8_e4m3fn if packing == 1 else torch.uint8, fmt.name)
    shape = torch.Size((*q.data.shape[:-1], q.data.shape[-1] * packing))
    scale = checked_scale(q, *weight_scale_layout(fmt, shape), fmt.name).contiguous()
    global_scale = None
    if isinstance(fmt, Nvfp4):
        global_scale = checked_global_scale(q, tuple(shape[:-2]))
    values = torch.empty(shape, dtype=torch.float32, device=q.data.device)
    stack, stack_data = _stacked(values), _flattened(q.data)
    for expert, rows in _chunks(stack.shape):
        chunk = stack_data[expert, rows.start : rows.stop]
        chunk_scale = _scales_of(scale, fmt, expert, rows)
        stack[expert, rows.start : rows.stop] = _dequantize_chunk(
            chunk, fmt, chunk_scale, _of_expert(global_scale, expert)
        )
    return values


def _dequantize_chunk(
    data: Tensor, fmt: _Scaled, scale: Tensor, global_scale: Tensor | None
) -> Tensor:
    """Rows of one expert, as float32."""
    match fmt:
        case Fp8PerTensor():
            return data.to(torch.float32) * scale
        case Fp8PerChannel():
            return _rows.dequantize_fp8_rows(data, scale)
        case Fp8BlockScale():
            return _rows.dequantize_fp8_blocks(data, scale, _rows.FP8_BLOCK)
        case MxFp8():
            return _rows.dequantize_mxfp8(data, scale)
        case MxFp4():
            return _rows.dequantize_mxfp4(data, scale)
        case MxInt4():
            return _rows.dequantize_mxint4(data, scale)
        case Nvfp4():
            assert global_scale is not None
            return _rows.dequantize_nvfp4(data, scale, global_scale)
        case _:
            assert_never(fmt)


def _empty_data(weight: Tensor, fmt: _Scaled) -> Tensor:
    """Room for the stored values of a weight."""
    packing = values_per_byte(fmt)
    if packing > 1:
        shape = (*weight.shape[:-1], weight.shape[-1] // packing)
        return torch.empty(shape, dtype=torch.uint8, device=weight.device)
    return torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)


def _of_expert(global_scale: Tensor | None, expert: int) -> Tensor | None:
    """One expert's second-level scale, as a view."""
    return None if global_scale is None else global_scale.flatten()[expert]


def _stacked(values: Tensor) -> Tensor:
    """(..., N, K) as (E, N, K), as a view, so that writing into it fills the original."""
    return values.view(math.prod(values.shape[:-2]), *values.shape[-2:])


def _flattened(values: Tensor) -> Tensor:
    """(..., N, K) as (E, N, K), to read from: a copy only where strides leave no other way."""
    return values.reshape(math.prod(values.shape[:-2]), *values.shape[-2:])
