"""The model's routing method number, compared with the strategy. Never more than compared."""

from __future__ import annotations

from enum import Enum
from typing import final

import attrs

from typed_moe.routing import DeepSeekV3, MiniMax2
from typed_moe.sglang._translate import RoutedOutside, Translation

_NOT_SAID = frozenset({"TopK", "Unspecified"})
"""Names that claim no rule: ids are given to the kernel, or nothing is said."""


class Agreement(Enum):
    """What a method's name is to a strategy."""

    SAME = "same"
    """The strategy's own name."""
    EQUAL = "equal"
    """Another name of the same function."""
    NOT_SAID = "not said"
    """The model passes no number, or one that claims no rule."""
    CONFLICT = "conflict"
    """A rule that the model's own TopK does not compute."""


@final
@attrs.frozen(kw_only=True)
class Comparison:
    """A number beside the strategy that the TopK settings make.

    Attributes:
        method: the number's name; None: the model passes none.
        agreement: what the two are to each other.
    """

    method: str | None
    agreement: Agreement


def compare_method(method: str | None, translation: Translation) -> Comparison:
    """What the model's number says, beside what its TopK computes.

    Args:
        method: the name of the member of SGLang's `RoutingMethodType`; None: none was passed.
        translation: of the TopK settings.
    """
    if method is None or method in _NOT_SAID:
        return Comparison(method=method, agreement=Agreement.NOT_SAID)
    if isinstance(translation, RoutedOutside):
        return Comparison(method=method, agreement=Agreement.CONFLICT)
    if method == translation.name:
        return Comparison(method=method, agreement=Agreement.SAME)
    softmax = {"Renormalize", "RenormalizeNaive"}
    equal = {method, translation.name} == softmax or (
        {method, translation.name} == {"DeepSeekV3", "MiniMax2"}
        and (
            isinstance(translation, MiniMax2)
            or (isinstance(translation, DeepSeekV3) and translation.num_expert_group == 1)
        )
    )
    return Comparison(method=method, agreement=Agreement.EQUAL if equal else Agreement.CONFLICT)
