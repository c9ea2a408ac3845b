"""Room 4: argument records, the facts of kernels, and the reference kernel."""

from typed_moe.kernels._activation_arguments import activation_arguments
from typed_moe.kernels._fused_rules import FUSED_RULES
from typed_moe.kernels._protocol import (
    KernelRequest,
    MoeKernel,
    QuantizingKernel,
    UnfinalizedKernel,
)
from typed_moe.kernels._reference_routing import route as route_reference
from typed_moe.kernels._slots import SortedSlots, SortRequest
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import (
    ActivationType,
    Bf16MoeArgs,
    ExpertArgs,
    Family,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerChannelMoeArgs,
    Fp8PerTensorMoeArgs,
    FromLogits,
    MoeArgs,
    MxInt4MoeArgs,
    Precomputed,
    Routing,
    ToFormat,
    entry_point,
)
from typed_moe.kernels.by_size import BySizeKernel, rows_per_expert
from typed_moe.kernels.deep_gemm import DeepGemmKernel, installed_deep_gemm
from typed_moe.kernels.deep_gemm import layer_refusal as deep_gemm_layer_refusal
from typed_moe.kernels.flashinfer import FlashInferKernel, installed_flashinfer
from typed_moe.kernels.flashinfer import layer_refusal as flashinfer_layer_refusal
from typed_moe.kernels.fused_routing import (
    FusedRouting,
    fused_route,
    fused_routing,
    fused_routing_refusal,
    sort_slots,
)
from typed_moe.kernels.reference import ReferenceKernel, append_shared
from typed_moe.kernels.triton_experts import TritonKernel
from typed_moe.kernels.weights import ExpertWeights

__all__ = [
    "FUSED_RULES",
    "ActivationType",
    "Bf16MoeArgs",
    "BySizeKernel",
    "DeepGemmKernel",
    "ExpertArgs",
    "ExpertWeights",
    "Family",
    "FlashInferKernel",
    "Fp4MoeArgs",
    "Fp8BlockMoeArgs",
    "Fp8PerChannelMoeArgs",
    "Fp8PerTensorMoeArgs",
    "FromLogits",
    "FusedRouting",
    "KernelRequest",
    "MoeArgs",
    "MoeKernel",
    "MxInt4MoeArgs",
    "Precomputed",
    "QuantizingKernel",
    "ReferenceKernel",
    "Routing",
    "SortRequest",
    "SortedSlots",
    "ToFormat",
    "TritonKernel",
    "Unfinalized",
    "UnfinalizedKernel",
    "UnfinalizedRules",
    "activation_arguments",
    "append_shared",
    "deep_gemm_layer_refusal",
    "entry_point",
    "flashinfer_layer_refusal",
    "fused_route",
    "fused_routing",
    "fused_routing_refusal",
    "installed_deep_gemm",
    "installed_flashinfer",
    "route_reference",
    "rows_per_expert",
    "sort_slots",
]
