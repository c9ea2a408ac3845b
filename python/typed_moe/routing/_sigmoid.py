"""Sigmoid of every logit, then the k best."""

from __future__ import annotations

from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing._limits import plain_in_kernel
from typed_moe.routing._ops import check_inputs, float_logits, routed, score, top_k_ids
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
class Sigmoid:
    """Sigmoid, then top-k of the sigmoids, weights as they are.

    s = sigmoid(logits) in float32; ids = top_k(s); weights = s[ids].

    Differs from `TopKSigmoid` only where float32's sigmoid saturates (logits above about 17):
    saturated experts tie, and ties go to the lower id.

    Models: Flint with `norm_topk_prob = false`.
    Source: FlashInfer `RoutingMethodType.Sigmoid`.
    """

    @property
    def name(self) -> Literal["Sigmoid"]:
        """The method's name."""
        return "Sigmoid"

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
        """Routed by the kernel where it was compiled for this size."""
        return plain_in_kernel(self.name, shape, rules)

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """sigmoid, then the k best. See `RoutingStrategy.select_experts`."""
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        scores = score(torch.sigmoid, logits)
        ids = top_k_ids(scores, shape.top_k)
        return routed(ids, scores.gather(-1, ids), usable)
