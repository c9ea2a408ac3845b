"""Every strategy beside the oracle's rule for it, and what its inputs look like."""

from __future__ import annotations

from dataclasses import replace

import attrs
import torch
from torch import Tensor

from tests import oracle
from typed_moe import (
    BiasedSigmoid,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    RoutingStrategy,
    ScaledSoftmax,
    Sigmoid,
    SigmoidRenorm,
    SqrtSoftplus,
    TopK,
    TopKSigmoid,
)


@attrs.frozen(kw_only=True)
class Case:
    """A strategy and what it has to compute.

    `num_experts` and `top_k` are the published model's, or the default grid's.
    """

    id: str
    strategy: RoutingStrategy
    rule: oracle.Rule
    num_experts: int = 256
    top_k: int = 8

    @property
    def biased(self) -> bool:
        """Whether it reads a correction bias."""
        return self.rule.biased

    def bias(self, low: float = -0.5, high: float = 0.5) -> Tensor | None:
        """A correction bias, if it reads one."""
        return uniform(low, high, self.num_experts) if self.biased else None


def uniform(low: float, high: float, *shape: int) -> Tensor:
    """float32 values between low and high, the same at every call after one seed."""
    return torch.rand(*shape) * (high - low) + low


def _rule(
    name: str, *, groups: tuple[int, int] = (1, 1), scale: float = 1.0, divide: bool | None = None
) -> oracle.Rule:
    rule = oracle.RULES[name]
    return replace(
        rule,
        num_expert_group=groups[0],
        topk_group=groups[1],
        scale=scale,
        divide=rule.divide if divide is None else divide,
    )


PLAIN = tuple(
    Case(id=strategy.name, strategy=strategy, rule=oracle.RULES[strategy.name])
    for strategy in (
        Default(),
        Renormalize(),
        RenormalizeNaive(),
        TopK(),
        SigmoidRenorm(),
        Sigmoid(),
        TopKSigmoid(),
    )
)
"""The methods with neither bias nor settings."""

LLAMA4 = Case(id="Llama4", strategy=Llama4(), rule=oracle.RULES["Llama4"], num_experts=128, top_k=1)

BIASED = (
    Case(
        id="DeepSeekV3-8of4",
        strategy=DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
        rule=_rule("DeepSeekV3", groups=(8, 4), scale=2.5),
    ),
    Case(
        id="DeepSeekV3-Kimi",
        strategy=DeepSeekV3(routed_scaling_factor=2.827),
        rule=_rule("DeepSeekV3", scale=2.827),
        num_experts=384,
    ),
    Case(
        id="MiniMax2",
        strategy=MiniMax2(routed_scaling_factor=2.5),
        rule=_rule("MiniMax2", scale=2.5),
    ),
    Case(
        id="BiasedSigmoid",
        strategy=BiasedSigmoid(routed_scaling_factor=2.5),
        rule=_rule("BiasedSigmoid", scale=2.5),
        num_experts=128,
        top_k=6,
    ),
    Case(
        id="BiasedSigmoid-8of4",
        strategy=BiasedSigmoid(num_expert_group=8, topk_group=4),
        rule=_rule("BiasedSigmoid", groups=(8, 4)),
    ),
    Case(
        id="SqrtSoftplus",
        strategy=SqrtSoftplus(routed_scaling_factor=1.5),
        rule=_rule("SqrtSoftplus", scale=1.5),
        top_k=6,
    ),
)
"""The methods with a correction bias."""

SCALED = (
    Case(
        id="ScaledSoftmax",
        strategy=ScaledSoftmax(norm_topk_prob=False, routed_scaling_factor=16.0),
        rule=_rule("ScaledSoftmax", scale=16.0),
        num_experts=64,
        top_k=6,
    ),
    Case(
        id="ScaledSoftmax-norm",
        strategy=ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=2.5),
        rule=_rule("ScaledSoftmax", scale=2.5, divide=True),
        num_experts=128,
    ),
    Case(
        id="GroupedSoftmax-max",
        strategy=GroupedSoftmax(
            num_expert_group=8,
            topk_group=3,
            group_score="max",
            norm_topk_prob=False,
            routed_scaling_factor=16.0,
        ),
        rule=replace(_rule("GroupedSoftmax", groups=(8, 3), scale=16.0), group_score="max"),
        num_experts=160,
        top_k=6,
    ),
    Case(
        id="GroupedSoftmax-top2",
        strategy=GroupedSoftmax(
            num_expert_group=8, topk_group=4, group_score="top2_sum", norm_topk_prob=True
        ),
        rule=_rule("GroupedSoftmax", groups=(8, 4), divide=True),
        num_experts=128,
        top_k=4,
    ),
)
"""Softmax with a factor, groups or both; no fused kernel knows them."""

CASES = (*PLAIN, LLAMA4, *BIASED, *SCALED)
GROUPED = tuple(case for case in CASES if case.rule.num_expert_group > 1)
WITH_BIAS = BIASED


def find(case_id: str) -> Case:
    """The case of this id."""
    return next(case for case in CASES if case.id == case_id)


def loosened(case: Case) -> Case:
    """The case with a strategy that takes logits of any dtype."""
    strategy = case.strategy
    if isinstance(strategy, DeepSeekV3 | BiasedSigmoid):
        return attrs.evolve(case, strategy=attrs.evolve(strategy, router_logits_dtype=None))
    return case


def sized(case: Case, num_experts: int, top_k: int) -> Case:
    """The case at another size."""
    return attrs.evolve(case, num_experts=num_experts, top_k=top_k)
