"""Random strategies with the oracle's rule for them, at random sizes; for hypothesis."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import Case
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

PLAIN: tuple[RoutingStrategy, ...] = (
    Default(),
    Renormalize(),
    RenormalizeNaive(),
    TopK(),
    Sigmoid(),
    SigmoidRenorm(),
    TopKSigmoid(),
    Llama4(),
)
NAMES = tuple(oracle.RULES)
SCALES = st.sampled_from([0.5, 1.0, 2.5, 2.827, 16.0])


@st.composite
def cases(draw: st.DrawFn, *, grouped: bool | None = None) -> Case:
    """A strategy of any kind, with groups that fit its size.

    Args:
        draw: hypothesis's.
        grouped: only strategies with groups (True) or without (False); None: any.
    """
    with_groups = ("DeepSeekV3", "BiasedSigmoid", "GroupedSoftmax")
    name = draw(st.sampled_from(with_groups if grouped else NAMES))
    groups, kept = 1, 1
    if grouped is not False and name in with_groups:
        groups = draw(st.sampled_from([2, 3, 4, 8] if grouped else [1, 2, 3, 4, 8]))
        kept = draw(st.integers(1, groups))
    size = draw(st.integers(2 if groups > 1 else 1, 40))
    num_experts = groups * size
    top_k = 1 if name == "Llama4" else draw(st.integers(1, min(12, kept * size)))
    scale, divide, top2 = draw(SCALES), draw(st.booleans()), draw(st.booleans())
    strategy, rule = _made(name, groups, kept, scale, divide=divide, top2=top2)
    return Case(id=name, strategy=strategy, rule=rule, num_experts=num_experts, top_k=top_k)


def _made(
    name: str, groups: int, kept: int, scale: float, *, divide: bool, top2: bool
) -> tuple[RoutingStrategy, oracle.Rule]:
    rule = oracle.RULES[name]
    for plain in PLAIN:
        if plain.name == name:
            return plain, rule
    rule = replace(rule, num_expert_group=groups, topk_group=kept, scale=scale)
    settings = replace(rule, divide=divide)
    match name:
        case "DeepSeekV3":
            return DeepSeekV3(
                num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale
            ), rule
        case "BiasedSigmoid":
            return BiasedSigmoid(
                num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale
            ), rule
        case "MiniMax2":
            return MiniMax2(routed_scaling_factor=scale), rule
        case "SqrtSoftplus":
            return SqrtSoftplus(routed_scaling_factor=scale), rule
        case "ScaledSoftmax":
            return ScaledSoftmax(norm_topk_prob=divide, routed_scaling_factor=scale), settings
        case _:
            return GroupedSoftmax(
                num_expert_group=groups,
                topk_group=kept,
                group_score="top2_sum" if top2 else "max",
                norm_topk_prob=divide,
                routed_scaling_factor=scale,
            ), replace(settings, group_score="top2_sum" if top2 else "max")


def inputs(case: Case, tokens: int, seed: int, spread: float) -> tuple[Tensor, Tensor | None]:
    """Logits and, where it reads one, a correction bias."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, case.num_experts, generator=generator) * spread
    bias = torch.randn(case.num_experts, generator=generator) * 0.3
    return logits, bias if case.biased else None
