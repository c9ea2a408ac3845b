"""The one normal form of group parameters, and the checks that go with it."""

from __future__ import annotations

import attrs

from typed_moe.routing._records import RoutingShape


def normal_group(value: int | None) -> int:
    """None, 0 and 1 are the same thing: no grouping. The normal form is 1."""
    return 1 if value is None or (value == 0 and value is not False) else value


def group_count(_: object, attribute: attrs.Attribute[int], value: int) -> None:
    """attrs validator: a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{attribute.name} is {value!r}; allowed: an int, or None for no groups")
    if value < 1:
        raise ValueError(f"{attribute.name} is {value}; allowed: 1 or more, or None for no groups")


def check_group_pair(num_expert_group: int, topk_group: int) -> None:
    """Refuse more kept groups than there are.

    Raises:
        ValueError: topk_group is above num_expert_group.
    """
    if topk_group > num_expert_group:
        raise ValueError(
            f"topk_group is {topk_group}; allowed: 1 to num_expert_group = {num_expert_group}"
        )


def check_group_shape(
    shape: RoutingShape, *, num_expert_group: int, topk_group: int, least: int
) -> None:
    """Refuse a layer whose experts do not divide into the groups.

    Args:
        shape: E and k of the layer.
        num_expert_group: groups the experts are divided into.
        topk_group: groups that are kept.
        least: experts that a group needs for its score (2 for a top-2 sum).

    Raises:
        ValueError: with the numbers.
    """
    if num_expert_group == 1:
        return
    experts, top_k = shape.num_experts, shape.top_k
    if experts % num_expert_group:
        raise ValueError(
            f"num_experts is {experts}, not a multiple of num_expert_group = {num_expert_group}; "
            "choose a group count that divides it"
        )
    per_group = experts // num_expert_group
    if per_group < least:
        raise ValueError(
            f"num_expert_group is {num_expert_group} for {experts} experts, {per_group} per group; "
            f"allowed: {least} or more per group, because a group is scored by its two best. Use "
            "num_expert_group=1 for no groups"
        )
    if top_k > topk_group * per_group:
        raise ValueError(
            f"top_k is {top_k}; allowed: at most topk_group * experts per group = "
            f"{topk_group} * {per_group} = {topk_group * per_group}"
        )
