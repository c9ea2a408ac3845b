"""Sigmoid plus bias, the best groups, the k best, renormalised and scaled."""

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
class DeepSeekV3:
    """Sigmoid + bias selects within the best groups; the unbiased sigmoids are the weights.

    s = sigmoid(logits); c = s + bias; a group's score is the sum of its two best c; experts
    outside the topk_group best groups get -inf; ids = top_k(c);
    weights = routed_scaling_factor * s[ids] / (sum(s[ids]) + 1e-20).

    Attributes:
        num_expert_group: groups the experts are divided into; None, 0 and 1 mean no groups.
        topk_group: groups that are kept.
        routed_scaling_factor: the factor in the weights.
        router_logits_dtype: the least precise dtype the gate may emit. The models keep a
            float32 gate; torch.bfloat16 allows rounded logits, None any.
        correction_bias_dtype: the least precise dtype the bias may be rounded to for a kernel.

    Models: DeepSeek-V3, V3.1, V3.2, R1 (8 groups, 4 kept); Kimi-K2, GLM-4.5 to GLM-5,
    Nemotron-H, EXAONE-MoE, MiMo-V2-Flash (no groups).
    Source: DeepSeek-V3 technical report, 2.1.2; FlashInfer `RoutingMethodType.DeepSeekV3`.
    """

    num_expert_group: int = attrs.field(default=1, converter=normal_group, validator=group_count)
    topk_group: int = attrs.field(default=1, converter=normal_group, validator=group_count)
    routed_scaling_factor: float = attrs.field(default=1.0, validator=_settings.factor)
    router_logits_dtype: torch.dtype | None = torch.float32
    correction_bias_dtype: torch.dtype = attrs.field(
        default=torch.float32, validator=_settings.bias_dtype
    )

    def __attrs_post_init__(self) -> None:
        check_group_pair(self.num_expert_group, self.topk_group)
        _settings.check_logits_dtype(self.router_logits_dtype)

    @property
    def name(self) -> Literal["DeepSeekV3"]:
        """The method's name."""
        return "DeepSeekV3"

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
        """Routed by the kernel, grouped or not, where it was compiled for this size."""
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
            correction_bias_dtype=self.correction_bias_dtype,
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
        weights = scores.gather(-1, ids)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + SUM_EPSILON)
        return routed(ids, weights * self.routed_scaling_factor, usable)
