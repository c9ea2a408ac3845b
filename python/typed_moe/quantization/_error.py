"""How far a quantised expert may be from exact arithmetic, derived from the format alone."""

from __future__ import annotations

import math
from typing import assert_never

from typed_moe.config import (
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
)

_BF16 = 2.0**-16 / 3  # square of u / sqrt(3), u = 2^-8: seven stored mantissa bits

# Values that share the scale of a tensor or of a row: any number, as long as the largest is under 2^10 times
# the root mean square. Beyond 2^13 the subnormals of E4M3 would begin to count.
_CREST_SQUARED = 2.0**20

# s^2 E[f'(sZ)^2] / E[f(sZ)^2], Z standard normal, at the worst s (for a clamp: s up to the
# limit, and the worst limit). Rounded up; tests/quantization/test_error_bound.py integrates them.
_SMOOTH = 1.08  # silu: 1.069 at s = 1.26; gelu: 1.075 at s = 0.79
_SMOOTH_CLAMPED = 1.47  # x * sigmoid(a x) clamped at s: 1.457 at a s = 2 to 4
_SQUARE = 4 / 3  # relu(x)^2, at every s
_CLAMPED = 4 / 3  # clamp(x, -s, s): 1.323
_LINEAR = 1.0


def relative_error_bound(fmt: Format, activation: Activation) -> float:
    """Bound on ||y_hat - y|| / ||y|| (Frobenius) of one expert in this format.

    y is the expert (gemm1, activation, gemm2) in exact arithmetic on the unquantised weights
    and input; y_hat has weights, input and intermediate in the format, float32 accumulation,
    and input, intermediate and output rounded to bfloat16.

    1. An operand's mean square relative error is at most, with u = 2^-(m + 1) for m mantissa
       bits (2^-4 for E4M3, 2^-2 for E2M1, 2^-8 for bfloat16),

           e^2 = u^2/3 * (1 + B * v^2 * E[1/a^2]) + E[max(0, 1 - c/a)^2]

       A value in [2^k, 2^(k+1)) is rounded on a grid of step 2u * 2^k: mean square error
       u^2/3 * 4^k, at most u^2/3 of its square. One under the smallest normal v is rounded as
       if it were v. A group of B values whose largest is a has sum of squares a^2 or more:
       that is the second term. The third is what saturation at c takes from the largest value
       under the E8M0 floor rule, charged as if the group's whole energy were in that value.
       The floor rule leaves a anywhere in [2^k, 2^(k+1)), on a log-uniform scale. int4 has one
       step, 1, for values of every size: e^2 = B/12 * E[1/a^2].
    2. gemm1: errors of independent sign add in quadrature over the sum,
       g^2 = (1 + e_w^2)(1 + e_a^2)(1 + b^2) - 1, b for bfloat16.
    3. Activation f of pre-activations x of root mean square s, error of root mean square g s
       whatever x is: h^2 = g^2 * s^2 E[f'(x)^2] / E[f(x)^2] for each factor of the product;
       1 for a linear one, 1.08 for silu and gelu, 4/3 for relu^2, at most 1.47 (gate) and 4/3
       (up) with a clamp. A gated activation has two factors: (1 + h_gate^2)(1 + h_up^2) - 1.
    4. gemm2: total^2 = (1 + h^2)(1 + e_w^2)(1 + e_a^2)(1 + b^2)^2 - 1.

    There is no safety factor. The room is in step 1, which puts every value at the bottom of
    its binade: on Gaussian operands e is 1.3 to 2 times what rounding gives, and the deviation
    of a finite sample, about 1/sqrt(2 * hidden_size) of the total, is well inside that.

    It holds where the assumptions do: rounding errors spread over their grid step and are
    independent of each other; the pre-activations are about normal, and no larger in root mean
    square than the activation's clamp; the products do not cancel systematically (||y|| is
    what independent terms give, or more); a static activation scale covers its values.

    Args:
        fmt: the format of the layer. `Unquantized` is bounded as bfloat16, the coarsest dtype
            that it may be.
        activation: the activation of the expert.

    Returns:
        The bound; 0.1 means ten per cent.

    Source: the formats' grids (OCP MX specification 1.0; NVIDIA NVFP4); written out with
    numbers in docs/formats.md.
    """
    weight, operand = _weight_error(fmt), _activation_error(fmt)
    product = (1 + weight) * (1 + operand) * (1 + _BF16)
    gate, up = _sensitivity(activation)
    intermediate = (1 + gate * (product - 1)) * (1 + up * (product - 1))
    return math.sqrt(intermediate * product * (1 + _BF16) - 1)


def stored_error_bound(fmt: Format) -> float:
    """Bound on ||y_hat - y|| / ||y|| of a kernel, y in exact arithmetic on the stored operands.

    Weights and input are taken as stored, so their rounding is no part of it. What is left, with
    e and b as in `relative_error_bound`: the intermediate, rounded to the format by the kernel
    and by the one who checks it, who may break ties the other way, and four roundings to
    bfloat16 (intermediate, expert's output, routing weight, sum):

        total^2 = (1 + e_a^2)^2 (1 + b^2)^4 - 1

    Args:
        fmt: the format of the layer.

    Returns:
        The bound; 0.1 means ten per cent.
    """
    operand = 0.0 if _is_plain(fmt) else _activation_error(fmt)
    return math.sqrt((1 + operand) ** 2 * (1 + _BF16) ** 4 - 1)


