"""A layer's tensors, as a runner and a kernel's preparation take them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """A layer's tensors as a runner takes them; shapes as in `typed_moe.kernels.args`.

    Attributes:
        w13_weight, w2_weight: the stored values.
        w13_scale, w2_scale: per-group or per-matrix scales, None where the format has none.
        w13_scale_2, w2_scale_2: NVFP4's second level, (L,) float32.
        w13_input_scale, w2_input_scale: static activation scales, () float32.
        w13_bias, w2_bias: (L, M) and (L, H) float32, or None.
    """

    w13_weight: Tensor
    w2_weight: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_scale_2: Tensor | None = None
    w2_scale_2: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
