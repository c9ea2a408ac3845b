"""Triton: the activation between an expert's two matrices, in float32 registers.

Importing this needs Triton; see `typed_moe.kernels.triton_experts`.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROOT_HALF = tl.constexpr(0.7071067811865476)
_ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
_CUBE = tl.constexpr(0.044715)


@triton.jit
def gelu(x: tl.tensor, TANH: tl.constexpr) -> tl.tensor:
    """Exact, by erf; or by tanh(u) = 2 sigmoid(2u) - 1."""
    if TANH:
        inner = _ROOT_TWO_OVER_PI * (x + _CUBE * x * x * x)
        return x * tl.sigmoid(2.0 * inner)
    else:
        return 0.5 * x * (1.0 + tl.erf(x * _ROOT_HALF))


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
        return gelu(gate, False) * up
    elif KIND == "GegluTanh":
        return gelu(gate, True) * up
    elif KIND == "Relu2":
        above = tl.where(up < 0.0, 0.0, up)
        return above * above
    elif KIND == "Silu":
        return up * tl.sigmoid(up)
    elif KIND == "Gelu":
        return gelu(up, False)
    else:
        tl.static_assert(KIND == "GeluTanh")
        return gelu(up, True)