def _is_plain(fmt: Format) -> bool:
    """Whether activations are bfloat16, whose rounding is counted as such."""
    return isinstance(fmt, Unquantized | Bf16) or fmt == MxFp4(activation="bf16")


def _weight_error(fmt: Format) -> float:
    """Mean square relative error of a weight in this format."""
    match fmt:
        case Unquantized() | Bf16():
            return _BF16
        case Fp8PerTensor() | Fp8PerChannel():
            return _e4m3_error(_CREST_SQUARED, 448.0)
        case Fp8BlockScale():
            return _e4m3_error(128.0 * 128.0, 448.0)
        case MxFp8():
            return _mxfp8_error()
        case MxFp4():
            clipped = _mean_clipped(6.0, 4.0)
            return _rounding(1, 32 * _mean_inverse_square(4.0), smallest=1.0) + clipped
        case MxInt4():
            return _mxint4_error()
        case Nvfp4():
            return _nvfp4_error()
        case _:
            assert_never(fmt)


def _activation_error(fmt: Format) -> float:
    """Mean square relative error of an activation in this format."""
    match fmt:
        case Unquantized() | Bf16() | MxInt4() | MxFp4(activation="bf16"):
            return _BF16
        case Fp8PerTensor() | Fp8PerChannel():
            return _e4m3_error(_CREST_SQUARED, 448.0)
        case Fp8BlockScale():
            return _e4m3_error(128.0, 448.0)
        case MxFp8() | MxFp4():
            return _mxfp8_error()
        case Nvfp4():
            return _nvfp4_error()
        case _:
            assert_never(fmt)


def _rounding(mantissa_bits: int, group_over_square: float, smallest: float) -> float:
    """u^2/3 * (1 + B * v^2 * E[1/a^2]), the first two terms of step 1."""
    half_step = 2.0 ** -(mantissa_bits + 1)
    return half_step**2 / 3 * (1 + group_over_square * smallest**2)


def _e4m3_error(group: float, largest: float) -> float:
    """E4M3 with a scale that brings the group's largest value to `largest`."""
    return _rounding(3, group / largest**2, smallest=2.0**-6)


def _mxfp8_error() -> float:
    """E4M3 in groups of 32 whose largest value lands in [256, 512) and saturates at 448."""
    rounding = _rounding(3, 32 * _mean_inverse_square(256.0), smallest=2.0**-6)
    return rounding + _mean_clipped(448.0, 256.0)


def _nvfp4_error() -> float:
    """E2M1 in groups of 16 whose largest value lands within 1/16 of 6.

    The scale is rounded to E4M3, half a step of which is 1/16. What that pushes beyond 6 (up
    to 6.4) is nearer to 6 than half a grid step, so saturation adds nothing to the rounding.
    """
    largest = 6.0 / (1 + 2.0**-4)
    return _rounding(1, 16 / largest**2, smallest=1.0)


def _mxint4_error() -> float:
    """Whole numbers in groups of 32 whose largest lands within 2^-8 of 7, or beyond.

    The grid has one step throughout, so that the mean square error is 1/12 for every value: B/12
    over a sum of squares that is a^2 at least. The scale brings the largest value to 7 or the
    smallest to -8, so that a is 7 or more. Rounding the scale to bfloat16 moves a by 2^-8 of
    itself; what it pushes beyond 7 or -8 is nearer to them than half a step.
    """
    largest = 7.0 / (1 + 2.0**-8)
    return 32 / 12 / largest**2


def _mean_inverse_square(low: float) -> float:
    """E[1/a^2] for a log-uniform in [low, 2 low)."""
    return 3 / (8 * math.log(2) * low**2)


def _mean_clipped(limit: float, low: float) -> float:
    """E[max(0, 1 - limit/a)^2] for a log-uniform in [low, 2 low): the integral, term by term."""
    high = 2 * low
    logarithm = math.log(high / limit)
    linear = 2 * limit * (1 / limit - 1 / high)
    square = limit**2 / 2 * (1 / limit**2 - 1 / high**2)
    return (logarithm - linear + square) / math.log(2)


def _sensitivity(activation: Activation) -> tuple[float, float]:
    """s^2 E[f'^2] / E[f^2] of the gate's and of the up's factor; 0 where there is no gate."""
    match activation:
        case Swiglu(limit=None):
            return _SMOOTH, _LINEAR
        case Swiglu() | SwigluStep():
            return _SMOOTH_CLAMPED, _CLAMPED
        case Geglu():
            return _SMOOTH, _LINEAR
        case Relu2():
            return 0.0, _SQUARE
        case Silu() | Gelu():
            return 0.0, _SMOOTH
        case _:
            assert_never(activation)
