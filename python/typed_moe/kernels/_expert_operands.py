"""What the Triton expert kernels read: a record's matrices, and its slots sorted by expert."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, final

import attrs
from torch import Tensor

from typed_moe.kernels._slots import SortedSlots

Fp8 = Literal["none", "native", "bits"]
"""How float8_e4m3fn is multiplied: there is none; by FP8 matrix units; as bfloat16, converted in
registers."""

Scales = Literal["plain", "block", "mxfp8", "mxfp4", "nvfp4"]
"""What scales the weights have: none in the sum ("plain": bfloat16, and FP8 with one scale for each
matrix, which multiplies the result), one float32 for 128 x 128 and for 1 x 128 of a row, or one byte
for the next few values of the sum, with which they become bfloat16."""

GROUPS: Mapping[Scales, int] = MappingProxyType({"mxfp8": 32, "mxfp4": 32, "nvfp4": 16})
"""Values of the sum that share such a byte."""


@final
@attrs.frozen(kw_only=True, eq=False)
class Outputs:
    """What the products are multiplied by, (L,) float32, where activation scales are static.

    Attributes:
        first: on the first product: w13_scale * x_scale.
        stored: on the intermediate, 1 / h_scale; for a gated activation times `first`, as the records
            have it.
        second: on the second product: w2_scale * h_scale.
    """

    first: Tensor
    stored: Tensor
    second: Tensor


@final
@attrs.frozen(kw_only=True, eq=False)
class Operands:
    """A record's matrices: (T, H), (L, M, H), (L, H, I); and their scales, None in bfloat16.

    FP4 has two values to a byte, so that the last dimension is half as long.

    Attributes:
        hidden_scale: (H / 128, T) float32, any strides; (T, H / 32) uint8; (T, H / 16) float8_e4m3fn.
        first_scale, second_scale: (L, M / 128, H / 128) and (L, H / 128, I / 128) float32; or
            (L, M, H / 32) and (L, H, I / 32) uint8; or so for 16 values in float8_e4m3fn.
        fp8: how float8_e4m3fn is multiplied.
        scales: of the weights.
        outputs: the scales of whole matrices, None where there are none.
        in_parts: `hidden` is bfloat16 in `pack` parts already, its scales multiplied in.
    """

    hidden: Tensor
    first: Tensor
    second: Tensor
    hidden_scale: Tensor | None = None
    first_scale: Tensor | None = None
    second_scale: Tensor | None = None
    fp8: Fp8 = "none"
    scales: Scales = "plain"
    outputs: Outputs | None = None
    in_parts: bool = False

    @property
    def group(self) -> int:
        """Values of the sum that have a byte for a scale; 0 where there is none."""
        return GROUPS.get(self.scales, 0)

    @property
    def pack(self) -> int:
        """Values per element of the weights as the kernels load them: two bytes where they have groups."""
        if not self.group:
            return 1
        return 2 if self.scales == "mxfp8" else 4

    @property
    def width(self) -> int:
        """I, the intermediate size."""
        return self.second.shape[2] * (2 if self.pack == 4 else 1)


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
