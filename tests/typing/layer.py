"""What a layer gives back. Never executed: read by mypy and pyright."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from typed_moe import (
    AllGatherReduceScatter,
    AllReduce,
    Bf16,
    DeepSeekV3,
    Dispatched,
    Fp8BlockScale,
    FusedMoE,
    Placement,
    Plan,
    Refused,
    RenormalizeNaive,
    RoutingStrategy,
    TokenExchange,
    Unfinalized,
)

experts = FusedMoE(
    num_experts=128,
    top_k=8,
    hidden_size=2048,
    intermediate_size=768,
    routing=RenormalizeNaive(),
    quant=Fp8BlockScale(),
)
hidden_states = torch.zeros(4, 2048)
router_logits = torch.zeros(4, 128)

# `nn.Module.__call__` is Any; the layer's is not.
assert_type(experts(hidden_states, router_logits), Tensor)
assert_type(experts.forward(hidden_states, router_logits), Tensor)

assert_type(experts.plan, Plan)
assert_type(experts.routing, RoutingStrategy)
assert_type(experts.e_score_correction_bias, Tensor | None)

# The factory arguments are torch's.
FusedMoE(
    num_experts=256,
    top_k=8,
    hidden_size=7168,
    intermediate_size=2048,
    routing=DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
    quant=Bf16(),
    device="meta",
    dtype=torch.bfloat16,
)


class OwnTokens:
    """A call's tokens, sent nowhere: the shape of `Dispatched`, without inheriting."""

    def __init__(self, hidden_states: Tensor, router_logits: Tensor) -> None:
        self.hidden_states, self.router_logits = hidden_states, router_logits

    def combine(self, partial_output: Tensor) -> Tensor:
        return partial_output


class OwnExchange:
    """A user's exchange, likewise."""

    name = "OwnExchange"

    def check(self, placement: Placement) -> None:
        assert_type(placement.ep_size, int)

    def dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> OwnTokens:
        return OwnTokens(hidden_states, router_logits)


def exchanges(group: ProcessGroup) -> list[TokenExchange]:
    """Built-in ones and a user's."""
    dispatched = AllReduce(group=group).dispatch(hidden_states, router_logits)
    assert_type(dispatched, Dispatched)
    assert_type(dispatched.combine(hidden_states), Tensor)
    return [AllReduce(group=group), AllGatherReduceScatter(group=group), OwnExchange()]


def unfinalized() -> None:
    """Three tensors with names, or a refusal that says so."""
    rules = experts.plan.unfinalized
    if not isinstance(rules, Refused):
        assert_type(rules.weights_dtype, torch.dtype)
    made = experts.forward_unfinalized(hidden_states, router_logits)
    assert_type(made, Unfinalized)
    assert_type(made.finalize(torch.bfloat16), Tensor)
    # There is no sum to put anywhere, and no tuple to take apart in the wrong order.
    x, logits = hidden_states, router_logits
    experts.forward_unfinalized(x, logits, output=x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    made[0]  # type: ignore[index]  # pyright: ignore[reportIndexIssue]


def wrong_calls(group: ProcessGroup) -> None:
    """Each line is an error."""
    AllReduce(group)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    AllReduce(group=group, max_num_tokens=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    FusedMoE(128, 8, 2048, 768, routing=RenormalizeNaive())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    experts(hidden_states)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    experts(hidden_states, router_logits, 8)  # type: ignore[call-arg, arg-type]  # pyright: ignore[reportCallIssue]
    experts(hidden_states, [0.0, 1.0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pair: tuple[Tensor, Tensor] = experts(hidden_states, router_logits)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
