"""Room 4: argument records, the facts of kernels, and the reference kernel."""

from typed_moe.kernels._protocol import KernelRequest, MoeKernel
from typed_moe.kernels._reference_routing import route as route_reference
from typed_moe.kernels.args import (
    ActivationType,
    Bf16MoeArgs,
    ExpertArgs,
    Family,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerTensorMoeArgs,
    FromLogits,
    MoeArgs,
    Precomputed,
    Routing,
    entry_point,
)
from typed_moe.kernels.reference import ReferenceKernel, append_shared
from typed_moe.kernels.weights import ExpertWeights

__all__ = [
    "ActivationType",
    "Bf16MoeArgs",
    "ExpertArgs",
    "ExpertWeights",
    "Family",
    "Fp4MoeArgs",
    "Fp8BlockMoeArgs",
    "Fp8PerTensorMoeArgs",
    "FromLogits",
    "KernelRequest",
    "MoeArgs",
    "MoeKernel",
    "Precomputed",
    "ReferenceKernel",
    "Routing",
    "append_shared",
    "entry_point",
    "route_reference",
]
