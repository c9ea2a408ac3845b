"""The k best logits, then a softmax over those."""

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
class Renormalize:
    """Top-k of the logits, then softmax over the chosen k.

    ids = top_k(logits); weights = softmax(logits[ids]), which sum to 1.

    Models: gpt-oss, Granite-MoE, Aria, JetMoE, Cohere2-MoE (`expert_selection_fn = softmax`).
    The same function as `RenormalizeNaive` in exact arithmetic.
    Source: FlashInfer `RoutingMethodType.Renormalize`; GptOss in transformers.
    """

    @property
    def name(self) -> Literal["Renormalize"]:
        """The method's name."""
        return "Renormalize"

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
        """The k best, then softmax over those. See `RoutingStrategy.select_experts`."""
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        ids = top_k_ids(logits, shape.top_k)
        return routed(ids, torch.softmax(logits.gather(-1, ids), dim=-1), usable)
