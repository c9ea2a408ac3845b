"""The few tensor steps that strategies share. Each is one idea; none knows a strategy.

Shapes: T tokens, E experts, k chosen, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from typed_moe.routing._records import BiasRule, Routed, RoutingShape

SUM_EPSILON = 1e-20
"""Added to a sum of weights before dividing by it: DeepSeek's own value, and FlashInfer's."""

_DTYPE_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def check_inputs(
    name: str,
    router_logits: Tensor,
    e_score_correction_bias: Tensor | None,
    *,
    shape: RoutingShape,
    bias: BiasRule,
    minimum: torch.dtype | None = None,
) -> None:
    """Refuse tensors that are not the layer's, in a sentence. Looks at metadata only.

    Raises:
        ValueError: wrong shape or device, or a bias that is missing or unwanted.
        TypeError: logits that are no floating point, or less precise than `minimum`.
    """
    _check_logits(name, router_logits, shape, minimum)
    if bias is BiasRule.NONE:
        if e_score_correction_bias is not None:
            raise ValueError(
                f"{name} has no e_score_correction_bias and was given one of shape "
                f"{tuple(e_score_correction_bias.shape)}; pass None, or choose a strategy that "
                "adds a bias (DeepSeekV3, MiniMax2)"
            )
        return
    if e_score_correction_bias is None:
        raise ValueError(
            f"{name} selects with an e_score_correction_bias and was given None; pass the "
            f"checkpoint's ({shape.num_experts},) tensor, or zeros if the model has none"
        )
    if tuple(e_score_correction_bias.shape) != (shape.num_experts,):
        raise ValueError(
            f"e_score_correction_bias has shape {tuple(e_score_correction_bias.shape)}; "
            f"allowed: (num_experts,) = ({shape.num_experts},)"
        )
    if e_score_correction_bias.device != router_logits.device:
        raise ValueError(
            f"e_score_correction_bias is on {e_score_correction_bias.device} and router_logits "
            f"on {router_logits.device}; move one of them"
        )


def _check_logits(
    name: str, router_logits: Tensor, shape: RoutingShape, minimum: torch.dtype | None
) -> None:
    if router_logits.dim() != 2 or router_logits.shape[1] != shape.num_experts:
        raise ValueError(
            f"router_logits has shape {tuple(router_logits.shape)}; allowed: (num_tokens, "
            f"num_experts) = (T, {shape.num_experts})"
        )
    if router_logits.dtype not in _DTYPE_BITS:
        raise TypeError(
            f"router_logits is {router_logits.dtype}; allowed: float32, bfloat16, float16, float64"
        )
    if minimum is not None and _DTYPE_BITS[router_logits.dtype] < _DTYPE_BITS[minimum]:
        raise TypeError(
            f"{name} asks for router_logits of {minimum} and was given {router_logits.dtype}: "
            "rounding them first changes which experts are chosen. Run the gate in "
            f"{minimum}, or allow it with {name}(router_logits_dtype={router_logits.dtype})"
        )


def usable_rows(logits: Tensor) -> Tensor:
    """(T, 1) bool: rows that hold no NaN and something above -inf."""
    broken = logits.isnan().any(dim=-1) | (logits == -torch.inf).all(dim=-1)
    return ~broken.unsqueeze(-1)


def float_logits(router_logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float32 with unusable rows set to 0, and which rows are usable.

    Zeros in place of NaN keep the ids of such a row valid and distinct; `routed` then sets
    its weights to 0.
    """
    logits = router_logits.float()
    usable = usable_rows(logits)
    return torch.where(usable, logits, 0.0), usable


def top_k_ids(scores: Tensor, k: int) -> Tensor:
    """(T, k) int64 ids of the k largest scores, best first, ties to the lower id.

    A stable sort, because `torch.topk` promises no order among equals.
    """
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices[:, :k]


def routed(ids: Tensor, weights: Tensor, usable: Tensor) -> Routed:
    """The result in its dtypes, with weight 0 on rows that are not usable."""
    weights = torch.where(usable & weights.isfinite().all(dim=-1, keepdim=True), weights, 0.0)
    return Routed(topk_ids=ids.to(torch.int32), topk_weights=weights.float())


def score(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    """function(logits) in float32, the same bits for the same logit wherever it lies.

    PyTorch's vectorised CPU loops round the last few elements of a chunk otherwise than the
    rest, by one unit in the last place: equal logits would not tie, and which expert wins
    would depend on E. In float64 the difference is lost in the rounding to float32.
    """
    if logits.device.type == "cpu":
        return function(logits.double()).float()
    return function(logits)


def sqrt_softplus(logits: Tensor) -> Tensor:
    """sqrt(log(1 + exp(x))), without underflow.

    Below -20, softplus(x) is exp(x) to float32's precision; exp(x / 2) is its root and stays a
    normal number down to x = -174, where exp(x) has long been 0.
    """
    return torch.where(
        logits < -20.0, torch.exp(logits / 2.0), torch.nn.functional.softplus(logits).sqrt()
    )


def keep_best_groups(
    scores: Tensor,
    *,
    num_expert_group: int,
    topk_group: int,
    group_score: Literal["max", "top2_sum"],
) -> Tensor:
    """Scores (T, E) with -inf on every expert outside the `topk_group` best groups.

    A group's score is its best expert's (`max`) or the sum of its two best (`top2_sum`).
    -inf and not 0: a masked expert must lose to a kept one whose biased score is negative.
    """
    if num_expert_group == 1:
        return scores
    groups = scores.reshape(scores.shape[0], num_expert_group, scores.shape[1] // num_expert_group)
    best = groups.topk(2 if group_score == "top2_sum" else 1, dim=-1).values.sum(dim=-1)
    kept = torch.zeros_like(best, dtype=torch.bool)
    kept = kept.scatter(-1, top_k_ids(best, topk_group), value=True)
    return groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).reshape(scores.shape)
