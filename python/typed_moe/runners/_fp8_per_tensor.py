"""FP8 weights with one scale per matrix, FP8 activations with a static scale."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.config import Fp8PerTensor, is_gated
from typed_moe.kernels import ExpertArgs, Fp8PerTensorMoeArgs
from typed_moe.quantization import quantize_activation
from typed_moe.runners._base import ExpertWeights, present, route, run, with_biases
from typed_moe.runners._planning import Decision


@final
@attrs.frozen(kw_only=True, eq=False)
class Fp8PerTensorRunner:
    """FP8 with one static scale per tensor.

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
        x_scale = present(weights.w13_input_scale, "w13_input_scale")
        h_scale = present(weights.w2_input_scale, "w2_input_scale")
        first = present(weights.w13_scale, "w13_weight_scale") * x_scale
        gated = is_gated(self.decision.plan.request.activation)
        x = quantize_activation(inputs.hidden_states, Fp8PerTensor(), input_scale=x_scale)
        args = Fp8PerTensorMoeArgs(
            routing=inputs.routing,
            experts=with_biases(self.experts, weights),
            hidden_states=x.data,
            gemm1_weights=weights.w13_weight,
            output1_scales_scalar=(first if gated else torch.ones_like(first)) / h_scale,
            output1_scales_gate_scalar=first,
            gemm2_weights=weights.w2_weight,
            output2_scales_scalar=present(weights.w2_scale, "w2_weight_scale") * h_scale,
        )
        return run(self.decision, args, inputs, hidden_states.dtype)
