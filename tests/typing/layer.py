"""What a layer gives back. Never executed: read by mypy and pyright."""

from __future__ import annotations

from typing import assert_type

import torch
from torch import Tensor

from typed_moe import (
    Bf16,
    DeepSeekV3,
    Fp8BlockScale,
    FusedMoE,
    Plan,
    RenormalizeNaive,
    RoutingStrategy,
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


def wrong_calls() -> None:
    """Each line is an error."""
    FusedMoE(128, 8, 2048, 768, routing=RenormalizeNaive())  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    experts(hidden_states)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    experts(hidden_states, router_logits, 8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    experts(hidden_states, [0.0, 1.0])  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    pair: tuple[Tensor, Tensor] = experts(hidden_states, router_logits)  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
