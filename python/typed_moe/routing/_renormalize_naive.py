"""Softmax over all experts, the k best, divided by their sum."""

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
class RenormalizeNaive:
    """Softmax over all experts, top-k, divided by the sum of the chosen k.

    p = softmax(logits); ids = top_k(p); weights = p[ids] / sum(p[ids]), which sum to 1.

    Models: Qwen3-MoE, Qwen3-Next, Qwen3.5-MoE (`norm_topk_prob = true`), Mixtral, MiniMax-01,
    Mistral-Large-4. The same function as `Renormalize` in exact arithmetic, and FlashInfer
    runs one kernel for both.
    Source: FlashInfer `RoutingMethodType.RenormalizeNaive`; Qwen3Moe in transformers.

    Selection is on the logits, as for `Default`.
    """

    @property
    def name(self) -> Literal["RenormalizeNaive"]:
        """The method's name."""
        return "RenormalizeNaive"

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
        """softmax over E, the k best, divided by their sum. See `RoutingStrategy.select_experts`."""
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        ids = top_k_ids(logits, shape.top_k)
        weights = torch.softmax(logits, dim=-1).gather(-1, ids)
        return routed(ids, weights / weights.sum(dim=-1, keepdim=True), usable)
