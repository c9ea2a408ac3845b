"""Sigmoid of every logit, the k best, divided by their sum."""

from __future__ import annotations

from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing._limits import plain_in_kernel
from typed_moe.routing._ops import SUM_EPSILON, check_inputs, float_logits, routed, score, top_k_ids
from typed_moe.routing._records import (
    BiasRule,
    InKernel,
    KernelRules,
    Refused,
    Routed,
    RoutingForm,
    RoutingShape,
    Scale,
    ScaleOwner,
)


@final
@attrs.frozen(kw_only=True)
class SigmoidRenorm:
    """Sigmoid, top-k of the sigmoids, divided by the sum of the chosen k.

    s = sigmoid(logits); ids = top_k(s); weights = s[ids] / max(sum(s[ids]), 1e-20).

    Without the division the method is `Sigmoid`. It has no scale: FlashInfer ignores one here.

    Models: Cohere2-MoE with `expert_selection_fn = sigmoid`, Flint.
    Source: FlashInfer `RoutingMethodType.SigmoidRenorm`.
    """

    @property
    def name(self) -> Literal["SigmoidRenorm"]:
        """The method's name."""
        return "SigmoidRenorm"

    @property
    def bias(self) -> BiasRule:
        """No correction bias."""
        return BiasRule.NONE

    @property
    def router_logits_dtype(self) -> torch.dtype | None:
        """Any dtype: the published models run this gate in the weights' dtype."""
        return None

    @property
    def apply_router_weight_on_input(self) -> bool:
        """The weight multiplies the expert's output."""
        return False

    def scale(self, form: RoutingForm) -> Scale:
        """No factor of its own."""
        del form
        return Scale(factor=1.0, owner=ScaleOwner.HOST)

    def check(self, shape: RoutingShape) -> None:
        """Every layer is fine."""
        del shape

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        """Routed by the kernel, told to divide: the one method that reads `norm_topk_prob`."""
        return plain_in_kernel(self.name, shape, rules, norm_topk_prob=True)

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """sigmoid, the k best, divided by their sum. See `RoutingStrategy.select_experts`."""
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        scores = score(torch.sigmoid, logits)
        ids = top_k_ids(scores, shape.top_k)
        weights = scores.gather(-1, ids)
        total = weights.sum(dim=-1, keepdim=True).clamp_min(SUM_EPSILON)
        return routed(ids, weights / total, usable)
