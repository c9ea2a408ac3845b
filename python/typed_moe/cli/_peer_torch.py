"""A peer: `torch._grouped_mm` with the rest of the layer in PyTorch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_weights import StoredLayer
from typed_moe.cli._peer import Built, Runnable
from typed_moe.cli._peer_routing import route_in_torch
from typed_moe.config import Bf16, Swiglu
from typed_moe.routing import Refused

_ROUNDINGS = 6
"""Gate, up, their factors, and each slot's weighted output are bfloat16 tensors on the way."""


@final
@attrs.frozen(kw_only=True)
class TorchGroupedMm:
    """Route, sort the slots, two grouped products, weigh, un-sort, add up: no loop, no wait."""

    name: str = "torch"

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        """Over the stored tensors themselves."""
        first = stored[0]
        if not hasattr(torch, "_grouped_mm"):
            return Refused(f"torch {torch.__version__} has no _grouped_mm")
        if not isinstance(first.quant, Bf16):
            return Refused("torch._grouped_mm takes bfloat16 alone")
        if not isinstance(first.shape.activation, Swiglu):
            return Refused(f"is written out for SwiGLU; this is {first.shape.activation.name}")
        return Built(
            layers=tuple(_layer(one) for one in stored),
            about=f"torch {torch.__version__}, _grouped_mm and PyTorch's operators",
            roundings=_ROUNDINGS,
        )


def _layer(stored: StoredLayer) -> Runnable:
    shape, bias = stored.shape, stored.correction_bias
    # As the product takes them: (E, K, N).
    w13, w2 = (stored.state[f"{name}_weight"].transpose(1, 2) for name in ("w13", "w2"))
    biases = [_in_bf16(stored.state.get(f"{name}_weight_bias")) for name in ("w13", "w2")]
    experts, top_k = shape.num_experts, shape.top_k
    weigh_input = shape.routing.apply_router_weight_on_input
    every = torch.arange(experts, device=w13.device)

    def run(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        tokens, width = hidden_states.shape
        routed = route_in_torch(shape, router_logits, bias)
        sorted_ids, order = torch.sort(routed.topk_ids.reshape(-1))
        weights = routed.topk_weights.reshape(-1, 1)[order]
        ends = torch.searchsorted(sorted_ids, every, right=True, out_int32=True)
        x = hidden_states[order // top_k]
        if weigh_input:
            x = (x * weights).to(torch.bfloat16)
        first = torch._grouped_mm(x, w13, offs=ends)  # noqa: SLF001 - torch 2.8 has no public one
        if biases[0] is not None:
            first = first + biases[0][sorted_ids]
        between = _swiglu(first, shape.activation)
        second = torch._grouped_mm(between, w2, offs=ends)  # noqa: SLF001
        if biases[1] is not None:
            second = second + biases[1][sorted_ids]
        weighted = second if weigh_input else second * weights.to(torch.bfloat16)
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return weighted[back].view(tokens, top_k, width).sum(dim=1)

    return run


def _in_bf16(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.bfloat16()


def _swiglu(first: Tensor, activation: object) -> Tensor:
    """(n, 2I) to (n, I), gate rows first."""
    assert isinstance(activation, Swiglu), "build refuses the others"
    gate, up = first.chunk(2, dim=-1)
    if activation == Swiglu():
        return torch.nn.functional.silu(gate) * up
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)
