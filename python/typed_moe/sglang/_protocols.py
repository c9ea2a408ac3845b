"""SGLang's objects, as far as they are read here.

`tests/sglang/test_protocols.py` compares the names with the real classes.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor

from typed_moe.sglang._topk import TopKConfigLike


class Function(Protocol):
    """**Protocol:** a function of SGLang's or FlashInfer's that is wrapped here and called as it was."""

    def __call__(self, *args: object, **kwargs: object) -> object: ...


class LayerLike(Protocol):
    """**Protocol:** `sglang.srt.layers.moe.fused_moe_triton.layer.FusedMoE`."""

    layer_id: int
    layer_name: str
    is_draft: bool
    num_experts: int
    moe_ep_size: int
    moe_ep_rank: int
    moe_tp_size: int
    moe_tp_rank: int
    supports_deferred_finalize: bool
    hidden_size: int
    params_dtype: torch.dtype
    num_local_experts: int
    dispatcher: object
    w13_weight: Tensor
    w2_weight: Tensor
    intermediate_size_per_partition: int


class RunnerConfigLike(Protocol):
    """**Protocol:** `sglang.srt.layers.moe.moe_runner.base.MoeRunnerConfig`."""

    activation: str
    is_gated: bool
    top_k: int | None
    num_fused_shared_experts: int | None
    routed_scaling_factor: float | None
    gemm1_alpha: float | None
    gemm1_beta: float | None
    gemm1_clamp_limit: float | None
    swiglu_limit: float | None
    gate_up_interleaved: bool
    apply_router_weight_on_input: bool
    routing_method_type: IntEnum | int | None
    layer: LayerLike | None


class BypassedLike(Protocol):
    """**Protocol:** `BypassedTopKOutput`: logits, and the settings to route them by."""

    topk_config: TopKConfigLike
    num_token_non_padded: Tensor | None
    expert_location_dispatch_info: object

    @property
    def router_logits(self) -> Tensor:
        """(T, E); raises where SGLang remaps expert ids."""
        ...

    def _replace(self, *, topk_config: TopKConfigLike) -> BypassedLike: ...

    def to_standard(self) -> StandardLike:
        """Routed by SGLang's TopK."""
        ...


class StandardLike(Protocol):
    """**Protocol:** `StandardTopKOutput`: routed."""

    @property
    def topk_weights(self) -> Tensor:
        """(T, k), everything applied that TopK applies."""
        ...

    @property
    def topk_ids(self) -> Tensor:
        """(T, k), of the experts as they are placed."""
        ...


class PackedLike(Protocol):
    """**Protocol:** `PackedTopKOutput`: routed, an id and its bfloat16 weight in one word."""

    @property
    def packed_topk_ids(self) -> Tensor:
        """(T, k) int32."""
        ...


class DispatchLike(Protocol):
    """**Protocol:** `StandardDispatchOutput` and its kin."""

    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    topk_output: BypassedLike | StandardLike | PackedLike

    def _replace(self, *, topk_output: BypassedLike | StandardLike) -> DispatchLike: ...


class TopKLike(Protocol):
    """**Protocol:** `sglang.srt.layers.moe.topk.TopK`."""

    layer_id: int
    is_draft: bool
    topk_config: TopKConfigLike
    forward_cuda: object
    _forward_method: object


class QuantInfoLike(Protocol):
    """**Protocol:** what every payload of the trtllm functions says of the experts' place."""

    global_num_experts: int
    local_expert_offset: int


class Fp8InfoLike(QuantInfoLike, Protocol):
    """**Protocol:** `FlashInferTrtllmFp8MoeQuantInfo`."""

    w13_weight: Tensor
    w2_weight: Tensor
    local_num_experts: int
    intermediate_size: int
    block_quant: bool
    use_mxfp8: bool
    w13_weight_scale_inv: Tensor | None
    w2_weight_scale_inv: Tensor | None
    w13_input_scale: Tensor | None
    output1_scales_scalar: Tensor | None
    output1_scales_gate_scalar: Tensor | None
    output2_scales_scalar: Tensor | None


class Fp4InfoLike(QuantInfoLike, Protocol):
    """**Protocol:** `FlashInferTrtllmFp4MoeQuantInfo`."""

    w13_weight: Tensor
    w2_weight: Tensor
    w13_weight_scale: Tensor
    w2_weight_scale: Tensor
    g1_scale_c: Tensor
    g1_alphas: Tensor
    g2_alphas: Tensor
    w13_input_scale_quant: Tensor
    local_num_experts: int
    intermediate_size_per_partition: int
    use_per_token_activation: bool
    padded_hidden_size: int | None


class MxFp4InfoLike(QuantInfoLike, Protocol):
    """**Protocol:** `FlashInferTrtllmGenMxfp4MoeQuantInfo`."""

    w13_weight: Tensor
    w2_weight: Tensor
    w13_weight_scale: Tensor
    w2_weight_scale: Tensor
    w13_weight_bias: Tensor
    w2_weight_bias: Tensor
    gemm1_alpha: Tensor
    gemm1_beta: Tensor
    gemm1_clamp_limit: Tensor
    local_num_experts: int
    intermediate_size_per_partition: int
    hidden_size: int
    flashinfer_mxfp4_moe_precision: str


class Bf16InfoLike(QuantInfoLike, Protocol):
    """**Protocol:** `FlashInferTrtllmBf16MoeQuantInfo`."""

    gemm1_weights: Tensor
    gemm2_weights: Tensor
