"""The best expert alone, weighted by its sigmoid on the expert's input."""

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
class Llama4:
    """Top-1 of the logits; its sigmoid multiplies the expert's input.

    ids = argmax(logits); weight = sigmoid(logits[ids]); output = expert(weight * x).

    An expert is not linear, so expert(weight * x) is not weight * expert(x). The maths is
    defined for top_k = 1 alone.

    Models: Llama 4 Scout and Maverick.
    Source: FlashInfer `RoutingMethodType.Llama4`; Llama4TextMoe in transformers.
    """

    @property
    def name(self) -> Literal["Llama4"]:
        """The method's name."""
        return "Llama4"

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
        """The weight multiplies the expert's input."""
        return True

    def scale(self, form: RoutingForm) -> Scale:
        """No factor of its own."""
        del form
        return Scale(factor=1.0, owner=ScaleOwner.HOST)

    def check(self, shape: RoutingShape) -> None:
        """Refuse top_k other than 1.

        Raises:
            ValueError: with the number.
        """
        if shape.top_k != 1:
            raise ValueError(
                f"Llama4 routes to one expert and top_k is {shape.top_k}; allowed: 1. For several "
                "experts weighted on the input write a strategy with "
                "apply_router_weight_on_input = True"
            )

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        """Routed by a kernel that can put the weight on the input; others would put it last."""
        if not rules.weight_on_input:
            return Refused(
                f"{rules.kernel} multiplies the expert's output by the weight; Llama4's belongs "
                "on the input"
            )
        args = plain_in_kernel(self.name, shape, rules)
        if isinstance(args, Refused):
            return args
        return attrs.evolve(args, use_routing_scales_on_input=True)

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """The best, then its sigmoid. See `RoutingStrategy.select_experts`."""
        self.check(shape)
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        ids = top_k_ids(logits, shape.top_k)
        return routed(ids, logits.gather(-1, ids).sigmoid(), usable)
