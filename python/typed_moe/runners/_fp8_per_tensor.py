"""FP8 with one scale per tensor, static for activations too."""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from typed_moe.config import is_gated
from typed_moe.kernels import ExpertWeights, Fp8PerTensorMoeArgs
from typed_moe.routing import Routed
from typed_moe.runners._base import (
    CallBuffers,
    expert_args,
    present,
    route,
    with_raw_limit,
)
from typed_moe.runners._call import KernelCall
from typed_moe.runners._kernel_runner import KernelRunner
from typed_moe.runners._output_scales import output_scales
from typed_moe.runners._planning import Decision
from typed_moe.runners._quantizing import ActivationQuantizer


@final
class Fp8PerTensorRunner(KernelRunner):
    """FP8 with one static scale per tensor."""

    def __init__(self, decision: Decision, weights: ExpertWeights) -> None:
        self._decision = decision
        self._w13, self._w2 = weights.w13_weight, weights.w2_weight
        input_scale = present(weights.w13_input_scale, "w13_input_scale")
        self._quantized = ActivationQuantizer(decision, input_scale)
        self._scales = output_scales(
            present(weights.w13_scale, "w13_weight_scale"),
            present(weights.w2_scale, "w2_weight_scale"),
            input_scale,
            present(weights.w2_input_scale, "w2_input_scale"),
            gated=is_gated(decision.plan.request.activation),
        )
        self._experts = with_raw_limit(expert_args(decision, weights), self._scales.gate)
        self._call = KernelCall(decision, self._experts, self._quantized.to_format)

    @override
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[Fp8PerTensorMoeArgs, int]:
        inputs = route(
            self._decision, hidden_states, router_logits, e_score_correction_bias, buffers
        )
        x = self._quantized(inputs.hidden_states)
        record = Fp8PerTensorMoeArgs(
            routing=inputs.routing,
            output=buffers.output,
            experts=self._experts,
            hidden_states=x.data,
            gemm1_weights=self._w13,
            output1_scales_scalar=self._scales.first,
            output1_scales_gate_scalar=self._scales.gate,
            gemm2_weights=self._w2,
            output2_scales_scalar=self._scales.second,
            to_format=self._quantized.to_format,
        )
        return record, inputs.copies
