"""What a tensor becomes in a quantisation format: the stored values and their scales."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from torch import Tensor


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Quantized:
    """Stored values with the scales that give them their size.

    Attributes:
        data: the stored values. float8_e4m3fn (..., K) for the FP8 formats; uint8 (..., K/2)
            for the FP4 formats and int4, two codes a byte, the even index in the low nibble;
            bfloat16 (..., K) for `Bf16`; as given for `Unquantized`.
        scale: what multiplies `data`, one per group of values, or None where the format has
            none. float32 for `Fp8PerTensor`, `Fp8PerChannel` and `Fp8BlockScale`, uint8 (E8M0 exponent
            bytes) for `MxFp8` and `MxFp4`, bfloat16 for `MxInt4`, float8_e4m3fn for `Nvfp4`.
            docs/formats.md has the shapes.
        global_scale: float32, only for `Nvfp4`: the second level of scale. One per expert
            matrix for weights, one for an activation.
    """

    # A dataclass, because torch.compile (2.13) cannot trace the frozen `__init__` that attrs makes,
    # and an activation is quantised inside the compiled graph.
    data: Tensor
    scale: Tensor | None
    global_scale: Tensor | None = None
