"""FP4 weights: NVFP4 and MXFP4."""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from typed_moe.config import is_gated
from typed_moe.kernels import ExpertWeights, Fp4MoeArgs
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
from typed_moe.runners._output_scales import OutputScales, output_scales
from typed_moe.runners._planning import Decision
from typed_moe.runners._quantizing import ActivationQuantizer


@final
class Fp4Runner(KernelRunner):
    """E2M1 weights: NVFP4 on both operands, or MXFP4 with bfloat16 or MXFP8 activations."""

    def __init__(self, decision: Decision, weights: ExpertWeights) -> None:
        self._decision = decision
        self._scales = _scales(decision, weights)
        gate = None if self._scales is None else self._scales.gate
        self._experts = with_raw_limit(expert_args(decision, weights), gate)
        self._w13, self._w2 = weights.w13_weight, weights.w2_weight
        self._w13_scale = present(weights.w13_scale, "w13_weight_scale")
        self._w2_scale = present(weights.w2_scale, "w2_weight_scale")
        self._quantized = ActivationQuantizer(decision, weights.w13_input_scale)
        self._call = KernelCall(decision, self._experts, self._quantized.to_format)

    @override
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[Fp4MoeArgs, int]:
        inputs = route(
            self._decision, hidden_states, router_logits, e_score_correction_bias, buffers
        )
        x = self._quantized(inputs.hidden_states)
        scales = self._scales
        record = Fp4MoeArgs(
            routing=inputs.routing,
            output=buffers.output,
            experts=self._experts,
            hidden_states=x.data,
            hidden_states_scale=x.scale,
            gemm1_weights=self._w13,
            gemm1_weights_scale=self._w13_scale,
            gemm2_weights=self._w2,
            gemm2_weights_scale=self._w2_scale,
            output1_scale_scalar=None if scales is None else scales.first,
            output1_scale_gate_scalar=None if scales is None else scales.gate,
            output2_scale_scalar=None if scales is None else scales.second,
            to_format=self._quantized.to_format,
        )
        return record, inputs.copies


def _scales(decision: Decision, weights: ExpertWeights) -> OutputScales | None:
    """The output scales of NVFP4; MXFP4 has none."""
    if weights.w13_scale_2 is None or weights.w2_scale_2 is None:
        return None
    return output_scales(
        weights.w13_scale_2,
        weights.w2_scale_2,
        present(weights.w13_input_scale, "w13_input_scale"),
        present(weights.w2_input_scale, "w2_input_scale"),
        gated=is_gated(decision.plan.request.activation),
    )
