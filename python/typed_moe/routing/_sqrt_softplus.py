"""Square root of softplus plus bias, the k best, renormalised and scaled."""

from __future__ import annotations

from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing import _settings
from typed_moe.routing._biased import biased_in_kernel
from typed_moe.routing._ops import (
    SUM_EPSILON,
    check_inputs,
    float_logits,
    routed,
    score,
    sqrt_softplus,
    top_k_ids,
)
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
class SqrtSoftplus:
    """sqrt(softplus) + bias selects; the unbiased scores, renormalised, are the weights.

    s = sqrt(log(1 + exp(logits))); ids = top_k(s + bias);
    weights = routed_scaling_factor * s[ids] / (sum(s[ids]) + 1e-20).

    Attributes:
        routed_scaling_factor: the factor in the weights.
        router_logits_dtype: the least precise dtype the gate may emit; None: any.

    Models: DeepSeek-V4 beyond its hash-routed layers, Inkling-2 by setting.
    Source: DeepseekV4TopKRouter in transformers. FlashInfer's kernels do not know it.
    """

    routed_scaling_factor: float = attrs.field(default=1.0, validator=_settings.factor)
    router_logits_dtype: torch.dtype | None = None

    def __attrs_post_init__(self) -> None:
        _settings.check_logits_dtype(self.router_logits_dtype)

    @property
    def name(self) -> Literal["SqrtSoftplus"]:
        """The method's name."""
        return "SqrtSoftplus"

    @property
    def bias(self) -> BiasRule:
        """`e_score_correction_bias` is part of the maths."""
        return BiasRule.REQUIRED

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
        return biased_in_kernel(
            self.name,
            shape,
            rules,
            grouped=False,
            factor=self.routed_scaling_factor,
            correction_bias_dtype=torch.float32,
        )

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """The maths above. See `RoutingStrategy.select_experts`."""
        check_inputs(
            self.name,
            router_logits,
            e_score_correction_bias,
            shape=shape,
            bias=self.bias,
            minimum=self.router_logits_dtype,
        )
        assert e_score_correction_bias is not None  # check_inputs has refused None
        logits, usable = float_logits(router_logits)
        scores = score(sqrt_softplus, logits)
        ids = top_k_ids(scores + e_score_correction_bias.float(), shape.top_k)
        weights = scores.gather(-1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + SUM_EPSILON)
        return routed(ids, weights * self.routed_scaling_factor, usable)
