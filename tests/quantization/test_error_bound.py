"""The error bound: it holds, it is not slack, and it notices what is wrong.

The expert is computed twice in float64: on the unquantised weights, and on the values that the
format holds. Only the second goes through the package.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from typed_moe.config import (
    FORMATS,
    Activation,
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    Geglu,
    Gelu,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Relu2,
    Silu,
    Swiglu,
    SwigluStep,
    Unquantized,
    is_gated,
)
from typed_moe.quantization import (
    Quantized,
    calibration_scale,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
    relative_error_bound,
)
from typed_moe.quantization._error import _sensitivity

TOKENS, HIDDEN, INTERMEDIATE = 16, 256, 128
GPT_OSS = Swiglu(alpha=1.702, beta=1.0, limit=7.0)
ACTIVATIONS: list[Activation] = [
    Swiglu(), GPT_OSS, SwigluStep(), Geglu(), Relu2(), Silu(), Gelu()
]  # fmt: skip
EVERY: list[Format] = [*FORMATS.values(), MxFp4(activation="mxfp8")]
Change = Callable[[Quantized], Quantized]


def _activate(activation: Activation, h: Tensor) -> Tensor:
    """The activations in float64, written from their definitions."""
    if not is_gated(activation):
        match activation:
            case Relu2():
                return h.clamp(min=0.0).square()
            case Silu():
                return h * torch.sigmoid(h)
            case _:
                return h * (1 + torch.erf(h / math.sqrt(2))) / 2
    gate, up = h.chunk(2, dim=-1)
    match activation:
        case Swiglu():
            if activation.limit is not None:
                gate = gate.clamp(max=activation.limit)
                up = up.clamp(-activation.limit, activation.limit)
            return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)
        case SwigluStep():
            clamped = up.clamp(-activation.limit, activation.limit)
            return (gate * torch.sigmoid(gate)).clamp(max=activation.limit) * clamped
        case _:
            return gate * (1 + torch.erf(gate / math.sqrt(2))) / 2 * up


def _bf16(x: Tensor) -> Tensor:
    return x.to(torch.bfloat16)


def _operand(x: Tensor, fmt: Format) -> Tensor:
    """An activation as the format holds it, float64."""
    static = isinstance(fmt, (Fp8PerTensor, Nvfp4))
    scale = calibration_scale(x.abs().amax(), fmt) if static else None
    return dequantize_activation(
        quantize_activation(_bf16(x), fmt, input_scale=scale), fmt
    ).double()


def _relative_error(
    fmt: Format, activation: Activation, size: float, change: Change | None = None
) -> float:
    """||y_hat - y|| / ||y|| of one random expert; `change` spoils the first matrix."""
    rows = (2 if is_gated(activation) else 1) * INTERMEDIATE
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    w13 = torch.randn(rows, HIDDEN, dtype=torch.float64) * size / math.sqrt(HIDDEN)
    w2 = torch.randn(HIDDEN, INTERMEDIATE, dtype=torch.float64) / math.sqrt(INTERMEDIATE)
    y = _activate(activation, x @ w13.T) @ w2.T

    q13, q2 = quantize_weight(w13.float(), fmt), quantize_weight(w2.float(), fmt)
    if change is not None:
        q13 = change(q13)
    h = _operand(x, fmt) @ dequantize_weight(q13, fmt).double().T
    y_hat = _operand(_activate(activation, h), fmt) @ dequantize_weight(q2, fmt).double().T
    return float((_bf16(y_hat).double() - y).norm() / y.norm())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("fmt", EVERY, ids=str)
def test_it_holds_and_is_not_slack(fmt: Format, activation: Activation) -> None:
    """Random experts err less than the bound, and more than a third of it.

    A quarter for int4: its step follows the largest value of a group, which the bound takes for
    the whole group, where the floats' follows each value.
    """
    bound = relative_error_bound(fmt, activation)
    slack = 4 if isinstance(fmt, MxInt4) else 3

    for size in (0.2, 1.0, 5.0):
        error = _relative_error(fmt, activation, size)
        assert error <= bound
        # An unquantised float32 weight has no error of its own to compare with.
        assert isinstance(fmt, Unquantized) or error >= bound / slack


@pytest.mark.parametrize(
    "fmt",
    [
        Bf16(),
        Fp8PerTensor(),
        Fp8PerChannel(),
        Fp8BlockScale(),
        MxFp8(),
        MxFp4(),
        Nvfp4(),
        MxInt4(),
    ],
    ids=str,
)
def test_it_notices_a_wrong_scale(fmt: Format) -> None:
    """Half of the rows at twice their size is beyond the bound of every format."""

    def double(q: Quantized) -> Quantized:
        if q.scale is None:
            data = q.data.clone()
            data[::2] *= 2
            return Quantized(data=data, scale=None)
        if isinstance(fmt, (Fp8PerTensor, Fp8PerChannel, Fp8BlockScale)):
            return Quantized(data=q.data, scale=q.scale * 2)
        scale = q.scale.clone()
        if scale.dtype == torch.uint8:
            scale[::2] += 1
        else:
            scale = (scale.float() * 2).clamp(max=448).to(scale.dtype)
        return Quantized(data=q.data, scale=scale, global_scale=q.global_scale)

    assert _relative_error(fmt, Swiglu(), 1.0, double) > relative_error_bound(fmt, Swiglu())


@pytest.mark.parametrize("fmt", [MxFp4(), Nvfp4(), MxInt4()], ids=str)
def test_it_notices_swapped_nibbles(fmt: Format) -> None:
    """The high nibble read as the even index is beyond the bound."""

    def swap(q: Quantized) -> Quantized:
        data = q.data >> 4 | q.data << 4
        return Quantized(data=data, scale=q.scale, global_scale=q.global_scale)

    assert _relative_error(fmt, Swiglu(), 1.0, swap) > relative_error_bound(fmt, Swiglu())


def test_it_notices_a_coarser_format() -> None:
    """Eight bits do not pass for bfloat16, nor four for eight."""
    for finer, coarser in ((Bf16(), Fp8BlockScale()), (MxFp8(), MxFp4(activation="mxfp8"))):
        error = _relative_error(coarser, Swiglu(), 1.0)
        assert error > relative_error_bound(finer, Swiglu())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_order_of_the_formats(activation: Activation) -> None:
    """Fewer bits, or coarser scales, never have the smaller bound."""
    order: list[Format] = [
        Unquantized(), Bf16(), Fp8BlockScale(), Fp8PerChannel(), Fp8PerTensor(), MxFp8(), MxFp4(), MxInt4(),
        MxFp4(activation="mxfp8"), Nvfp4(),
    ]  # fmt: skip
    bounds = [relative_error_bound(fmt, activation) for fmt in order]

    assert bounds == sorted(bounds)
    assert 0.0 < bounds[0] < 0.01
    assert bounds[-1] < 0.6


def _factor(function: Callable[[Tensor], Tensor], size: float) -> float:
    """s^2 E[f'(sZ)^2] / E[f(sZ)^2] by the rectangle rule over twelve standard deviations."""
    z = torch.linspace(-12.0, 12.0, 8_001, dtype=torch.float64)
    density = functional.normalize(torch.exp(-(z**2) / 2), p=1.0, dim=0)
    x = size * z
    value = function(x)
    slope = torch.gradient(value, spacing=(x,))[0]
    return float(size**2 * (slope**2 * density).sum() / (value**2 * density).sum())


def _sizes(top: float) -> list[float]:
    return [top * 10.0 ** (-exponent / 10) for exponent in range(31)]


@pytest.mark.parametrize("activation", [Relu2(), Silu(), Gelu()], ids=str)
def test_sensitivity_of_one_factor(activation: Activation) -> None:
    """The stated factor is the largest over all sizes of pre-activations, within 5 per cent."""
    largest = max(_factor(lambda x: _activate(activation, x), size) for size in _sizes(100.0))

    # relu(x)^2 is exactly at its factor, the integral to six digits.
    assert largest * (1 - 1e-6) <= _sensitivity(activation)[1] <= 1.05 * largest


@pytest.mark.parametrize("limit", [1.0, 2.0, 4.0, 7.0, 10.0, 20.0])
def test_sensitivity_of_a_clamp(limit: float) -> None:
    """With a clamp: over sizes up to the limit, for the gate's factor and for the up's."""

    def largest(function: Callable[[Tensor], Tensor]) -> float:
        return max(_factor(function, size) for size in _sizes(limit))

    def swish(x: Tensor, alpha: float = 1.0) -> Tensor:
        return x * torch.sigmoid(alpha * x)

    gates = (
        largest(lambda x: swish(x.clamp(max=limit))),
        largest(lambda x: swish(x.clamp(max=limit), alpha=1.702)),
        largest(lambda x: swish(x).clamp(max=limit)),
    )
    up = largest(lambda x: x.clamp(-limit, limit))

    gate_factor, up_factor = _sensitivity(Swiglu(limit=limit))
    assert max(gates) <= gate_factor <= 1.15 * max(gates)
    assert up <= up_factor <= 1.02 * up
    assert _sensitivity(SwigluStep(limit=limit)) == (gate_factor, up_factor)
