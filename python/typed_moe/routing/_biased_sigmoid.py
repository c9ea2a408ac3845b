"""Sigmoid plus bias, the best groups, the k best, scaled but not renormalised."""

from __future__ import annotations

from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing import _settings
from typed_moe.routing._biased import biased_in_kernel, grouped_refusal
from typed_moe.routing._groups import (
    check_group_pair,
    check_group_shape,
    group_count,
    normal_group,
)
from typed_moe.routing._ops import (
    check_inputs,
    float_logits,
    keep_best_groups,
    routed,
    score,
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
class BiasedSigmoid:
    """Sigmoid + bias selects; the unbiased sigmoids, not renormalised, are the weights.

    `DeepSeekV3` without the division: c = sigmoid(logits) + bias; experts outside the
    topk_group best groups (by the sum of their two best c) get -inf; ids = top_k(c);
    weights = routed_scaling_factor * sigmoid(logits)[ids].

    Attributes:
        num_expert_group: groups the experts are divided into; None, 0 and 1 mean no groups.
        topk_group: groups that are kept.
        routed_scaling_factor: the factor in the weights.
        router_logits_dtype: the least precise dtype the gate may emit; None: any.

    Models: dots.llm1, and any of the DeepSeek-V3 family with `norm_topk_prob = false`.
    Source: Dots1TopkRouter in transformers. FlashInfer's kernels do not know it: its DeepSeekV3
    always divides.
    """

    num_expert_group: int = attrs.field(default=1, converter=normal_group, validator=group_count)
    topk_group: int = attrs.field(default=1, converter=normal_group, validator=group_count)
    routed_scaling_factor: float = attrs.field(default=1.0, validator=_settings.factor)
    router_logits_dtype: torch.dtype | None = torch.float32

    def __attrs_post_init__(self) -> None:
        check_group_pair(self.num_expert_group, self.topk_group)
        _settings.check_logits_dtype(self.router_logits_dtype)

    @property
    def name(self) -> Literal["BiasedSigmoid"]:
        """The method's name."""
        return "BiasedSigmoid"

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
        """Refuse experts that do not divide into the groups. Raises: ValueError."""
        check_group_shape(
            shape, num_expert_group=self.num_expert_group, topk_group=self.topk_group, least=2
        )

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        """Routed by a kernel that knows the rule; FlashInfer's do not."""
        refused = grouped_refusal(
            self.name,
            shape,
            rules,
            num_expert_group=self.num_expert_group,
            topk_group=self.topk_group,
        )
        if refused is not None:
            return refused
        args = biased_in_kernel(
            self.name,
            shape,
            rules,
            grouped=self.num_expert_group > 1,
            factor=self.routed_scaling_factor,
            correction_bias_dtype=torch.float32,
        )
        if isinstance(args, Refused):
            return args
        return attrs.evolve(args, n_group=self.num_expert_group, topk_group=self.topk_group)

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """The maths above. See `RoutingStrategy.select_experts`."""
        self.check(shape)
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
        scores = score(torch.sigmoid, logits)
        biased = keep_best_groups(
            scores + e_score_correction_bias.float(),
            num_expert_group=self.num_expert_group,
            topk_group=self.topk_group,
            group_score="top2_sum",
        )
        ids = top_k_ids(biased, shape.top_k)
        return routed(ids, scores.gather(-1, ids) * self.routed_scaling_factor, usable)
