"""A strategy that a model injects, beside the TopK that it builds."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from typed_moe.routing import RoutingStrategy
from typed_moe.sglang._translate import RoutedOutside, Translation

_ROUNDING = frozenset({"router_logits_dtype", "correction_bias_dtype"})
"""What may be rounded is a strategy's own business; a TopK has no say in it."""

_SAME_MATHS: Mapping[str, str] = {"RenormalizeNaive": "Renormalize", "MiniMax2": "DeepSeekV3"}
_NEUTRAL: Mapping[str, object] = {
    "num_expert_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


def contradiction(routing: RoutingStrategy, topk: Translation) -> str | None:
    """Why a TopK does not compute what a strategy does, as a sentence; None: it does.

    Args:
        routing: `routing=` of the layer.
        topk: the rule of the TopK that the model binds to it.
    """
    if not isinstance(topk, RoutedOutside) and _rule(routing) == _rule(topk):
        return None
    computes = topk.name if isinstance(topk, RoutedOutside) else repr(topk)
    return (
        f"routing={routing!r} was given together with a TopK that computes {computes}; allowed: one "
        "rule. Give the layer the router logits, without a TopK, or correct one of the two"
    )


def _rule(strategy: RoutingStrategy) -> tuple[str, Mapping[str, object]]:
    kind: type = type(strategy)
    fields: dict[str, object] = {}
    if attrs.has(kind):
        names = [field.name for field in attrs.fields(kind) if field.name not in _ROUNDING]
        fields = {name: getattr(strategy, name) for name in names}
    settings = {name: value for name, value in fields.items() if value != _NEUTRAL.get(name)}
    return _SAME_MATHS.get(strategy.name, strategy.name), settings
