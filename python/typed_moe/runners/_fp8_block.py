"""FP8 weights with block scales, DeepSeek style or MX."""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from typed_moe.config import Fp8BlockScale
from typed_moe.kernels import ExpertWeights, Fp8BlockMoeArgs
from typed_moe.routing import Routed
from typed_moe.runners._base import CallBuffers, expert_args, present, route
from typed_moe.runners._call import KernelCall
from typed_moe.runners._kernel_runner import KernelRunner
from typed_moe.runners._planning import Decision
from typed_moe.runners._quantizing import ActivationQuantizer


@final
class Fp8BlockRunner(KernelRunner):
    """FP8 with 128x128 block scales (`Fp8BlockScale`) or E8M0 scales per 32 values (`MxFp8`)."""

    def __init__(self, decision: Decision, weights: ExpertWeights) -> None:
        self._decision = decision
        self._quant = decision.plan.request.quant
        self._deepseek = isinstance(self._quant, Fp8BlockScale)
        self._experts = expert_args(decision, weights)
        self._w13, self._w2 = weights.w13_weight, weights.w2_weight
        self._w13_scale = present(weights.w13_scale, "w13 scales")
        self._w2_scale = present(weights.w2_scale, "w2 scales")
        self._quantized = ActivationQuantizer(decision)
        self._call = KernelCall(decision, self._experts, self._quantized.to_format)

    @override
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[Fp8BlockMoeArgs, int]:
        inputs = route(
            self._decision, hidden_states, router_logits, e_score_correction_bias, buffers
        )
        x = self._quantized(inputs.hidden_states)
        record = Fp8BlockMoeArgs(
            routing=inputs.routing,
            output=buffers.output,
            experts=self._experts,
            hidden_states=x.data,
            hidden_states_scale=x.scale.T if self._deepseek and x.scale is not None else x.scale,
            gemm1_weights=self._w13,
            gemm1_weights_scale=self._w13_scale,
            gemm2_weights=self._w2,
            gemm2_weights_scale=self._w2_scale,
            fp8_quantization_type="DeepSeekFp8" if self._deepseek else "MxFp8",
            to_format=self._quantized.to_format,
        )
        return record, inputs.copies
