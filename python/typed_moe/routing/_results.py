"""What a strategy gives back, looked at before a kernel indexes weights with it."""

from __future__ import annotations

import torch

from typed_moe.routing._records import Routed, RoutingShape


def check_routed(name: str, routed: Routed, *, num_tokens: int, shape: RoutingShape) -> None:
    """Refuse a result that is not the layer's.

    The ids' range is read on the CPU alone: on a GPU it would wait for the device in every
    call. There `typed_moe.testing.check_strategy` looks at it, once.

    Args:
        name: the strategy's, for messages.
        routed: its result.
        num_tokens: T of the call.
        shape: of the layer.

    Raises:
        ValueError: other rows or slots than (T, top_k), or ids outside -1 to E - 1.
    """
    ids = routed.topk_ids
    if tuple(ids.shape) != (num_tokens, shape.top_k):
        raise ValueError(
            f"{name} gave topk_ids of shape {tuple(ids.shape)}; allowed: (num_tokens, top_k) = "
            f"({num_tokens}, {shape.top_k})"
        )
    if ids.device.type != "cpu" or torch.compiler.is_compiling() or num_tokens == 0:
        return
    low, high = (int(bound) for bound in torch.aminmax(ids))
    if low < -1 or high >= shape.num_experts:
        raise ValueError(
            f"{name} gave expert ids from {low} to {high}; allowed: global ids 0 to num_experts - 1 "
            f"= {shape.num_experts - 1}, and -1 for a slot to skip"
        )
