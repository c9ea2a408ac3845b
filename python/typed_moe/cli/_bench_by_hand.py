"""Calls to FlashInfer written out by hand, for one layer and one release.

What an engineer writes who knows both: every constant in place, numbers instead of names, no
check, and the strategy's routing and the format's quantisation where the call needs them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, cast

from torch import Tensor

from typed_moe.config import Format, Fp8BlockScale, Nvfp4
from typed_moe.quantization import quantize_activation
from typed_moe.routing import RenormalizeNaive, RoutingForm, RoutingShape

EXPERTS, TOP_K, HIDDEN, INTERMEDIATE = 32, 8, 256, 128

Call = Callable[[Tensor, Tensor], Tensor]
"""(hidden_states (T, H), router_logits (T, E)) to (T, H)."""

# Of FlashInfer 0.7.2.post1.
_TOPK, _RENORMALIZE_NAIVE = 5, 4  # RoutingMethodType
_SWIGLU = 3  # ActivationType
_MAJOR_K, _BLOCK_MAJOR_K = 0, 2  # WeightLayout
_DEEPSEEK_FP8 = 1  # Fp8QuantizationType
_LAYOUT_LINEAR = 2  # SfLayout

_ROUTING = RenormalizeNaive()
_SHAPE = RoutingShape(num_experts=EXPERTS, top_k=TOP_K)


class Library(Protocol):
    """What is called, as the kernel calls it."""

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """One entry point by keyword."""
        ...


def by_hand(
    quant: Format,
    form: RoutingForm,
    library: Library,
    stored: Mapping[str, object],
    input_scale: Tensor | None,
) -> Call:
    """The call of a format and form.

    Args:
        quant: `Bf16`, `Fp8BlockScale` or `Nvfp4`.
        form: who routes.
        library: to call.
        stored: keyword -> tensor, where the layer's weights and their scales are taken from.
        input_scale: the static scale of the input, for NVFP4.
    """
    weights = {
        name: value
        for name, value in stored.items()
        if name.startswith(("gemm", "output")) and isinstance(value, Tensor)
    }
    in_kernel = form is RoutingForm.IN_KERNEL
    if isinstance(quant, Fp8BlockScale):
        make = _fp8_from_logits if in_kernel else _fp8_precomputed
        return make(library, weights)
    if isinstance(quant, Nvfp4):
        assert input_scale is not None, "NVFP4 has a static input scale"
        fp4 = _fp4_from_logits if in_kernel else _fp4_precomputed
        return fp4(library, weights, input_scale)
    bf16 = _bf16_from_logits if in_kernel else _bf16_precomputed
    return bf16(library, weights)


def _bf16_from_logits(library: Library, weights: Mapping[str, Tensor]) -> Call:
    first, second = weights["gemm1_weights"], weights["gemm2_weights"]

    def call(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        return library.call(
            "trtllm_bf16_moe",
            {
                "routing_logits": router_logits,
                "routing_bias": None,
                "hidden_states": hidden_states,
                "gemm1_weights": first,
                "gemm2_weights": second,
                "num_experts": EXPERTS,
                "top_k": TOP_K,
                "n_group": None,
                "topk_group": None,
                "intermediate_size": INTERMEDIATE,
                "local_expert_offset": 0,
                "local_num_experts": EXPERTS,
                "routed_scaling_factor": None,
                "routing_method_type": _RENORMALIZE_NAIVE,
                "use_shuffled_weight": True,
                "weight_layout": _BLOCK_MAJOR_K,
                "do_finalize": True,
                "tune_max_num_tokens": 8192,
                "norm_topk_prob": True,
                "activation_type": _SWIGLU,
                "gemm1_alpha": None,
                "gemm1_beta": None,
                "gemm1_clamp_limit": None,
            },
        )

    return call


def _bf16_precomputed(library: Library, weights: Mapping[str, Tensor]) -> Call:
    first, second = weights["gemm1_weights"], weights["gemm2_weights"]

    def call(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        routed = _ROUTING.select_experts(router_logits, None, shape=_SHAPE)
        return library.call(
            "trtllm_bf16_routed_moe",
            {
                "topk_ids": (routed.topk_ids, routed.topk_weights),
                "hidden_states": hidden_states,
                "gemm1_weights": first,
                "gemm2_weights": second,
                "num_experts": EXPERTS,
                "top_k": TOP_K,
                "n_group": None,
                "topk_group": None,
                "intermediate_size": INTERMEDIATE,
                "local_expert_offset": 0,
                "local_num_experts": EXPERTS,
                "routed_scaling_factor": None,
                "routing_method_type": _TOPK,
                "use_shuffled_weight": True,
                "weight_layout": _BLOCK_MAJOR_K,
                "do_finalize": True,
                "tune_max_num_tokens": 8192,
                "activation_type": _SWIGLU,
                "gemm1_alpha": None,
                "gemm1_beta": None,
                "gemm1_clamp_limit": None,
            },
        )

    return call


def _fp8_from_logits(library: Library, weights: Mapping[str, Tensor]) -> Call:
    first, second = weights["gemm1_weights"], weights["gemm2_weights"]
    first_scale, second_scale = weights["gemm1_weights_scale"], weights["gemm2_weights_scale"]
    quant = Fp8BlockScale()

    def call(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        x = quantize_activation(hidden_states, quant)
        return library.call(
            "trtllm_fp8_block_scale_moe",
            {
                "routing_logits": router_logits,
                "routing_bias": None,
                "hidden_states": x.data,
                "hidden_states_scale": cast("Tensor", x.scale).t().contiguous(),
                "gemm1_weights": first,
                "gemm1_weights_scale": first_scale,
                "gemm2_weights": second,
                "gemm2_weights_scale": second_scale,
                "num_experts": EXPERTS,
                "top_k": TOP_K,
                "n_group": None,
                "topk_group": None,
                "intermediate_size": INTERMEDIATE,
                "local_expert_offset": 0,
                "local_num_experts": EXPERTS,
                "routed_scaling_factor": None,
                "routing_method_type": _RENORMALIZE_NAIVE,
                "use_shuffled_weight": False,
                "weight_layout": _MAJOR_K,
                "do_finalize": True,
                "tune_max_num_tokens": 8192,
                "fp8_quantization_type": _DEEPSEEK_FP8,
                "norm_topk_prob": True,
                "activation_type": _SWIGLU,
                "gemm1_alpha": None,
                "gemm1_beta": None,
                "gemm1_clamp_limit": None,
                "gemm1_bias": None,
                "gemm2_bias": None,
                "num_fused_shared_experts": None,
            },
        )

    return call


def _fp8_precomputed(library: Library, weights: Mapping[str, Tensor]) -> Call:
    first, second = weights["gemm1_weights"], weights["gemm2_weights"]
    first_scale, second_scale = weights["gemm1_weights_scale"], weights["gemm2_weights_scale"]
    quant = Fp8BlockScale()

    def call(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        routed = _ROUTING.select_experts(router_logits, None, shape=_SHAPE)
        x = quantize_activation(hidden_states, quant)
        return library.call(
            "trtllm_fp8_block_scale_routed_moe",
            {
                "topk_ids": (routed.topk_ids, routed.topk_weights),
                "routing_bias": None,
                "hidden_states": x.data,
                "hidden_states_scale": cast("Tensor", x.scale).t().contiguous(),
                "gemm1_weights": first,
                "gemm1_weights_scale": first_scale,
                "gemm2_weights": second,
                "gemm2_weights_scale": second_scale,
                "num_experts": EXPERTS,
                "top_k": TOP_K,
                "n_group": None,
                "topk_group": None,
                "intermediate_size": INTERMEDIATE,
                "local_expert_offset": 0,
                "local_num_experts": EXPERTS,
                "routed_scaling_factor": None,
                "routing_method_type": _TOPK,
                "use_shuffled_weight": False,
                "weight_layout": _MAJOR_K,
                "do_finalize": True,
                "tune_max_num_tokens": 8192,
                "fp8_quantization_type": _DEEPSEEK_FP8,
                "activation_type": _SWIGLU,
                "gemm1_alpha": None,
                "gemm1_beta": None,
                "gemm1_clamp_limit": None,
            },
        )

    return call


def _fp4_from_logits(library: Library, weights: Mapping[str, Tensor], scale: Tensor) -> Call:
    quant = Nvfp4()

    def call(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        x = quantize_activation(hidden_states, quant, input_scale=scale)
        return library.call(
            "trtllm_fp4_block_scale_moe",
            {
                "routing_logits": router_logits,
                "routing_bias": None,
                "hidden_states": x.data,
                "hidden_states_scale": x.scale,
                "hidden_states_scale_layout": _LAYOUT_LINEAR,
                **weights,
                "gemm1_bias": None,
                "gemm1_alpha": None,
                "gemm1_beta": None,
                "gemm1_clamp_limit": None,
                "gemm2_bias": None,
                "num_experts": EXPERTS,
                "top_k": TOP_K,
                "n_group": None,
                "topk_group": None,
                "intermediate_size": INTERMEDIATE,
                "local_expert_offset": 0,
                "local_num_experts": EXPERTS,
                "routed_scaling_factor": None,
                "routing_method_type": _RENORMALIZE_NAIVE,
                "do_finalize": True,
                "tune_max_num_tokens": 8192,
                "norm_topk_prob": True,
                "activation_type": _SWIGLU,
                "num_fused_shared_experts": None,
            },
        )

    return call


def _fp4_precomputed(library: Library, weights: Mapping[str, Tensor], scale: Tensor) -> Call:
    quant = Nvfp4()

    def call(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        routed = _ROUTING.select_experts(router_logits, None, shape=_SHAPE)
        x = quantize_activation(hidden_states, quant, input_scale=scale)
        return library.call(
            "trtllm_fp4_block_scale_routed_moe",
            {
                "topk_ids": (routed.topk_ids, routed.topk_weights),
                "routing_bias": None,
                "hidden_states": x.data,
                "hidden_states_scale": x.scale,
                "hidden_states_scale_layout": _LAYOUT_LINEAR,
                **weights,
                "gemm1_bias": None,
                "gemm1_alpha": None,
                "gemm1_beta": None,
                "gemm1_clamp_limit": None,
                "gemm2_bias": None,
                "num_experts": EXPERTS,
                "top_k": TOP_K,
                "n_group": None,
                "topk_group": None,
                "intermediate_size": INTERMEDIATE,
                "local_expert_offset": 0,
                "local_num_experts": EXPERTS,
                "routed_scaling_factor": None,
                "routing_method_type": _TOPK,
                "do_finalize": True,
                "tune_max_num_tokens": 8192,
                "activation_type": _SWIGLU,
            },
        )

    return call
