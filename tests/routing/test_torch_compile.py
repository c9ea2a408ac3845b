"""Routing traces into one graph, as a compiled model needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from typed_moe import (
    BiasedSigmoid,
    BiasRule,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    RoutingShape,
    RoutingStrategy,
    ScaledSoftmax,
    Sigmoid,
    SigmoidRenorm,
    SqrtSoftplus,
    TopK,
    TopKSigmoid,
)

STRATEGIES: tuple[RoutingStrategy, ...] = (
    BiasedSigmoid(num_expert_group=4, topk_group=2),
    DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5),
    Default(),
    GroupedSoftmax(num_expert_group=4, topk_group=2, group_score="max", norm_topk_prob=False),
    Llama4(),
    MiniMax2(),
    Renormalize(),
    RenormalizeNaive(),
    ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=2.0),
    Sigmoid(),
    SigmoidRenorm(),
    SqrtSoftplus(),
    TopK(),
    TopKSigmoid(),
)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda strategy: strategy.name)
def test_select_experts_compiles_to_one_graph(strategy: RoutingStrategy) -> None:
    """`torch.compile(fullgraph=True)` takes every built-in and gives the eager result."""
    shape = RoutingShape(num_experts=16, top_k=1 if strategy.name == "Llama4" else 4)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 16, generator=generator)
    bias = torch.randn(16, generator=generator) if strategy.bias is BiasRule.REQUIRED else None

    def call(logits: Tensor) -> tuple[Tensor, Tensor]:
        result = strategy.select_experts(logits, bias, shape=shape)
        return result.topk_ids, result.topk_weights

    torch._dynamo.reset()
    # The eager backend runs the captured graph as it is: what is tested is that it is one.
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    ids, weights = compiled(logits)
    expected_ids, expected_weights = call(logits)

    assert torch.equal(ids, expected_ids)
    assert torch.equal(weights, expected_weights)
