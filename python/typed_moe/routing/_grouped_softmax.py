"""Softmax, the best groups, the k best, scaled."""

from __future__ import annotations

from functools import partial
from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.routing import _settings
from typed_moe.routing._biased import grouped_refusal
from typed_moe.routing._groups import (
    check_group_pair,
    check_group_shape,
    group_count,
    normal_group,
)
from typed_moe.routing._limits import plain_in_kernel
from typed_moe.routing._ops import (
    SUM_EPSILON,
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
class GroupedSoftmax:
    """Softmax over all experts, top-k within the best groups, scaled.

    p = softmax(logits); experts outside the topk_group best groups are masked;
    ids = top_k(p); weights = routed_scaling_factor * p[ids], divided first by their sum if
    norm_topk_prob.

    Attributes:
        num_expert_group: groups the experts are divided into; None, 0 and 1 mean no groups.
        topk_group: groups that are kept.
        group_score: what ranks a group: its best expert (`"max"`, DeepSeek-V2) or the sum of
            its two best (`"top2_sum"`, Mistral-Large-4).
        norm_topk_prob: whether the weights are divided by their sum (plus 1e-20).
        routed_scaling_factor: the factor in the weights.

    Models: DeepSeek-V2 (`topk_method = group_limited_greedy`: max, not normalised, 16.0);
    Mistral-4 and Mistral-Large-4 with `n_group > 1` (top-2 sum, normalised).
    Source: DeepseekV2TopkRouter and Mistral4TopkRouter in transformers. FlashInfer's
    kernels do not know it.
    """

    num_expert_group: int = attrs.field(converter=normal_group, validator=group_count)
    topk_group: int = attrs.field(converter=normal_group, validator=group_count)
    group_score: Literal["max", "top2_sum"] = attrs.field(
        validator=attrs.validators.in_(("max", "top2_sum"))
    )
    norm_topk_prob: bool = attrs.field(validator=attrs.validators.instance_of(bool))
    routed_scaling_factor: float = attrs.field(default=1.0, validator=_settings.factor)

    def __attrs_post_init__(self) -> None:
        check_group_pair(self.num_expert_group, self.topk_group)

    @property
    def name(self) -> Literal["GroupedSoftmax"]:
        """The method's name."""
        return "GroupedSoftmax"

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
        """Refuse experts that do not divide into the groups. Raises: ValueError."""
        check_group_shape(
            shape,
            num_expert_group=self.num_expert_group,
            topk_group=self.topk_group,
            least=2 if self.group_score == "top2_sum" else 1,
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
        args = plain_in_kernel(self.name, shape, rules, norm_topk_prob=self.norm_topk_prob)
        if isinstance(args, Refused):
            return args
        return attrs.evolve(
            args,
            n_group=self.num_expert_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
            routed_scaling_factor=self.routed_scaling_factor,
        )

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """The maths above. See `RoutingStrategy.select_experts`."""
        self.check(shape)
        check_inputs(self.name, router_logits, e_score_correction_bias, shape=shape, bias=self.bias)
        logits, usable = float_logits(router_logits)
        scores = score(partial(torch.softmax, dim=-1), logits)
        kept = keep_best_groups(
            scores,
            num_expert_group=self.num_expert_group,
            topk_group=self.topk_group,
            group_score=self.group_score,
        )
        ids = top_k_ids(kept, shape.top_k)
        weights = scores.gather(-1, ids)
        if self.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + SUM_EPSILON)
        return routed(ids, weights * self.routed_scaling_factor, usable)
