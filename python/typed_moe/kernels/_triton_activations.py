"""Triton: the activation between an expert's two matrices, in float32 registers.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_TWICE_ROOT_TWO_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def gelu(x: tl.tensor) -> tl.tensor:
    """x times the normal distribution function."""
    return x * 0.5 * (tl.erf(x * _ROOT_HALF) + 1.0)


@triton.jit
def gelu_tanh(x: tl.tensor) -> tl.tensor:
    """Its approximation: 0.5 (1 + tanh(u)) is sigmoid(2u)."""
    return x * tl.sigmoid((x + x * x * x * _CUBE) * _TWICE_ROOT_TWO_OVER_PI)


@triton.jit
def clamp(x: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Between the two; NaN stays NaN."""
    x = tl.where(x > high, high, x)
    return tl.where(x < low, low, x)


@triton.jit
def activate(
    gate: tl.tensor,
    up: tl.tensor,
    alpha: tl.tensor,
    beta: tl.tensor,
    limit: tl.tensor,
    KIND: tl.constexpr,
) -> tl.tensor:
    """One expert's activation by FlashInfer's name; ungated kinds read `up` alone.

    `alpha`, `beta`, `limit` are scalars: 1, 0 and infinity where the plain form is meant.
    """
    if KIND == "Swiglu":
        gate = tl.where(gate > limit, limit, gate)
        return gate * tl.sigmoid(alpha * gate) * (clamp(up, -limit, limit) + beta)
    elif KIND == "SwigluStep":
        swish = gate * tl.sigmoid(gate)
        return tl.where(swish > limit, limit, swish) * clamp(up, -limit, limit)
    elif KIND == "Geglu":
        return gelu(gate) * up
    elif KIND == "GegluTanh":
        return gelu_tanh(gate) * up
    elif KIND == "Relu2":
        above = tl.where(up < 0.0, 0.0, up)
        return above * above
    elif KIND == "Silu":
        return up * tl.sigmoid(up)
    elif KIND == "Gelu":
        return gelu(up)
    else:
        return gelu_tanh(up)
