"""Settings that cannot be: refused where they are written, with what was given."""

from __future__ import annotations

import math

import pytest
import torch

import typed_moe
from typed_moe import RoutingShape

GROUPED = ("DeepSeekV3", "BiasedSigmoid", "GroupedSoftmax")
SCALED = (*GROUPED, "MiniMax2", "SqrtSoftplus", "ScaledSoftmax")
NEEDED: dict[str, dict[str, object]] = {
    "GroupedSoftmax": {
        "num_expert_group": 4,
        "topk_group": 2,
        "group_score": "max",
        "norm_topk_prob": True,
    },
    "ScaledSoftmax": {"norm_topk_prob": True, "routed_scaling_factor": 1.0},
}


def made(name: str, **changed: object) -> object:
    """A strategy by name, as code without a type checker would make it."""
    return getattr(typed_moe, name)(**{**NEEDED.get(name, {}), **changed})


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", SCALED)
def test_factor_that_is_no_factor(name: str, value: float) -> None:
    """0, negative, NaN and infinite factors."""
    with pytest.raises(ValueError, match=rf"routed_scaling_factor is {value}; allowed: a positive"):
        made(name, routed_scaling_factor=value)


@pytest.mark.parametrize("value", [None, True, "2.5"])
@pytest.mark.parametrize("name", SCALED)
def test_factor_that_is_no_number(name: str, value: object) -> None:
    """None is no factor: a model without one says 1.0."""
    with pytest.raises(TypeError, match=r"routed_scaling_factor is .*; allowed: a number"):
        made(name, routed_scaling_factor=value)


@pytest.mark.parametrize("field", ["num_expert_group", "topk_group"])
@pytest.mark.parametrize("name", GROUPED)
def test_group_counts_that_are_none(name: str, field: str) -> None:
    """Negative counts, and what is no int."""
    with pytest.raises(ValueError, match=f"{field} is -3; allowed: 1 or more"):
        made(name, **{field: -3})
    for value in (2.5, True, "8"):
        with pytest.raises(TypeError, match=f"{field} is .*; allowed: an int"):
            made(name, **{field: value})


@pytest.mark.parametrize("name", GROUPED)
def test_more_kept_groups_than_groups(name: str) -> None:
    """Both numbers are in the message."""
    with pytest.raises(ValueError, match="topk_group is 5; allowed: 1 to num_expert_group = 4"):
        made(name, num_expert_group=4, topk_group=5)


@pytest.mark.parametrize("kept", [None, 0, 1])
@pytest.mark.parametrize("groups", [None, 0, 1])
@pytest.mark.parametrize("name", GROUPED)
def test_no_groups_has_one_form(name: str, groups: int | None, kept: int | None) -> None:
    """None, 0 and 1 are the same strategy."""
    one = made(name, num_expert_group=1, topk_group=1)
    other = made(name, num_expert_group=groups, topk_group=kept)
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)


@pytest.mark.parametrize("name", ["DeepSeekV3", "BiasedSigmoid", "MiniMax2", "SqrtSoftplus"])
def test_dtypes_that_no_gate_emits(name: str) -> None:
    """`router_logits_dtype` is a floating dtype of a gate, or None."""
    with pytest.raises(ValueError, match=r"router_logits_dtype is torch\.int32; allowed"):
        made(name, router_logits_dtype=torch.int32)


@pytest.mark.parametrize("name", ["DeepSeekV3", "MiniMax2"])
def test_bias_dtypes_that_are_none(name: str) -> None:
    """A bias is never rounded, or to bfloat16."""
    with pytest.raises(ValueError, match=r"correction_bias_dtype is torch\.float16; allowed"):
        made(name, correction_bias_dtype=torch.float16)


@pytest.mark.parametrize("count", [False, True, 2.0], ids=repr)
def test_group_counts_that_are_no_int(count: object) -> None:
    """None and 0 mean no groups; a config's false or 2.0 is a mistake."""
    with pytest.raises(TypeError, match="num_expert_group"):
        made("DeepSeekV3", num_expert_group=count)


@pytest.mark.parametrize("name", ["GroupedSoftmax", "ScaledSoftmax"])
def test_renormalisation_is_said_with_a_bool(name: str) -> None:
    """There is no default, and no truthy stand-in."""
    with pytest.raises(TypeError, match="norm_topk_prob"):
        made(name, norm_topk_prob=1)


def test_group_score_is_one_of_two() -> None:
    """`mean` is neither of them."""
    with pytest.raises(ValueError, match="group_score"):
        made("GroupedSoftmax", group_score="mean")


@pytest.mark.parametrize("name", sorted({"Default", "DeepSeekV3", "Llama4", "TopK"}))
def test_settings_are_named(name: str) -> None:
    """No setting is taken by position, and none that the method does not have."""
    with pytest.raises(TypeError, match="positional"):
        getattr(typed_moe, name)(8)
    with pytest.raises(TypeError, match="unexpected keyword"):
        made(name, renormalize=True)


@pytest.mark.parametrize(
    ("num_experts", "top_k", "message"),
    [
        (0, 1, "num_experts is 0; allowed: 1 or more"),
        (8, 0, "top_k is 0; allowed: 1 or more"),
        (8, 9, "top_k is 9; allowed: 1 to num_experts = 8"),
    ],
)
def test_shapes_that_cannot_be(num_experts: int, top_k: int, message: str) -> None:
    """top_k above E, and nothing to choose from."""
    with pytest.raises(ValueError, match=message):
        RoutingShape(num_experts=num_experts, top_k=top_k)
