"""The k best logits, then the sigmoid of each."""

from __future__ import annotations

from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing._limits import plain_in_kernel
from typed_moe.routing._ops import check_inputs, float_logits, routed, top_k_ids
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
class TopKSigmoid:
    """Top-k of the logits, then sigmoid of the chosen k.

    ids = top_k(logits); weights = sigmoid(logits[ids]).

    Models: Cohere2-MoE with `expert_selection_fn = sigmoid` and `norm_topk_prob = false`.
    Source: FlashInfer `RoutingMethodType.TopKSigmoid` (0.6.18 and later).
    """

    @property
    def name(self) -> Literal["TopKSigmoid"]:
        """The method's name."""
        return "TopKSigmoid"

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
        """The k best, then sigmoid of those. See `RoutingStrategy.select_experts`."""
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        ids = top_k_ids(logits, shape.top_k)
        return routed(ids, logits.gather(-1, ids).sigmoid(), usable)
