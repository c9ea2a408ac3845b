"""What the Triton expert kernels read: a record's matrices, and its slots sorted by expert."""

from __future__ import annotations

from typing import Literal, final

import attrs
from torch import Tensor

from typed_moe.kernels._slots import SortedSlots

Fp8 = Literal["none", "native", "bits"]
"""How float8_e4m3fn is multiplied: there is none; by FP8 matrix units; as bfloat16, converted in
registers."""


@final
@attrs.frozen(kw_only=True, eq=False)
class Operands:
    """A record's matrices: (T, H), (L, M, H), (L, H, I); and their scales, None in bfloat16.

    Attributes:
        hidden_scale: (H / 128, T) float32, any strides.
        first_scale, second_scale: (L, M / 128, H / 128) and (L, H / 128, I / 128) float32.
        fp8: how float8_e4m3fn is multiplied.
    """

    hidden: Tensor
    first: Tensor
    second: Tensor
    hidden_scale: Tensor | None = None
    first_scale: Tensor | None = None
    second_scale: Tensor | None = None
    fp8: Fp8 = "none"


@final
@attrs.frozen(kw_only=True, eq=False)
class Slots:
    """Where the tokens go: ids (T, k) int32, weights (T, k), and the same sorted by expert.

    `on_input`: the weight multiplies the expert's input, not its output.
    """

    ids: Tensor
    weights: Tensor
    sorted: SortedSlots
    on_input: bool
