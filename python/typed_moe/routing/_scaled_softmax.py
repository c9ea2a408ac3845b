"""Softmax over all experts, the k best, scaled."""

from __future__ import annotations

from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing import _settings
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
class ScaledSoftmax:
    """Softmax over all experts, top-k, optionally renormalised, scaled.

    p = softmax(logits); ids = top_k(p); weights = routed_scaling_factor * p[ids], divided
    first by their sum if norm_topk_prob. `Default` or `RenormalizeNaive` with a factor, which
    their kernels ignore.

    Attributes:
        norm_topk_prob: whether the weights are divided by their sum.
        routed_scaling_factor: the factor in the weights.

    Models: DeepSeek-V2 family with `topk_method = greedy` and a factor; Mistral-4 with one.
    Source: DeepseekV2TopkRouter in transformers. FlashInfer's kernels do not know it.
    """

    norm_topk_prob: bool = attrs.field(validator=attrs.validators.instance_of(bool))
    routed_scaling_factor: float = attrs.field(validator=_settings.factor)

    @property
    def name(self) -> Literal["ScaledSoftmax"]:
        """The method's name."""
        return "ScaledSoftmax"

    @property
    def bias(self) -> BiasRule:
        """No correction bias."""
        return BiasRule.NONE

    @property
    def router_logits_dtype(self) -> torch.dtype | None:
        """Any dtype: Mistral-4 computes its softmax in the weights' dtype."""
        return None

    @property
    def apply_router_weight_on_input(self) -> bool:
        """The weight multiplies the expert's output."""
        return False

    def scale(self, form: RoutingForm) -> Scale:
        """In the weights when routed before the call, the kernel's otherwise."""
        owner = ScaleOwner.KERNEL if form is RoutingForm.IN_KERNEL else ScaleOwner.STRATEGY
        return Scale(factor=self.routed_scaling_factor, owner=owner)

    def check(self, shape: RoutingShape) -> None:
        """Every layer is fine."""
        del shape

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        """Routed by a kernel that knows the rule; FlashInfer's do not."""
        args = plain_in_kernel(self.name, shape, rules, norm_topk_prob=self.norm_topk_prob)
        if isinstance(args, Refused):
            return args
        return attrs.evolve(args, routed_scaling_factor=self.routed_scaling_factor)

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """The maths above. See `RoutingStrategy.select_experts`."""
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        ids = top_k_ids(logits, shape.top_k)
        weights = torch.softmax(logits, dim=-1).gather(-1, ids)
        if self.norm_topk_prob:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return routed(ids, weights * self.routed_scaling_factor, usable)
