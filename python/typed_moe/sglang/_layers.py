"""One of SGLang's layers, with its weights as SGLang has prepared them, as a request of ours."""

from __future__ import annotations

from typing import final

import attrs
import torch

from typed_moe.config import (
    Activation,
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    Geglu,
    MxFp4,
    MxFp8,
    Nvfp4,
    Placement,
    Relu2,
    Swiglu,
)
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import ExpertWeights, KernelRequest
from typed_moe.routing import RoutingShape
from typed_moe.sglang._protocols import (
    Bf16InfoLike,
    DispatchLike,
    Fp4InfoLike,
    Fp8InfoLike,
    LayerLike,
    MxFp4InfoLike,
    QuantInfoLike,
    RunnerConfigLike,
)


@final
@attrs.frozen(kw_only=True, eq=False)
class SglangExperts:
    """A layer's experts.

    Attributes:
        request: shape, format and place.
        weights: SGLang's tensors, which are in FlashInfer's layout already.
    """

    request: KernelRequest
    weights: ExpertWeights


@final
@attrs.frozen(kw_only=True, eq=False)
class _Widths:
    """What the payloads name differently."""

    quant: Format
    local_num_experts: int
    intermediate_size: int
    has_bias: bool = False
    activation: Activation | None = None


def read_fp8(
    info: Fp8InfoLike, config: RunnerConfigLike, dispatch: DispatchLike, top_k: int
) -> SglangExperts:
    """FP8 in blocks, in MX groups, or per tensor."""
    if info.block_quant:
        quant: Format = MxFp8() if info.use_mxfp8 else Fp8BlockScale()
        weights = ExpertWeights(
            w13_weight=info.w13_weight,
            w2_weight=info.w2_weight,
            w13_scale=info.w13_weight_scale_inv,
            w2_scale=info.w2_weight_scale_inv,
        )
    else:
        quant = Fp8PerTensor()
        weights = _per_tensor(info)
    widths = _Widths(
        quant=quant,
        local_num_experts=info.local_num_experts,
        intermediate_size=info.intermediate_size,
    )
    return _experts(info, config, dispatch, top_k, widths, weights)


def _per_tensor(info: Fp8InfoLike) -> ExpertWeights:
    """The scales that SGLang has multiplied into one another, taken apart.

    gate = w13 * x, first = gate / h, second = w2 * h. Without a gate `first` is 1 / h.
    """
    x, gate = info.w13_input_scale, info.output1_scales_gate_scalar
    first, second = info.output1_scales_scalar, info.output2_scales_scalar
    assert x is not None, "per-tensor FP8 has it"
    assert gate is not None, "per-tensor FP8 has it"
    assert first is not None, "per-tensor FP8 has it"
    assert second is not None, "per-tensor FP8 has it"
    gated = info.w13_weight.shape[1] == 2 * info.w2_weight.shape[2]
    intermediate = gate / first if gated else 1.0 / first
    return ExpertWeights(
        w13_weight=info.w13_weight,
        w2_weight=info.w2_weight,
        w13_scale=gate / x,
        w2_scale=second / intermediate,
        w13_input_scale=x,
        w2_input_scale=intermediate,
    )


def read_fp4(
    info: Fp4InfoLike, config: RunnerConfigLike, dispatch: DispatchLike, top_k: int
) -> SglangExperts:
    """NVFP4. Raises: UnsupportedRouting, for activations that are quantised otherwise."""
    if info.use_per_token_activation:
        raise UnsupportedRouting("NVFP4 activations with a scale per token are not made here")
    if info.padded_hidden_size is not None:
        raise UnsupportedRouting(
            f"the weights are padded to a hidden size of {info.padded_hidden_size}; only unpadded "
            "NVFP4 weights are read here"
        )
    x = 1.0 / info.w13_input_scale_quant
    gated = info.w13_weight.shape[1] == 4 * info.w2_weight.shape[2]
    intermediate = info.g1_alphas / info.g1_scale_c if gated else 1.0 / info.g1_scale_c
    weights = ExpertWeights(
        w13_weight=info.w13_weight,
        w2_weight=info.w2_weight,
        w13_scale=info.w13_weight_scale,
        w2_scale=info.w2_weight_scale,
        w13_scale_2=info.g1_alphas / x,
        w2_scale_2=info.g2_alphas / intermediate,
        w13_input_scale=x,
        w2_input_scale=intermediate,
    )
    widths = _Widths(
        quant=Nvfp4(),
        local_num_experts=info.local_num_experts,
        intermediate_size=info.intermediate_size_per_partition,
    )
    return _experts(info, config, dispatch, top_k, widths, weights)


