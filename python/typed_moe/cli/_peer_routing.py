"""Routing as models' own PyTorch code does it, for peers that have no routing of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.routing import DeepSeekV3, Llama4, Renormalize, RenormalizeNaive, Routed


def route_in_torch(shape: LayerShape, logits: Tensor, bias: Tensor | None) -> Routed:
    """(T, k) ids and float32 weights, in as few of PyTorch's operators as the method needs.

    Args:
        shape: whose strategy and k.
        logits: (T, E) float32.
        bias: (E,), where the method has one.
    """
    strategy, top_k = shape.routing, shape.top_k
    match strategy:
        case Renormalize() | RenormalizeNaive():
            # A softmax over the chosen is the chosen part of a softmax over all, divided.
            best = torch.topk(logits, top_k, dim=-1)
            return Routed(topk_ids=best.indices, topk_weights=torch.softmax(best.values, dim=-1))
        case Llama4():
            best = torch.topk(logits, top_k, dim=-1)
            return Routed(topk_ids=best.indices, topk_weights=torch.sigmoid(best.values))
        case DeepSeekV3(num_expert_group=1, routed_scaling_factor=factor) if bias is not None:
            scores = torch.sigmoid(logits)
            ids = torch.topk(scores + bias, top_k, dim=-1, sorted=False).indices
            chosen = scores.gather(1, ids)
            weights = chosen / chosen.sum(dim=-1, keepdim=True) * factor
            return Routed(topk_ids=ids, topk_weights=weights)
        case _:
            return strategy.select_experts(logits, bias, shape=shape.shape)
