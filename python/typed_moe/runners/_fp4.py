"""FP4 weights: NVFP4 and MXFP4."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.config import is_gated
from typed_moe.kernels import ExpertArgs, Fp4MoeArgs
from typed_moe.quantization import quantize_activation
from typed_moe.runners._base import ExpertWeights, present, route, run, with_biases
from typed_moe.runners._planning import Decision


@final
@attrs.frozen(kw_only=True, eq=False)
class Fp4Runner:
    """E2M1 weights: NVFP4 on both operands, or MXFP4 with bfloat16 or MXFP8 activations.

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
        quant = self.decision.plan.request.quant
        x = quantize_activation(inputs.hidden_states, quant, input_scale=weights.w13_input_scale)
        first, gate, second = self._output_scales(weights)
        args = Fp4MoeArgs(
            routing=inputs.routing,
            experts=with_biases(self.experts, weights),
            hidden_states=x.data,
            hidden_states_scale=x.scale,
            gemm1_weights=weights.w13_weight,
            gemm1_weights_scale=present(weights.w13_scale, "w13_weight_scale"),
            gemm2_weights=weights.w2_weight,
            gemm2_weights_scale=present(weights.w2_scale, "w2_weight_scale"),
            output1_scale_scalar=first,
            output1_scale_gate_scalar=gate,
            output2_scale_scalar=second,
        )
        return run(self.decision, args, inputs, hidden_states.dtype)

    def _output_scales(
        self, weights: ExpertWeights
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The three output scales of NVFP4; MXFP4 has none."""
        if weights.w13_scale_2 is None or weights.w2_scale_2 is None:
            return None, None, None
        x_scale = present(weights.w13_input_scale, "w13_input_scale")
        h_scale = present(weights.w2_input_scale, "w2_input_scale")
        gate = weights.w13_scale_2 * x_scale
        gated = is_gated(self.decision.plan.request.activation)
        first = (gate if gated else torch.ones_like(gate)) / h_scale
        return first, gate, weights.w2_scale_2 * h_scale
