"""From an argument record to the keywords of the entry point it is for.

Every keyword of every release is written here; those that the installed function lacks are left
out, which is only allowed for one that would say nothing (`NEUTRAL`).
"""

from __future__ import annotations

from typing import assert_never

import torch
from torch import Tensor

from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.kernels._flashinfer_padding import padded_intermediate_size
from typed_moe.kernels.args import (
    Bf16MoeArgs,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerChannelMoeArgs,
    Fp8PerTensorMoeArgs,
    FromLogits,
    MoeArgs,
    MxInt4MoeArgs,
    Precomputed,
    given_scale,
)

Arguments = dict[str, object]

NEUTRAL: tuple[object, ...] = (None, 0, False)
"""Values that a release without the parameter acts on as well."""

ROUTED_METHOD = "TopK"
"""Precomputed calls name a method all the same; this one is in every release and checks least."""


def constant_arguments(
    args: MoeArgs,
    library: FlashInferLibrary,
    *,
    tune_max_num_tokens: int,
    enable_pdl: bool | None,
) -> Arguments:
    """What no call of a layer changes."""
    experts = args.experts
    deepseek = isinstance(args, Fp8BlockMoeArgs) and args.fp8_quantization_type == "DeepSeekFp8"
    layout = "BlockMajorK" if isinstance(args, Bf16MoeArgs | MxInt4MoeArgs) else "MajorK"
    arguments: Arguments = {
        "intermediate_size": padded_intermediate_size(args),
        "local_expert_offset": experts.local_expert_offset,
        "activation_type": library.number("ActivationType", experts.activation_type),
        "gemm1_alpha": experts.gemm1_alpha,
        "gemm1_beta": experts.gemm1_beta,
        "gemm1_clamp_limit": experts.gemm1_clamp_limit,
        "gemm1_bias": experts.gemm1_bias,
        "gemm2_bias": experts.gemm2_bias,
        "use_shuffled_weight": not deepseek,
        "weight_layout": library.number("WeightLayout", layout),
        "do_finalize": True,
        "tune_max_num_tokens": tune_max_num_tokens,
        # 0.5: None lets the launcher choose the tile.
        "tile_tokens_dim": None,
    }
    if enable_pdl is not None:
        arguments["enable_pdl"] = enable_pdl
    return arguments


def routing_arguments(args: MoeArgs, library: FlashInferLibrary, *, packed: bool) -> Arguments:
    """Who goes where: logits and a method, or ids and weights that are final."""
    experts, routing = args.experts, args.routing
    shared = experts.num_fused_shared_experts
    if isinstance(routing, FromLogits):
        return {
            "routing_logits": routing.routing_logits.contiguous(),
            "routing_bias": routing.routing_bias,
            "num_experts": experts.num_experts,
            "local_num_experts": experts.local_num_experts,
            "top_k": experts.top_k,
            "n_group": routing.n_group,
            "topk_group": routing.topk_group,
            "routed_scaling_factor": routing.routed_scaling_factor,
            "routing_method_type": library.number("RoutingMethodType", routing.routing_method_type),
            "norm_topk_prob": routing.norm_topk_prob,
            "use_routing_scales_on_input": routing.use_routing_scales_on_input,
            "num_fused_shared_experts": shared or None,
        }
    # To a kernel that is given the ids, a shared expert is one more expert with one more slot.
    return {
        "topk_ids": _packed(routing) if packed else (routing.topk_ids, routing.topk_weights),
        "routing_bias": None,
        "num_experts": _told_experts(args, experts.num_experts + shared),
        "local_num_experts": experts.local_num_experts + shared,
        # Not experts.top_k: the runner may have made a row of each slot, to weight the inputs.
        "top_k": routing.topk_ids.shape[1],
        "n_group": None,
        "topk_group": None,
        "routed_scaling_factor": None,
        "routing_method_type": library.number("RoutingMethodType", ROUTED_METHOD),
        "use_routing_scales_on_input": False,
    }


