"""Layers of SGLang's own classes, small, with weights that its quantisation methods have prepared."""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor

HIDDEN, WIDTH = 256, 128
Quant = Literal["fp8_block", "bf16", "fp8_per_tensor", "nvfp4", "mxfp4"]
"""FP4 weights are not prepared off a GPU: those layers are bfloat16, and `Fp4Block` calls for them."""


@attrs.frozen(kw_only=True)
class Block:
    """A TopK and the experts that it routes to, as a model's block builds them.

    Attributes:
        method: the member of SGLang's RoutingMethodType that the model passes.
        biased: there is a correction bias.
        scale_in_topk: what the model passes as `apply_routed_scaling_factor_on_output`; None: what
            the layer asks for.
    """

    num_experts: int = 8
    top_k: int = 2
    method: str | None
    renormalize: bool = True
    scoring_func: str = "softmax"
    groups: int | None = None
    kept: int | None = None
    biased: bool = False
    factor: float | None = None
    scale_in_topk: bool | None = None
    quant: Quant = "fp8_block"
    custom: Literal["llama4"] | None = None


class SglangBlock:
    """SGLang's TopK and FusedMoE, bound to each other as its models do it."""

    def __init__(self, block: Block, layer_id: int = 0) -> None:
        from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
        from sglang.srt.layers.moe.topk import TopK
        from sglang.srt.layers.moe.utils import RoutingMethodType

        self.block = block
        payloads = {"nvfp4": _nvfp4_info, "mxfp4": _mxfp4_info}
        self._info = payloads[block.quant](block) if block.quant in payloads else None
        self.bias = torch.randn(block.num_experts) * 0.3 if block.biased else None
        self.experts = FusedMoE(
            num_experts=block.num_experts,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            layer_id=layer_id,
            top_k=block.top_k,
            params_dtype=torch.bfloat16,
            quant_config=_quant_config(block.quant),
            routed_scaling_factor=block.factor,
            routing_method_type=None if block.method is None else RoutingMethodType[block.method],
            apply_router_weight_on_input=block.custom == "llama4",
            prefix=f"model.layers.{layer_id}.mlp.experts",
        )
        fuse = self.experts.should_fuse_routed_scaling_factor_in_topk
        self.topk = TopK(
            block.top_k,
            layer_id=layer_id,
            use_grouped_topk=block.groups is not None,
            num_expert_group=block.groups,
            topk_group=block.kept,
            renormalize=block.renormalize,
            scoring_func=block.scoring_func,
            custom_routing_function=_custom(block),
            correction_bias=self.bias,
            routed_scaling_factor=block.factor,
            apply_routed_scaling_factor_on_output=(
                fuse if block.scale_in_topk is None else block.scale_in_topk
            ),
        )
        _fill(self.experts)
        self.experts.quant_method.process_weights_after_loading(self.experts)
        self.topk.bind_runner_backend(
            self._backend(block), routing_method_type=self.experts.routing_method_type
        )
        # Off CUDA a TopK always routes by itself; this is what it does there.
        bypassed = self.topk.topk_config.output_format.name == "BYPASSED"
        self.topk._forward_method = self.topk.forward_cuda if bypassed else self.topk.forward_native
        if _quant_config(block.quant) is None:
            self.experts.quant_method._forward_method = self.experts.quant_method.forward_cuda

    def _backend(self, block: Block) -> object:
        from sglang.srt.layers.moe.utils import MoeRunnerBackend

        return (
            MoeRunnerBackend.FLASHINFER_MXFP4
            if block.quant == "mxfp4"
            else self.experts.runner_backend
        )

    def __call__(self, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        if self._info is not None:
            return self._call(hidden_states, router_logits, self._info)
        output: Tensor = self.experts(hidden_states, self.topk(hidden_states, router_logits))
        return output

    def _call(self, hidden_states: Tensor, router_logits: Tensor, info: object) -> Tensor:
        """What a quantisation method's `apply` does: dispatch, and the backend's function."""
        import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm as trtllm
        from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput

        topk = self.topk(hidden_states, router_logits)
        dispatch = StandardDispatchOutput(
            hidden_states=hidden_states, hidden_states_scale=None, topk_output=topk
        )
        function = (
            trtllm.fused_experts_none_to_flashinfer_trtllm_fp4
            if self.block.quant == "nvfp4"
            else trtllm._fused_experts_flashinfer_mxfp4_sm100_trtllm_gen
        )
        output: Tensor = function(dispatch, info, self.experts.moe_runner_config).hidden_states
        return output


def _nvfp4_info(block: Block) -> object:
    import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm as trtllm

    experts = block.num_experts
    per_expert = torch.full((experts,), 0.02)
    return trtllm.FlashInferTrtllmFp4MoeQuantInfo(
        w13_weight=torch.zeros(experts, 2 * WIDTH, HIDDEN // 2, dtype=torch.uint8),
        w2_weight=torch.zeros(experts, HIDDEN, WIDTH // 2, dtype=torch.uint8),
        w13_weight_scale=torch.zeros(experts, 2 * WIDTH, HIDDEN // 16, dtype=torch.uint8),
        w2_weight_scale=torch.zeros(experts, HIDDEN, WIDTH // 16, dtype=torch.uint8),
        g1_scale_c=per_expert,
        g1_alphas=per_expert / 2,
        g2_alphas=per_expert / 3,
        w13_input_scale_quant=torch.tensor(50.0),
        global_num_experts=experts,
        local_expert_offset=0,
        local_num_experts=experts,
        intermediate_size_per_partition=WIDTH,
        routing_method_type=_number(block),
    )


def _number(block: Block) -> int:
    from sglang.srt.layers.moe.utils import RoutingMethodType

    assert block.method is not None
    return int(RoutingMethodType[block.method])


def _mxfp4_info(block: Block) -> object:
    import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm as trtllm

    experts = block.num_experts
    return trtllm.FlashInferTrtllmGenMxfp4MoeQuantInfo(
        w13_weight=torch.zeros(experts, 2 * WIDTH, HIDDEN // 2, dtype=torch.uint8),
        w2_weight=torch.zeros(experts, HIDDEN, WIDTH // 2, dtype=torch.uint8),
        w13_weight_scale=torch.zeros(experts, 2 * WIDTH, HIDDEN // 32, dtype=torch.float8_e4m3fn),
        w2_weight_scale=torch.zeros(experts, HIDDEN, WIDTH // 32, dtype=torch.float8_e4m3fn),
        w13_weight_bias=torch.zeros(experts, 2 * WIDTH),
        w2_weight_bias=torch.zeros(experts, HIDDEN),
        gemm1_alpha=torch.full((experts,), 1.702),
        gemm1_beta=torch.full((experts,), 1.0),
        gemm1_clamp_limit=torch.full((experts,), 7.0),
        global_num_experts=experts,
        local_expert_offset=0,
        local_num_experts=experts,
        intermediate_size_per_partition=WIDTH,
        hidden_size=HIDDEN,
        flashinfer_mxfp4_moe_precision="bf16",
    )


def _custom(block: Block) -> object:
    if block.custom is None:
        return None
    from sglang.srt.models.llama4 import Llama4MoE

    return Llama4MoE.custom_routing_function


def _quant_config(quant: Quant) -> object:
    if quant not in {"fp8_block", "fp8_per_tensor"}:
        return None
    if quant == "fp8_block":
        from sglang.srt.layers.quantization.fp8 import Fp8Config

        return Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=[128, 128],
        )
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config

    return ModelOptFp8Config(is_checkpoint_fp8_serialized=True)


def _fill(experts: torch.nn.Module) -> None:
    """Finite weights and scales; what the values are is no matter to these tests."""
    for name, parameter in experts.named_parameters():
        if parameter.element_size() == 1:
            parameter.data.view(torch.uint8).random_(0, 100)
        elif "scale" in name:
            parameter.data.uniform_(0.01, 0.02)
        else:
            parameter.data.normal_(std=0.05)
