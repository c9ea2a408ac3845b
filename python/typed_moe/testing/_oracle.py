"""A float64 oracle: what a routing method and its experts compute, in another way.

Imports torch and attrs alone and takes plain values: nothing of the package's own maths, so
that a mistake there is not repeated here. Written from the methods' definitions: scores and
rules are a table, selection is k rounds of argmax, sums go through logarithms.

Shapes: T tokens, E experts, k chosen, G groups, H hidden size, I intermediate size, M = 2I for
a gated activation and I otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Literal, Protocol, final

import attrs
import torch
from torch import Tensor

SUM_EPSILON = 1e-20
"""In the denominators of DeepSeek's and MiniMax's renormalisation."""

FLOAT32_RESOLUTION = 2.0**-18
"""Relative. Scores nearer to each other than this may change places in float32: a sigmoid or an
exponential is good to a few units of 2^-24, and is added to a bias or to another score."""

GroupScore = Literal["max", "top2_sum"]


@final
@attrs.frozen(kw_only=True)
class _Rule:
    """One method: what is scored, by what it selects, and what becomes of the scores."""

    score: Literal["softmax", "chosen softmax", "sigmoid", "sqrt softplus", "logit"]
    by: Literal["logit", "score", "score + bias"]
    renormalize: bool | None = False  # None: as the setting says
    scaled: bool = False
    group_score: GroupScore | None = None  # None: as the setting says


_RULES: Mapping[str, _Rule] = MappingProxyType(
    {
        "Default": _Rule(score="softmax", by="logit"),
        "Renormalize": _Rule(score="chosen softmax", by="logit"),
        "RenormalizeNaive": _Rule(score="softmax", by="logit", renormalize=True),
        "TopK": _Rule(score="logit", by="logit"),
        "Sigmoid": _Rule(score="sigmoid", by="score"),
        "TopKSigmoid": _Rule(score="sigmoid", by="logit"),
        "SigmoidRenorm": _Rule(score="sigmoid", by="score", renormalize=True),
        "Llama4": _Rule(score="sigmoid", by="logit"),
        "MiniMax2": _Rule(score="sigmoid", by="score + bias", renormalize=True, scaled=True),
        "DeepSeekV3": _Rule(
            score="sigmoid",
            by="score + bias",
            renormalize=True,
            scaled=True,
            group_score="top2_sum",
        ),
        "BiasedSigmoid": _Rule(
            score="sigmoid", by="score + bias", scaled=True, group_score="top2_sum"
        ),
        "SqrtSoftplus": _Rule(
            score="sqrt softplus", by="score + bias", renormalize=True, scaled=True
        ),
        "ScaledSoftmax": _Rule(score="softmax", by="logit", renormalize=None, scaled=True),
        "GroupedSoftmax": _Rule(score="softmax", by="score", renormalize=None, scaled=True),
    }
)

ORACLE_METHODS: tuple[str, ...] = tuple(_RULES)
"""The methods that the oracle knows."""


@final
@attrs.frozen(kw_only=True, eq=False)
class OracleRouting:
    """The oracle's answer.

    Attributes:
        ids: (T, k) int64, best first.
        weights: (T, k) float64.
        margin: (T,) float64: by how much the last chosen is above the best that was left out,
            in experts and in groups, over the size of the numbers that were added up to get
            there. 0 is a tie, inf: nothing was left out.
    """

    ids: Tensor
    weights: Tensor
    margin: Tensor

    def undecided(self) -> Tensor:
        """(T,) bool: rows that float32 may decide the other way."""
        return self.margin < FLOAT32_RESOLUTION


def route_float64(
    router_logits: Tensor,
    e_score_correction_bias: Tensor | None,
    *,
    method: str,
    top_k: int,
    num_expert_group: int = 1,
    topk_group: int = 1,
    group_score: GroupScore = "top2_sum",
    norm_topk_prob: bool = False,
    routed_scaling_factor: float = 1.0,
    ids: Tensor | None = None,
) -> OracleRouting:
    """Route in float64, ties to the lower id.

    Args:
        router_logits: (T, E), finite.
        e_score_correction_bias: (E,), for the methods that add one.
        method: out of `ORACLE_METHODS`.
        top_k: k.
        num_expert_group: groups; like the settings below it is read where the method has it.
        topk_group: groups that are kept.
        group_score: what ranks a group: its best expert, or the sum of its two best.
        norm_topk_prob: whether the weights are divided by their sum.
        routed_scaling_factor: the factor in the weights.
        ids: (T, k) choices of somebody else, to be weighted instead of the oracle's own.

    Returns:
        Choices, weights, and how clear the choice was.

    Raises:
        ValueError: an unknown method, or one that adds a bias and got none.
    """
    rule = _RULES.get(method)
    if rule is None:
        raise ValueError(f"the oracle does not know {method!r}; allowed: {', '.join(_RULES)}")
    logits = router_logits.to(torch.float64)
    scores = _scores(rule, logits)
    by, size = _selection(rule, method, logits, scores, e_score_correction_bias)
    group_margin = torch.full(by.shape[:1], math.inf, dtype=torch.float64)
    if num_expert_group > 1:
        kind = rule.group_score or group_score
        kept, group_margin = _kept_groups(by, size, num_expert_group, topk_group, kind)
        by = torch.where(kept, by, -math.inf)
    own, expert_margin = _best(by, size, top_k)
    chosen = own if ids is None else ids.to(torch.int64)
    weights = scores.gather(1, chosen)
    if rule.score == "chosen softmax":
        picked = logits.gather(1, chosen)
        weights = torch.exp(picked - picked.logsumexp(dim=1, keepdim=True))
    if norm_topk_prob if rule.renormalize is None else rule.renormalize:
        weights = weights / (weights.sum(dim=1, keepdim=True) + SUM_EPSILON)
    if rule.scaled:
        weights = weights * routed_scaling_factor
    margin = torch.minimum(group_margin, expert_margin)
    return OracleRouting(ids=chosen, weights=weights, margin=margin)


def _scores(rule: _Rule, logits: Tensor) -> Tensor:
    """(T, E): what the weights are made of."""
    match rule.score:
        case "softmax" | "chosen softmax":
            return torch.exp(logits - logits.logsumexp(dim=1, keepdim=True))
        case "sigmoid":
            return torch.reciprocal(1.0 + torch.exp(-logits))
        case "sqrt softplus":
            # In two halves: log(1 + exp(x)) underflows to 0 long before exp(x / 2) does.
            return torch.where(
                logits < -30.0, torch.exp(logits / 2), torch.log1p(torch.exp(logits)).sqrt()
            )
        case "logit":
            return logits


def _selection(
    rule: _Rule, method: str, logits: Tensor, scores: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(T, E) what is compared, and the size of the numbers it was added up from."""
    if rule.by == "logit":
        return logits, logits.abs()
    if rule.by == "score":
        return scores, scores.abs()
    if bias is None:
        raise ValueError(f"{method} adds a correction bias and the oracle was given None")
    added = bias.to(torch.float64)
    return scores + added, scores.abs() + added.abs()


