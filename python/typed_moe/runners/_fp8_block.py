"""FP8 weights with block scales, DeepSeek style or MX."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor

from typed_moe.config import Fp8BlockScale
from typed_moe.kernels import ExpertArgs, Fp8BlockMoeArgs
from typed_moe.quantization import quantize_activation
from typed_moe.runners._base import ExpertWeights, present, route, run, with_biases
from typed_moe.runners._planning import Decision


@final
@attrs.frozen(kw_only=True, eq=False)
class Fp8BlockRunner:
    """FP8 with 128x128 block scales (`Fp8BlockScale`) or E8M0 scales per 32 values (`MxFp8`).

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
        deepseek = isinstance(quant, Fp8BlockScale)
        x = quantize_activation(inputs.hidden_states, quant)
        x_scale = present(x.scale, "activation scales")
        args = Fp8BlockMoeArgs(
            routing=inputs.routing,
            experts=with_biases(self.experts, weights),
            hidden_states=x.data,
            hidden_states_scale=x_scale.T if deepseek else x_scale,
            gemm1_weights=weights.w13_weight,
            gemm1_weights_scale=present(weights.w13_scale, "w13 scales"),
            gemm2_weights=weights.w2_weight,
            gemm2_weights_scale=present(weights.w2_scale, "w2 scales"),
            fp8_quantization_type="DeepSeekFp8" if deepseek else "MxFp8",
        )
        return run(self.decision, args, inputs, hidden_states.dtype)
