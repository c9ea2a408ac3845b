"""What the fused routing kernel knows: one row of arithmetic per routing method."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, final

import attrs
import torch

from typed_moe.routing import (
    GroupLimits,
    InKernel,
    KernelRules,
    MethodRules,
    PrecomputedRules,
    Refused,
    RoutingShape,
    Tier,
)

Rank = Literal["logits", "softmax", "sigmoid", "sqrt_softplus"]
Weigh = Literal["logits", "softmax", "softmax_chosen", "sigmoid", "sqrt_softplus"]
Divide = Literal["nothing", "sum_plus_epsilon", "sum_or_epsilon"]

MAX_EXPERTS = 2048
MAX_TOP_K = 32


@final
@attrs.frozen(kw_only=True)
class FusedRule:
    """One routing method as the kernel computes it.

    Attributes:
        rank: the score that orders the experts, to which a bias is added.
        weigh: the score of the chosen ones, without bias; `softmax` is over all experts,
            `softmax_chosen` over the chosen ones.
        divide: by nothing; by the weights' sum + 1e-20; or by the larger of their sum and 1e-20.
        biased: whether `e_score_correction_bias` is added before the ranking.
    """

    rank: Rank
    weigh: Weigh
    divide: Divide = "nothing"
    biased: bool = False


_SIGMOIDS = FusedRule(rank="sigmoid", weigh="sigmoid")
_BIASED = FusedRule(rank="sigmoid", weigh="sigmoid", divide="sum_plus_epsilon", biased=True)
_CHOSEN = FusedRule(rank="logits", weigh="softmax_chosen")

_RULES: Mapping[str, FusedRule] = MappingProxyType(
    {
        "Default": FusedRule(rank="logits", weigh="softmax"),
        "Renormalize": _CHOSEN,
        "RenormalizeNaive": _CHOSEN,
        "TopK": FusedRule(rank="logits", weigh="logits"),
        "Sigmoid": _SIGMOIDS,
        "TopKSigmoid": FusedRule(rank="logits", weigh="sigmoid"),
        "SigmoidRenorm": attrs.evolve(_SIGMOIDS, divide="sum_or_epsilon"),
        "Llama4": FusedRule(rank="logits", weigh="sigmoid"),
        "DeepSeekV3": _BIASED,
        "MiniMax2": _BIASED,
        "BiasedSigmoid": attrs.evolve(_BIASED, divide="nothing"),
        "SqrtSoftplus": attrs.evolve(_BIASED, rank="sqrt_softplus", weigh="sqrt_softplus"),
        "ScaledSoftmax": _CHOSEN,
        "GroupedSoftmax": FusedRule(rank="softmax", weigh="softmax", divide="sum_plus_epsilon"),
    }
)
_UNDIVIDED: Mapping[str, FusedRule] = MappingProxyType(
    {
        "SigmoidRenorm": _SIGMOIDS,
        "ScaledSoftmax": FusedRule(rank="logits", weigh="softmax"),
        "GroupedSoftmax": FusedRule(rank="softmax", weigh="softmax"),
    }
)
"""The methods that read `norm_topk_prob`, where it is False."""

_SIZES = (Tier(max_experts=MAX_EXPERTS, max_top_k=MAX_TOP_K),)
_METHOD = MethodRules(
    tiers=_SIZES,
    logits_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    bias_dtypes=(torch.float32, torch.bfloat16, torch.float16),
    grouped_tiers=_SIZES,
    groups=GroupLimits(
        max_groups=MAX_EXPERTS, max_experts_per_group=MAX_EXPERTS, max_topk_group=MAX_EXPERTS
    ),
)

FUSED_RULES = KernelRules(
    kernel="fused routing",
    methods=MappingProxyType(dict.fromkeys(_RULES, _METHOD)),
    weight_on_input=True,
    source="typed_moe.kernels.fused_routing",
    precomputed=PrecomputedRules(tiers=()),
)
"""What the fused routing kernel routes from logits: every method of this package at every size that
a published model has. It runs no experts."""


@final
@attrs.frozen(kw_only=True)
class RouteSettings:
    """What no call changes: the rule, the layer's sizes, the groups and the factor.

    Attributes:
        two_best: a group's score is the sum of its two best, not its best alone.
        scale: the factor in the weights.
    """

    rule: FusedRule
    num_experts: int
    top_k: int
    num_expert_group: int
    topk_group: int
    two_best: bool
    scale: float

    @property
    def group_size(self) -> int:
        """Experts per group."""
        return self.num_experts // self.num_expert_group

    @property
    def places(self) -> int:
        """Places of a row in the tile: groups, and experts per group, padded to powers of two."""
        return power_of_two(self.num_expert_group) * power_of_two(self.group_size)


def ceil_div(count: int, size: int) -> int:
    """How many of `size` hold `count`. `triton.cdiv` is the same behind a wrapper that takes microseconds."""
    return -(-count // size)


def power_of_two(value: int) -> int:
    """The least power of two that is not below it."""
    return 1 << (value - 1).bit_length()


def route_settings(told: InKernel, shape: RoutingShape) -> RouteSettings | Refused:
    """What a strategy tells the kernel, as the kernel's constants."""
    rule = fused_rule(told)
    if isinstance(rule, Refused):
        return rule
    return RouteSettings(
        rule=rule,
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        num_expert_group=told.n_group or 1,
        topk_group=told.topk_group or 1,
        two_best=told.group_score == "top2_sum",
        scale=1.0 if told.routed_scaling_factor is None else told.routed_scaling_factor,
    )


def fused_rule(told: InKernel) -> FusedRule | Refused:
    """The arithmetic of what a strategy tells the kernel."""
    name = told.routing_method_type
    if not told.norm_topk_prob and name in _UNDIVIDED:
        return _UNDIVIDED[name]
    return _RULES.get(name) or Refused(f"{FUSED_RULES.kernel} has no routing method for {name}")
