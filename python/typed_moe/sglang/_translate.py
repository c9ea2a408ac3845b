"""From SGLang's TopK settings to a strategy, by the maths that SGLang computes for them.

The method's number that a model passes beside them is not read here; `typed_moe.sglang._methods`
compares it. Source: `select_experts` in `sglang/srt/layers/moe/topk.py`, SGLang 0.5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import final

import attrs
import torch

from typed_moe.routing import (
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
)
from typed_moe.sglang._topk import TopKSettings


@final
@attrs.frozen(kw_only=True)
class RoutedOutside:
    """Settings that no strategy computes: SGLang routes, and a kernel gets the ids and weights.

    Attributes:
        name: of the rule, for people.
        reason: a sentence: what there is no strategy for.
    """

    name: str
    reason: str


Translation = RoutingStrategy | RoutedOutside

_CUSTOM: Mapping[str, RoutingStrategy] = MappingProxyType(
    {
        # Top-1 of the logits, its sigmoid; the model puts the weight on the expert's input.
        "sglang.srt.models.llama4.Llama4MoE.custom_routing_function": Llama4(),
        # `torch.topk` of `torch.sigmoid` of the logits, for Cohere2-MoE without renormalisation.
        "sglang.srt.models.cohere2_moe.cohere2_sigmoid_topk": Sigmoid(),
    }
)
"""Routing functions of SGLang's own whose maths is a strategy's, by name.

`tests/sglang/test_translate.py` runs each beside its strategy.
"""


def strategy_of(settings: TopKSettings, method: str | None = None) -> Translation:
    """The strategy that computes what SGLang's TopK computes for these settings.

    The strategies take logits of any dtype, and a bias rounded to bfloat16 where a kernel's grouped
    routing does that: SGLang passes its logits and bias as they are, and has no say in either.

    Args:
        settings: of a TopK, after the model has finished with it.
        method: the name of the model's routing method. It chooses between strategies that are
            equal in exact arithmetic (Renormalize and RenormalizeNaive; MiniMax2 and DeepSeekV3
            without groups), and nothing else.

    Returns:
        The strategy, or why there is none.

    Raises:
        ValueError: groups that do not fit together.
    """
    if settings.custom_routing_function is not None:
        return _custom(settings)
    if settings.use_grouped_topk:
        if settings.has_correction_bias:
            return _biased_sigmoid(settings, method, grouped=True)
        return _grouped(settings)
    if settings.has_correction_bias:
        return _biased(settings, method)
    return _plain(settings, method)


def _custom(settings: TopKSettings) -> Translation:
    name = settings.custom_routing_function
    assert name is not None, "the caller has looked"
    strategy = _CUSTOM.get(name)
    factor = _factor(settings)
    if strategy is None:
        return RoutedOutside(name=name, reason=f"the model routes by a function of its own, {name}")
    if isinstance(strategy, Llama4) and settings.top_k != 1:
        return RoutedOutside(
            name=name, reason=f"Llama4 is defined for top_k 1; here it is {settings.top_k}"
        )
    if factor != 1.0:
        return RoutedOutside(
            name=name, reason=f"{strategy.name} has no factor, and TopK multiplies by {factor}"
        )
    if settings.renormalize and not isinstance(strategy, Llama4):
        return RoutedOutside(name=name, reason=f"{name} is known without renormalisation only")
    return strategy


def _plain(settings: TopKSettings, method: str | None) -> Translation:
    factor = _factor(settings)
    match settings.scoring_func, settings.renormalize:
        case "softmax", renormalize if factor != 1.0:
            return ScaledSoftmax(norm_topk_prob=renormalize, routed_scaling_factor=factor)
        case "softmax", True:
            return Renormalize() if method == "Renormalize" else RenormalizeNaive()
        case "softmax", False:
            return Default()
        case "sigmoid", renormalize if factor == 1.0:
            return SigmoidRenorm() if renormalize else Sigmoid()
        case _:
            return _no_strategy(settings)


def _biased(settings: TopKSettings, method: str | None) -> Translation:
    match settings.scoring_func, settings.renormalize:
        case "sigmoid", _:
            return _biased_sigmoid(settings, method, grouped=False)
        case "sqrtsoftplus", True:
            return SqrtSoftplus(routed_scaling_factor=_factor(settings))
        case _:
            return _no_strategy(settings)


def _biased_sigmoid(settings: TopKSettings, method: str | None, *, grouped: bool) -> Translation:
    factor = _factor(settings)
    groups = settings.num_expert_group if grouped else None
    kept = settings.topk_group if grouped else None
    if not settings.renormalize:
        return BiasedSigmoid(
            num_expert_group=groups,
            topk_group=kept,
            routed_scaling_factor=factor,
            router_logits_dtype=None,
        )
    if not grouped and method != "DeepSeekV3":
        return MiniMax2(routed_scaling_factor=factor, correction_bias_dtype=torch.bfloat16)
    return DeepSeekV3(
        num_expert_group=groups,
        topk_group=kept,
        routed_scaling_factor=factor,
        router_logits_dtype=None,
        correction_bias_dtype=torch.bfloat16,
    )


def _grouped(settings: TopKSettings) -> Translation:
    one_group = (settings.num_expert_group or 1) == 1
    if one_group:
        return _plain(attrs.evolve(settings, use_grouped_topk=False), None)
    if settings.scoring_func == "softmax":
        return GroupedSoftmax(
            num_expert_group=settings.num_expert_group,
            topk_group=settings.topk_group,
            group_score="max",
            norm_topk_prob=settings.renormalize,
            routed_scaling_factor=_factor(settings),
        )
    return _no_strategy(settings)


def _factor(settings: TopKSettings) -> float:
    return 1.0 if settings.routed_scaling_factor is None else settings.routed_scaling_factor


def _no_strategy(settings: TopKSettings) -> RoutedOutside:
    parts = [
        settings.scoring_func,
        "with a correction bias" if settings.has_correction_bias else "without a correction bias",
        f"in {settings.num_expert_group} groups" if settings.use_grouped_topk else "without groups",
        "renormalised" if settings.renormalize else "not renormalised",
    ]
    factor = _factor(settings)
    if factor != 1.0:
        parts.append(f"times {factor}")
    rule = ", ".join(parts)
    return RoutedOutside(name=rule, reason=f"no strategy computes {rule}")