def read_mxfp4(
    info: MxFp4InfoLike, config: RunnerConfigLike, dispatch: DispatchLike, top_k: int
) -> SglangExperts:
    """MXFP4 with bfloat16 or MXFP8 activations."""
    bf16 = info.flashinfer_mxfp4_moe_precision == "bf16"
    weights = ExpertWeights(
        w13_weight=info.w13_weight,
        w2_weight=info.w2_weight,
        w13_scale=info.w13_weight_scale,
        w2_scale=info.w2_weight_scale,
        w13_bias=info.w13_weight_bias,
        w2_bias=info.w2_weight_bias,
    )
    widths = _Widths(
        quant=MxFp4(activation="bf16" if bf16 else "mxfp8"),
        local_num_experts=info.local_num_experts,
        intermediate_size=info.intermediate_size_per_partition,
        has_bias=True,
        # The quantisation method fills these in for gpt-oss; the runner config has no beta.
        activation=Swiglu(
            alpha=info.gemm1_alpha[0].item(),
            beta=info.gemm1_beta[0].item(),
            limit=info.gemm1_clamp_limit[0].item(),
        ),
    )
    return _experts(info, config, dispatch, top_k, widths, weights)


def read_bf16(
    info: Bf16InfoLike, config: RunnerConfigLike, dispatch: DispatchLike, top_k: int
) -> SglangExperts:
    """bfloat16 weights."""
    weights = ExpertWeights(w13_weight=info.gemm1_weights, w2_weight=info.gemm2_weights)
    layer = layer_of(config)
    widths = _Widths(
        quant=Bf16(),
        local_num_experts=info.gemm1_weights.shape[0],
        intermediate_size=layer.intermediate_size_per_partition,
    )
    return _experts(info, config, dispatch, top_k, widths, weights)


def layer_of(config: RunnerConfigLike) -> LayerLike:
    """The layer that a runner config belongs to.

    Raises:
        UnsupportedRouting: it names none.
    """
    if config.layer is None:
        raise UnsupportedRouting("the runner config has no layer, so its ranks are not known")
    return config.layer


def _experts(
    info: QuantInfoLike,
    config: RunnerConfigLike,
    dispatch: DispatchLike,
    top_k: int,
    widths: _Widths,
    weights: ExpertWeights,
) -> SglangExperts:
    layer = layer_of(config)
    refuse_shared_experts(config)
    if dispatch.hidden_states_scale is not None:
        raise UnsupportedRouting(
            f"activations arrive as {dispatch.hidden_states.dtype}, quantised by the dispatcher; only "
            "those that the layer quantises are read here"
        )
    placement = _placement(layer)
    held = placement.num_local_experts(info.global_num_experts)
    if (held, placement.local_expert_offset(info.global_num_experts)) != (
        widths.local_num_experts,
        info.local_expert_offset,
    ):
        raise UnsupportedRouting(
            f"this rank holds {widths.local_num_experts} experts from {info.local_expert_offset} "
            f"on; rank {layer.moe_ep_rank} of {layer.moe_ep_size} would hold {held} of "
            f"{info.global_num_experts} in order"
        )
    return SglangExperts(
        request=KernelRequest(
            shape=RoutingShape(num_experts=info.global_num_experts, top_k=top_k),
            quant=widths.quant,
            activation=widths.activation or activation_of(config),
            placement=placement,
            hidden_size=dispatch.hidden_states.shape[1],
            intermediate_size=widths.intermediate_size * placement.tp_size,
            num_fused_shared_experts=0,
            has_bias=widths.has_bias,
            device=dispatch.hidden_states.device,
            dtype=torch.bfloat16,
        ),
        weights=weights,
    )


def refuse_shared_experts(config: RunnerConfigLike) -> None:
    """Refuse a layer with shared experts in it.

    Raises:
        UnsupportedRouting: there are some.
    """
    if config.num_fused_shared_experts:
        raise UnsupportedRouting(
            f"{config.num_fused_shared_experts} shared experts are fused into SGLang's layer; only "
            "layers without are read here (--disable-shared-experts-fusion)"
        )


def _placement(layer: LayerLike) -> Placement:
    return Placement(
        tp_size=layer.moe_tp_size,
        tp_rank=layer.moe_tp_rank,
        ep_size=layer.moe_ep_size,
        ep_rank=layer.moe_ep_rank,
    )


def placement_of(layer: LayerLike) -> Placement:
    """Which part of the experts a rank's layer holds.

    Raises:
        UnsupportedRouting: not its even share.
    """
    placement = _placement(layer)
    held = placement.num_local_experts(layer.num_experts)
    if held != layer.num_local_experts:
        raise UnsupportedRouting(
            f"this rank holds {layer.num_local_experts} experts; rank {layer.moe_ep_rank} of "
            f"{layer.moe_ep_size} would hold {held} of {layer.num_experts}"
        )
    return placement


def activation_of(config: RunnerConfigLike) -> Activation:
    """A runner config's activation.

    Raises:
        UnsupportedRouting: one that is not read here.
    """
    match config.activation, config.is_gated:
        case "silu", True:
            limit = config.gemm1_clamp_limit
            return Swiglu(
                alpha=1.0 if config.gemm1_alpha is None else config.gemm1_alpha,
                beta=0.0 if config.gemm1_beta is None else config.gemm1_beta,
                limit=config.swiglu_limit if limit is None else limit,
            )
        case "gelu", True:
            return Geglu()
        case "relu2", False:
            return Relu2()
        case name, gated:
            raise UnsupportedRouting(
                f"activation {name!r} {'with' if gated else 'without'} a gate; read here are silu "
                "and gelu with one, and relu2 without"
            )
