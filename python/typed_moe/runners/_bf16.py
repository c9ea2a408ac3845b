"""Unquantised weights."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from typed_moe.kernels import Bf16MoeArgs, ExpertArgs
from typed_moe.runners._base import ExpertWeights, route, run, with_biases
from typed_moe.runners._planning import Decision


@final
@attrs.frozen(kw_only=True, eq=False)
class Bf16Runner:
    """bfloat16 weights, or whatever dtype an unquantised layer has.

    Attributes:
        decision: the plan, with the strategy and the kernel.
        experts: the arguments that no call changes.
    """

    decision: Decision
    experts: ExpertArgs

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        weights: ExpertWeights,
    ) -> Tensor:
        """See `MoeRunner`."""
        inputs = route(self.decision, hidden_states, router_logits, e_score_correction_bias)
        x = inputs.hidden_states.to(weights.w13_weight.dtype)
        args = Bf16MoeArgs(
            routing=inputs.routing,
            experts=with_biases(self.experts, weights),
            hidden_states=x,
            gemm1_weights=weights.w13_weight,
            gemm2_weights=weights.w2_weight,
        )
        return run(self.decision, args, inputs, hidden_states.dtype)