def _told_experts(args: MoeArgs, count: int) -> int:
    """FP8 blocks are served for a multiple of 4 experts: the last ids are then nobody's."""
    return -(-count // 4) * 4 if isinstance(args, Fp8BlockMoeArgs) else count


def _packed(routing: Precomputed) -> Tensor:
    """(T, k) int32: the id in the high half, the weight's bfloat16 bits in the low half."""
    bits = routing.topk_weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
    return (routing.topk_ids.to(torch.int32) << 16) | bits


def tensor_arguments(args: MoeArgs, library: FlashInferLibrary) -> Arguments:
    """A call's activations and the layer's weights, under the entry point's names."""
    match args:
        case Bf16MoeArgs():
            return {
                "hidden_states": args.hidden_states.contiguous(),
                "gemm1_weights": args.gemm1_weights,
                "gemm2_weights": args.gemm2_weights,
            }
        case Fp8PerTensorMoeArgs():
            return {
                "hidden_states": args.hidden_states.contiguous(),
                "gemm1_weights": args.gemm1_weights,
                "output1_scales_scalar": args.output1_scales_scalar,
                "output1_scales_gate_scalar": args.output1_scales_gate_scalar,
                "gemm2_weights": args.gemm2_weights,
                "output2_scales_scalar": args.output2_scales_scalar,
            }
        case Fp8PerChannelMoeArgs():
            return _per_channel(args)
        case Fp8BlockMoeArgs():
            return {
                "hidden_states": args.hidden_states.contiguous(),
                "hidden_states_scale": given_scale(args).contiguous(),
                "gemm1_weights": args.gemm1_weights,
                "gemm1_weights_scale": args.gemm1_weights_scale,
                "gemm2_weights": args.gemm2_weights,
                "gemm2_weights_scale": args.gemm2_weights_scale,
                "fp8_quantization_type": library.number(
                    "Fp8QuantizationType", args.fp8_quantization_type
                ),
            }
        case Fp4MoeArgs():
            return _fp4(args, library)
        case MxInt4MoeArgs():
            return {
                "hidden_states": args.hidden_states.contiguous(),
                "gemm1_weights": args.gemm1_weights,
                "gemm1_weights_scale": args.gemm1_weights_scale,
                "gemm2_weights": args.gemm2_weights,
                "gemm2_weights_scale": args.gemm2_weights_scale,
            }
        case _:
            assert_never(args)


def _per_channel(args: Fp8PerChannelMoeArgs) -> Arguments:
    return {
        "hidden_states": args.hidden_states.contiguous(),
        "hidden_states_scale": args.hidden_states_scale.contiguous(),
        "gemm1_weights": args.gemm1_weights,
        "gemm1_per_channel_weight_scale": args.gemm1_per_channel_weight_scale,
        "output1_scale_scalar": args.output1_scale_scalar,
        "output1_scale_gate_scalar": args.output1_scale_gate_scalar,
        "gemm2_weights": args.gemm2_weights,
        "gemm2_per_channel_weight_scale": args.gemm2_per_channel_weight_scale,
        "output2_scale_scalar": args.output2_scale_scalar,
    }


def _fp4(args: Fp4MoeArgs, library: FlashInferLibrary) -> Arguments:
    """Scales go as float8_e4m3fn, the E8M0 bytes of MX formats too.

    The launcher asks for that dtype and tells the formats apart by the values per scale.
    """
    scale = args.hidden_states_scale
    return {
        "hidden_states": args.hidden_states.contiguous(),
        "hidden_states_scale": None if scale is None else _e4m3(scale),
        "hidden_states_scale_layout": None
        if scale is None
        else library.number("SfLayout", "layout_linear"),
        "gemm1_weights": args.gemm1_weights,
        "gemm1_weights_scale": _e4m3(args.gemm1_weights_scale),
        "gemm2_weights": args.gemm2_weights,
        "gemm2_weights_scale": _e4m3(args.gemm2_weights_scale),
        "output1_scale_scalar": args.output1_scale_scalar,
        "output1_scale_gate_scalar": args.output1_scale_gate_scalar,
        "output2_scale_scalar": args.output2_scale_scalar,
    }


def _e4m3(scale: Tensor) -> Tensor:
    """A view, where it is not that already: making one costs more than looking."""
    return scale if scale.dtype is torch.float8_e4m3fn else scale.view(torch.float8_e4m3fn)
