# The public door of `core`, and of the enums whose numbers its functions take: RoutingMethodType
# and WeightLayout are here in every release since 0.5.0, wherever they were defined.

from flashinfer.fused_moe.core import (
    convert_to_block_layout as convert_to_block_layout,
    reorder_rows_for_gated_act_gemm as reorder_rows_for_gated_act_gemm,
    trtllm_bf16_moe as trtllm_bf16_moe,
    trtllm_bf16_routed_moe as trtllm_bf16_routed_moe,
    trtllm_fp4_block_scale_moe as trtllm_fp4_block_scale_moe,
    trtllm_fp4_block_scale_routed_moe as trtllm_fp4_block_scale_routed_moe,
    trtllm_fp8_block_scale_moe as trtllm_fp8_block_scale_moe,
    trtllm_fp8_block_scale_routed_moe as trtllm_fp8_block_scale_routed_moe,
    trtllm_fp8_per_channel_scale_moe as trtllm_fp8_per_channel_scale_moe,
    trtllm_fp8_per_channel_scale_routed_moe as trtllm_fp8_per_channel_scale_routed_moe,
    trtllm_fp8_per_tensor_scale_moe as trtllm_fp8_per_tensor_scale_moe,
    trtllm_fp8_per_tensor_scale_routed_moe as trtllm_fp8_per_tensor_scale_routed_moe,
    trtllm_mxint4_block_scale_moe as trtllm_mxint4_block_scale_moe,
    trtllm_mxint4_block_scale_routed_moe as trtllm_mxint4_block_scale_routed_moe,
)
from flashinfer.tllm_enums import (
    ActivationType as ActivationType,
    Fp8QuantizationType as Fp8QuantizationType,
    RoutingInputMode as RoutingInputMode,
    RoutingMethodType as RoutingMethodType,
    WeightLayout as WeightLayout,
)
