"""The factors that kernels with static activation scales apply after each matrix."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor


@final
@attrs.frozen(kw_only=True, eq=False)
class OutputScales:
    """Per expert, (L,) float32.

    Attributes:
        gate: of the first matrix, on the gate: w13_scale * x_scale.
        first: on the up half, with the scale of the intermediate taken out:
            w13_scale * x_scale / h_scale; 1 / h_scale where there is no gate.
        second: of the second matrix: w2_scale * h_scale.
    """

    gate: Tensor
    first: Tensor
    second: Tensor


def output_scales(
    w13_scale: Tensor, w2_scale: Tensor, x_scale: Tensor, h_scale: Tensor, *, gated: bool
) -> OutputScales:
    """From the weights' scales (L,) and the static scales of input and intermediate, ()."""
    gate = w13_scale * x_scale
    first = (gate if gated else torch.ones_like(gate)) / h_scale
    return OutputScales(gate=gate, first=first, second=w2_scale * h_scale)
