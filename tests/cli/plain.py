"""The package's strategies and activations as the tests' own float64 oracle takes them."""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import attrs
import torch
from torch import Tensor

from tests import oracle
from typed_moe import (
    Activation,
    Geglu,
    Gelu,
    MoeSpec,
    Relu2,
    RoutingStrategy,
    Silu,
    Swiglu,
    SwigluStep,
)

_FIELDS = {
    "num_expert_group": "num_expert_group",
    "topk_group": "topk_group",
    "group_score": "group_score",
    "norm_topk_prob": "divide",
    "routed_scaling_factor": "scale",
}


def rule_of(strategy: RoutingStrategy) -> oracle.Rule:
    """The method's rule with this strategy's settings."""
    settings = {
        ours: getattr(strategy, name) for name, ours in _FIELDS.items() if hasattr(strategy, name)
    }
    return replace(oracle.RULES[strategy.name], **settings)


def act_of(activation: Activation) -> oracle.Act:
    """An activation with its settings."""
    match activation:
        case Swiglu():
            return oracle.Act(kind="swiglu", **attrs.asdict(activation))
        case SwigluStep(limit=limit):
            return oracle.Act(kind="swiglu_step", limit=limit)
        case Geglu(approximate=approximate):
            return oracle.Act(kind="geglu_tanh" if approximate == "tanh" else "geglu")
        case Relu2():
            return oracle.Act(kind="relu2")
        case Silu():
            return oracle.Act(kind="silu")
        case Gelu(approximate=approximate):
            return oracle.Act(kind="gelu_tanh" if approximate == "tanh" else "gelu")
        case _:
            assert_never(activation)


def layer_output(
    spec: MoeSpec,
    experts: oracle.Experts,
    hidden_states: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    *,
    num_shared: int = 0,
) -> Tensor:
    """(T, H) float64: what the layer of a spec gives on these experts."""
    return oracle.layer(
        rule_of(spec.routing),
        experts,
        hidden_states,
        logits,
        bias,
        top_k=spec.top_k,
        act=act_of(spec.activation),
        num_shared=num_shared,
    )


def relative(output: Tensor, expected: Tensor) -> float:
    """||output - expected|| / ||expected||."""
    return float((output.to(torch.float64) - expected).norm() / expected.norm())