def _best(by: Tensor, size: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest of each row, ties to the lower index, and the margin to the next."""
    left = by.clone()
    taken = torch.zeros_like(by, dtype=torch.bool)
    chosen: list[Tensor] = []
    for _ in range(min(count + 1, by.shape[1])):
        # argmax gives the first of equals; where only -inf is left, the first not yet taken.
        first_free = (~taken).to(torch.int8).argmax(dim=1)
        best = torch.where(left.amax(dim=1) == -math.inf, first_free, left.argmax(dim=1))
        chosen.append(best)
        taken.scatter_(1, best.unsqueeze(1), value=True)
        left.scatter_(1, best.unsqueeze(1), -math.inf)
    margin = torch.full(by.shape[:1], math.inf, dtype=torch.float64)
    if len(chosen) > count:
        last, after = (index.unsqueeze(1) for index in chosen[count - 1 :])
        gap = (by.gather(1, last) - by.gather(1, after)).squeeze(1)
        scale = torch.maximum(size.gather(1, last), size.gather(1, after)).squeeze(1)
        margin = (gap / scale).nan_to_num(nan=0.0, posinf=math.inf)
    return torch.stack(chosen[:count], dim=1), margin


def _kept_groups(
    by: Tensor, size: Tensor, groups: int, kept: int, kind: GroupScore
) -> tuple[Tensor, Tensor]:
    """(T, E) bool, experts of the best groups; and the margin of that choice."""
    per_group = by.shape[1] // groups
    ranked = by.reshape(-1, groups, per_group).sort(dim=2, descending=True)
    sizes = size.reshape(-1, groups, per_group).gather(2, ranked.indices)
    count = 1 if kind == "max" else 2
    score, scale = ranked.values[..., :count].sum(dim=2), sizes[..., :count].sum(dim=2)
    best, margin = _best(score, scale, kept)
    mask = torch.zeros_like(score, dtype=torch.bool).scatter_(1, best, value=True)
    return mask.repeat_interleave(per_group, dim=1), margin


class PerExpert(Protocol):
    """**Protocol:** one tensor per expert: a stacked tensor, or something that makes them."""

    def __getitem__(self, expert: int, /) -> Tensor:
        """The tensor of an expert."""
        ...


@final
@attrs.frozen(kw_only=True, eq=False)
class OracleExperts:
    """Experts by their unquantised weights, in whatever dtype they are.

    Attributes:
        w13: per expert (M, H); of a gated activation the gate's rows, then the up projection's.
        w2: per expert (H, I).
        activation: `swiglu`, `swiglu_step`, `geglu`, `relu2`, `silu` or `gelu`.
        alpha, beta, limit: settings of `swiglu`, and the limit of `swiglu_step`.
        approximate: of `geglu` and `gelu`: `none` or `tanh`.
        w13_bias, w2_bias: per expert (M,) and (H,).
        round_intermediate: (n, I) float64 to what the second matrix reads of it; None: all of it.
    """

    w13: PerExpert
    w2: PerExpert
    activation: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    approximate: str = "none"
    w13_bias: PerExpert | None = None
    w2_bias: PerExpert | None = None
    round_intermediate: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, expert: int) -> Tensor:
        """One expert on its tokens: (n, H) float64 to (n, H) float64."""
        first = torch.nn.functional.linear(x, self.w13[expert].to(torch.float64))
        if self.w13_bias is not None:
            first = first + self.w13_bias[expert].to(torch.float64)
        hidden = self._activate(first)
        if self.round_intermediate is not None:
            hidden = self.round_intermediate(hidden)
        second = torch.nn.functional.linear(hidden, self.w2[expert].to(torch.float64))
        if self.w2_bias is not None:
            second = second + self.w2_bias[expert].to(torch.float64)
        return second

    def _activate(self, first: Tensor) -> Tensor:
        match self.activation:
            case "relu2":
                return torch.where(first > 0, first * first, 0.0)
            case "silu":
                return _swish(first, 1.0)
            case "gelu":
                return _gelu(first, self.approximate)
            case _:
                half = first.shape[1] // 2
                return self._gated(first[:, :half], first[:, half:])

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        top = math.inf if self.limit is None else self.limit
        bounded = torch.minimum(torch.maximum(up, up.new_tensor(-top)), up.new_tensor(top))
        match self.activation:
            case "swiglu":
                low = torch.minimum(gate, gate.new_tensor(top))
                return _swish(low, self.alpha) * (bounded + self.beta)
            case "swiglu_step":
                return torch.minimum(_swish(gate, 1.0), gate.new_tensor(top)) * bounded
            case "geglu":
                return _gelu(gate, self.approximate) * up
            case _:
                raise ValueError(f"the oracle does not know the activation {self.activation!r}")


def _swish(x: Tensor, alpha: float) -> Tensor:
    return x / (1.0 + torch.exp(-alpha * x))


def _gelu(x: Tensor, approximate: str) -> Tensor:
    if approximate == "tanh":
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * torch.erfc(-x / math.sqrt(2.0))


def experts_float64(
    hidden_states: Tensor,
    ids: Tensor,
    weights: Tensor,
    experts: OracleExperts,
    *,
    weight_on_input: bool = False,
) -> Tensor:
    """Sum over each token's experts of weight * expert(x), in float64.

    One expert at a time is turned into float64, and only those that a token goes to are asked
    for at all.

    Args:
        hidden_states: (T, H).
        ids: (T, k) integers; -1 is skipped.
        weights: (T, k).
        experts: by their weights.
        weight_on_input: expert(weight * x) instead.

    Returns:
        (T, H) float64.
    """
    x, factors = hidden_states.to(torch.float64), weights.to(torch.float64)
    output = torch.zeros_like(x)
    for expert in sorted({int(one) for one in ids.flatten().tolist()} - {-1}):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        factor = factors[token, slot].unsqueeze(1)
        if weight_on_input:
            output.index_add_(0, token, experts(factor * x[token], expert))
        else:
            output.index_add_(0, token, factor * experts(x[token], expert))
    return output
