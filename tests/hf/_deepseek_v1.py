"""DeepSeekMoE-16B's published rule in plain torch; transformers does not have the model.

From `modeling_deepseek.py` of deepseek-ai/deepseek-moe-16b-base (classes MoEGate, DeepseekMoE,
DeepseekMLP): softmax over all experts, the k best, divided by their sum plus 1e-20 only where
`top_k > 1 and norm_topk_prob`; the shared experts are one wider expert whose output is added.
Written here from that rule, expert by expert and token by token.
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override


@final
class DeepseekMLP(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return output


def published_rule(logits: Tensor, top_k: int, *, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """(T, k) ids and weights."""
    scores = logits.softmax(dim=-1)
    weights, ids = scores.topk(top_k, dim=-1)
    if top_k > 1 and norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights


@final
class DeepseekMoE(nn.Module):
    """The block: chosen experts by weight, plus the shared ones."""

    def __init__(
        self, *, hidden: int, width: int, experts: int, top_k: int, shared: int, norm: bool
    ) -> None:
        super().__init__()
        self.top_k, self.norm = top_k, norm
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = nn.ModuleList(DeepseekMLP(hidden, width) for _ in range(experts))
        self.shared_experts = DeepseekMLP(hidden, shared * width)

    @override
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.shared_experts(x)
        ids, weights = published_rule(self.gate(x), self.top_k, norm_topk_prob=self.norm)
        for row, token in enumerate(x):
            chosen = zip(ids[row].tolist(), weights[row], strict=True)
            output[row] += torch.stack([w * self.experts[e](token) for e, w in chosen]).sum(dim=0)
        return output
