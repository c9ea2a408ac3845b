"""bfloat16 weights, and unquantised ones of other dtypes."""

from __future__ import annotations

from typing import final

from torch import Tensor
from typing_extensions import override

from typed_moe.kernels import Bf16MoeArgs, ExpertWeights
from typed_moe.routing import Routed
from typed_moe.runners._base import CallBuffers, expert_args, in_dtype, route
from typed_moe.runners._call import KernelCall
from typed_moe.runners._kernel_runner import KernelRunner
from typed_moe.runners._planning import Decision


@final
class Bf16Runner(KernelRunner):
    """bfloat16 weights, or whatever dtype an unquantised layer has."""

    def __init__(self, decision: Decision, weights: ExpertWeights) -> None:
        self._decision = decision
        self._experts = expert_args(decision, weights)
        self._call = KernelCall(decision, self._experts)
        self._w13, self._w2 = weights.w13_weight, weights.w2_weight

    @override
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[Bf16MoeArgs, int]:
        inputs = route(
            self._decision, hidden_states, router_logits, e_score_correction_bias, buffers
        )
        record = Bf16MoeArgs(
            routing=inputs.routing,
            output=buffers.output,
            experts=self._experts,
            hidden_states=in_dtype(inputs.hidden_states, self._w13.dtype),
            gemm1_weights=self._w13,
            gemm2_weights=self._w2,
        )
        return record, inputs.copies
