"""Room 1: frozen records of plain values. Nothing here holds a tensor."""

from typed_moe.config._activation import (
    Activation,
    Geglu,
    Gelu,
    Relu2,
    Silu,
    Swiglu,
    SwigluStep,
    is_gated,
)
from typed_moe.config._counts import check_count
from typed_moe.config._formats import (
    FORMATS,
    Bf16,
    Format,
    FormatName,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Unquantized,
    values_per_byte,
    weight_block,
)
from typed_moe.config._placement import Placement

__all__ = [
    "FORMATS",
    "Activation",
    "Bf16",
    "Format",
    "FormatName",
    "Fp8BlockScale",
    "Fp8PerChannel",
    "Fp8PerTensor",
    "Geglu",
    "Gelu",
    "MxFp4",
    "MxFp8",
    "MxInt4",
    "Nvfp4",
    "Placement",
    "Relu2",
    "Silu",
    "Swiglu",
    "SwigluStep",
    "Unquantized",
    "check_count",
    "is_gated",
    "values_per_byte",
    "weight_block",
]
