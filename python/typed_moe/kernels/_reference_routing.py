"""Routing as a fused kernel does it: by the method's name and its arguments, in float32.

Written from FlashInfer's policy table (`RoutingCustomPolicy.cuh`), not from the strategies: a
strategy whose kernel label and whose own maths disagree is caught by comparing the two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import attrs
import torch
from torch import Tensor

from typed_moe.kernels.args import FromLogits, Precomputed
from typed_moe.routing import as_global_ids

_After = Literal["nothing", "softmax", "sigmoid", "divide", "divide_biased"]


@final
@attrs.frozen(kw_only=True)
class _Policy:
    """What is done to the logits before the top-k, and to the chosen ones after it."""

    before: Literal["nothing", "softmax", "sigmoid"]
    after: _After
    biased: bool = False


_POLICIES: Mapping[str, _Policy] = {
    "Default": _Policy(before="softmax", after="nothing"),
    "Renormalize": _Policy(before="nothing", after="softmax"),
    "RenormalizeNaive": _Policy(before="nothing", after="softmax"),
    "TopK": _Policy(before="nothing", after="nothing"),
    "Sigmoid": _Policy(before="sigmoid", after="nothing"),
    "TopKSigmoid": _Policy(before="nothing", after="sigmoid"),
    "SigmoidRenorm": _Policy(before="sigmoid", after="divide"),
    "Llama4": _Policy(before="nothing", after="sigmoid"),
    "DeepSeekV3": _Policy(before="sigmoid", after="divide_biased", biased=True),
    "MiniMax2": _Policy(before="sigmoid", after="divide_biased", biased=True),
}

METHODS = tuple(_POLICIES)
"""The methods that the reference kernel routes by itself."""

_LOWEST = torch.finfo(torch.float32).min


def route(args: FromLogits, top_k: int) -> Precomputed:
    """Expert ids (T, k) and weights (T, k) float32 for a call from logits."""
    policy = _POLICIES[args.routing_method_type]
    logits = args.routing_logits.float()
    broken = logits.isnan().any(-1, keepdim=True) | logits.isneginf().all(-1, keepdim=True)
    logits = logits.masked_fill(broken, 0.0)
    scores = _scores(policy.before, logits)
    ranking = scores
    if policy.biased:
        assert args.routing_bias is not None, "a biased method is called with a bias"
        ranking = scores + args.routing_bias.float()
        ranking = _outside_groups_last(ranking, args.n_group or 1, args.topk_group or 1)
    ids = _pick(ranking, top_k)
    weights = _weights(policy.after, scores.gather(1, ids), divide=args.norm_topk_prob)
    if args.routed_scaling_factor is not None:
        weights = weights * args.routed_scaling_factor
    broken = broken | ~weights.isfinite().all(-1, keepdim=True)
    weights = weights.masked_fill(broken, 0.0)
    if args.routing_replay_out is not None:
        args.routing_replay_out[: ids.shape[0]].copy_(ids)
    return Precomputed(topk_ids=as_global_ids(ids.int()), topk_weights=weights)


def _scores(before: Literal["nothing", "softmax", "sigmoid"], logits: Tensor) -> Tensor:
    """In float64 on the way: PyTorch's CPU loops do not round equal float32 inputs alike."""
    if before == "softmax":
        return logits.double().softmax(1).float()
    return logits.double().sigmoid().float() if before == "sigmoid" else logits


def _weights(after: _After, chosen: Tensor, *, divide: bool) -> Tensor:
    if after == "softmax":
        return chosen.softmax(1)
    if after == "sigmoid":
        return chosen.sigmoid()
    if after == "divide" and divide:
        return chosen / chosen.sum(1, keepdim=True).clamp_min(1e-20)
    if after == "divide_biased":
        return chosen / (chosen.sum(1, keepdim=True) + 1e-20)
    return chosen


def _outside_groups_last(ranking: Tensor, n_group: int, topk_group: int) -> Tensor:
    """Ranking with -inf outside the best groups by the sum of their two best."""
    if n_group <= 1:
        return ranking
    size = ranking.shape[1] // n_group
    groups = ranking.reshape(-1, n_group, size)
    two_best = groups.sort(dim=2).values[:, :, -2:].sum(2)
    chosen = _pick(two_best, topk_group)
    outside = torch.ones_like(two_best, dtype=torch.bool).scatter(1, chosen, value=False)
    return ranking.masked_fill(outside.repeat_interleave(size, dim=1), -torch.inf)


def _pick(ranking: Tensor, count: int) -> Tensor:
    """The `count` best columns, one at a time; `argmax` gives the first of equals."""
    left = ranking.clamp_min(_LOWEST)
    picked = []
    for _ in range(count):
        best = left.argmax(dim=1, keepdim=True)
        picked.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(picked, dim=1)
