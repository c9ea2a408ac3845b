"""FP8 weights with one scale per output row, activations with one per token."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from typed_moe.kernels import ExpertWeights, Fp8PerChannelMoeArgs
from typed_moe.quantization import quantize_activation
from typed_moe.routing import Routed
from typed_moe.runners._base import CallBuffers, expert_args, present, route
from typed_moe.runners._call import KernelCall
from typed_moe.runners._kernel_runner import KernelRunner
from typed_moe.runners._planning import Decision


@final
class Fp8PerChannelRunner(KernelRunner):
    """FP8 with a scale per output row, and dynamic scales per token."""

    def __init__(self, decision: Decision, weights: ExpertWeights) -> None:
        self._decision = decision
        self._quant = decision.plan.request.quant
        self._experts = expert_args(decision, weights)
        self._call = KernelCall(decision, self._experts)
        self._w13, self._w2 = weights.w13_weight, weights.w2_weight
        self._w13_scale = present(weights.w13_scale, "w13_weight_scale")
        self._w2_scale = present(weights.w2_scale, "w2_weight_scale")
        # The scales of rows and tokens say everything.
        self._one = torch.ones(self._w13.shape[0], dtype=torch.float32, device=self._w13.device)

    @override
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[Fp8PerChannelMoeArgs, int]:
        inputs = route(
            self._decision, hidden_states, router_logits, e_score_correction_bias, buffers
        )
        x = quantize_activation(inputs.hidden_states, self._quant)
        record = Fp8PerChannelMoeArgs(
            routing=inputs.routing,
            output=buffers.output,
            experts=self._experts,
            hidden_states=x.data,
            hidden_states_scale=present(x.scale, "activation scales"),
            gemm1_weights=self._w13,
            gemm1_per_channel_weight_scale=self._w13_scale,
            output1_scale_scalar=self._one,
            output1_scale_gate_scalar=self._one,
            gemm2_weights=self._w2,
            gemm2_per_channel_weight_scale=self._w2_scale,
            output2_scale_scalar=self._one,
        )
        return record, inputs.copies
