"""Triton: score functions and the order of float32 numbers as integers.

`DEVICE` is True where the code is compiled. CUDA's own `expf` and `log1pf` are called there, with
correctly rounded division and root, so that a score has the bits that PyTorch gives it on the same
card; Triton's `exp` is an approximation that loses a bit for every doubling of its argument. The
interpreter has no CUDA library and takes NumPy's.

Importing this needs Triton; see `typed_moe.kernels.fused_routing`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

TAKEN = tl.constexpr(-(2**31))
"""Below the key of every number: the key of an expert that is taken, or is none."""
_NAN = tl.constexpr(2**31 - 1)
_LOW_BITS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def exp(x: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """e to the x, float32, to two units in the last place."""
    if DEVICE:
        return libdevice.exp(x)
    else:
        return tl.exp(x)


@triton.jit
def log1p(x: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """log(1 + x) without loss for small x."""
    if DEVICE:
        return libdevice.log1p(x)
    else:
        one_more = 1.0 + x
        exact = tl.where(one_more == 1.0, 2.0, one_more)
        return tl.where(one_more == 1.0, x, tl.log(exact) * (x / (exact - 1.0)))


@triton.jit
def sigmoid(x: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """1 / (1 + exp(-x)), as `torch.sigmoid` computes it on a card."""
    below = 1.0 + exp(-x, DEVICE)
    return tl.div_rn(tl.full(below.shape, 1.0, tl.float32), below)


@triton.jit
def sqrt_softplus(x: tl.tensor, DEVICE: tl.constexpr) -> tl.tensor:
    """sqrt(log(1 + exp(x))); below -20 exp(x / 2), which is the same and does not underflow."""
    soft = tl.where(x > 20.0, x, log1p(exp(tl.minimum(x, 20.0), DEVICE), DEVICE))
    return tl.where(x < -20.0, exp(x * 0.5, DEVICE), tl.sqrt_rn(soft))


@triton.jit
def score(x: tl.tensor, KIND: tl.constexpr, DEVICE: tl.constexpr) -> tl.tensor:
    """One logit to one score; `logits` leaves it."""
    if KIND == "sigmoid":
        return sigmoid(x, DEVICE)
    elif KIND == "sqrt_softplus":
        return sqrt_softplus(x, DEVICE)
    else:
        return x


@triton.jit
def key_of(x: tl.tensor) -> tl.tensor:
    """int32 in the order of the float32 numbers: -0 is 0, and NaN is above all, as in torch.sort."""
    bits = x.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & _LOW_BITS)
    return tl.where(x == x, tl.where(x == 0.0, 0, key), _NAN)  # noqa: PLR0124 - NaN


@triton.jit
def number_of(key: tl.tensor) -> tl.tensor:
    """The float32 number of a key."""
    return (key ^ ((key >> 31) & _LOW_BITS)).to(tl.float32, bitcast=True)
