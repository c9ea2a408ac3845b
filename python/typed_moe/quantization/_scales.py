"""Float32 scales from the largest magnitude that they have to hold."""

from __future__ import annotations

import torch
from torch import Tensor

from typed_moe.config import Format, Fp8PerTensor, Nvfp4
from typed_moe.quantization._e2m1 import E2M1_MAX

E4M3_MAX = 448.0
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quotient(values: Tensor, divisor: float) -> Tensor:
    """values / divisor, correctly rounded on every device.

    PyTorch multiplies by the reciprocal where a CUDA tensor is divided by a number, which is off
    by a unit in the last place (scales on an H100 differed from the CPU's, 2026-11-23).
    """
    return values / torch.full_like(values, divisor)


def float_scale(amax: Tensor, largest: float) -> Tensor:
    """The multiplier that brings `amax` to `largest`, the format's greatest value.

    amax / largest, not under 2^-126 (a subnormal scale is too coarse to divide by), and 1 where
    `amax` is 0, so that zeros stay zeros. A NaN or an infinity passes through.

    Args:
        amax: float32, any shape, not negative.
        largest: the greatest magnitude that the format holds.

    Returns:
        float32 of the same shape.
    """
    return torch.where(amax == 0.0, 1.0, quotient(amax, largest).clamp(min=SMALLEST_NORMAL))


def calibration_scale(amax: Tensor, fmt: Format) -> Tensor:
    """The static `input_scale` of an activation whose largest magnitude was `amax`.

    amax / 448 for `Fp8PerTensor`, amax / (6 * 448) for `Nvfp4`, never under 2^-126. An `amax`
    of 0 (an expert that no calibration token reached) gives 1: it holds values up to 448
    (2688) without saturating, where the smallest scale would saturate everything.

    Args:
        amax: float, any shape, not negative: what calibration saw.
        fmt: `Fp8PerTensor` or `Nvfp4`, the formats whose activation scale is static.

    Returns:
        float32 of the shape of `amax`.

    Raises:
        ValueError: `fmt` takes its activation scales from each call.

    Source: NVIDIA ModelOpt `input_scale`, which exports the same two multipliers.
    """
    match fmt:
        case Fp8PerTensor():
            return float_scale(amax.to(torch.float32), E4M3_MAX)
        case Nvfp4():
            return float_scale(amax.to(torch.float32), E2M1_MAX * E4M3_MAX)
        case _:
            raise ValueError(
                f"the format {fmt.name!r} has no static activation scale; allowed: "
                "'fp8_per_tensor' and 'nvfp4'. Leave out calibration: this format needs none."
            )
