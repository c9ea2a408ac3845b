"""int4 weights with bfloat16 scales, bfloat16 activations."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor
from typing_extensions import override

from typed_moe.kernels import ExpertWeights, MxInt4MoeArgs
from typed_moe.routing import Routed
from typed_moe.runners._base import CallBuffers, expert_args, present, route
from typed_moe.runners._call import KernelCall
from typed_moe.runners._kernel_runner import KernelRunner
from typed_moe.runners._planning import Decision


@final
class MxInt4Runner(KernelRunner):
    """int4 weights with one bfloat16 scale per 32 values (`MxInt4`)."""

    def __init__(self, decision: Decision, weights: ExpertWeights) -> None:
        self._decision = decision
        self._experts = expert_args(decision, weights)
        self._call = KernelCall(decision, self._experts)
        self._w13, self._w2 = weights.w13_weight, weights.w2_weight
        self._w13_scale = present(weights.w13_scale, "w13_weight_scale")
        self._w2_scale = present(weights.w2_scale, "w2_weight_scale")

    @override
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[MxInt4MoeArgs, int]:
        inputs = route(
            self._decision, hidden_states, router_logits, e_score_correction_bias, buffers
        )
        record = MxInt4MoeArgs(
            routing=inputs.routing,
            output=buffers.output,
            experts=self._experts,
            hidden_states=inputs.hidden_states.to(torch.bfloat16),
            gemm1_weights=self._w13,
            gemm1_weights_scale=self._w13_scale,
            gemm2_weights=self._w2,
            gemm2_weights_scale=self._w2_scale,
        )
        return record, inputs.copies
