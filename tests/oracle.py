"""What a mixture-of-experts layer means, in float64: the expected value of every other test.

Imports nothing of the package. Written from the models' published rules (routing) and from the
definitions of the activations (experts), one plain step after the other.

Shapes: T tokens, E experts, k chosen, G groups, H hidden size, I intermediate size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

Score = Literal["logits", "softmax", "sigmoid", "sqrt_softplus"]
Kind = Literal["swiglu", "swiglu_step", "geglu", "geglu_tanh", "relu2", "silu", "gelu", "gelu_tanh"]

EPS32 = 2.0**-23
FLOOR32 = 2.0**-120
"""Below this, float32 arithmetic on scores is no longer relative."""


# --- routing --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One routing method as arithmetic.

    `rank` orders the experts and `weigh` gives the weights of the chosen ones. `divide` divides
    those by their sum: plus `epsilon`, and not by less than `floor`. `saturates`: the ranking is
    defined on scores rounded to float32, where large ones are equal.
    """

    rank: Score
    weigh: Score
    biased: bool = False
    num_expert_group: int = 1
    topk_group: int = 1
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    divide: bool = False
    epsilon: float = 0.0
    floor: float = 0.0
    scale: float = 1.0
    saturates: bool = False
    on_input: bool = False


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Default": Rule(rank="softmax", weigh="softmax"),
        "Renormalize": Rule(rank="logits", weigh="softmax", divide=True),
        "RenormalizeNaive": Rule(rank="softmax", weigh="softmax", divide=True),
        "DeepSeekV3": Rule(
            rank="sigmoid", weigh="sigmoid", biased=True, divide=True, epsilon=1e-20
        ),
        "Llama4": Rule(rank="logits", weigh="sigmoid", on_input=True),
        "TopK": Rule(rank="logits", weigh="logits"),
        "SigmoidRenorm": Rule(
            rank="sigmoid", weigh="sigmoid", divide=True, floor=1e-20, saturates=True
        ),
        "MiniMax2": Rule(rank="sigmoid", weigh="sigmoid", biased=True, divide=True, epsilon=1e-20),
        "Sigmoid": Rule(rank="sigmoid", weigh="sigmoid", saturates=True),
        "TopKSigmoid": Rule(rank="logits", weigh="sigmoid"),
        "BiasedSigmoid": Rule(rank="sigmoid", weigh="sigmoid", biased=True),
        "SqrtSoftplus": Rule(
            rank="sqrt_softplus", weigh="sqrt_softplus", biased=True, divide=True, epsilon=1e-20
        ),
        "ScaledSoftmax": Rule(rank="softmax", weigh="softmax"),
        "GroupedSoftmax": Rule(rank="softmax", weigh="softmax", epsilon=1e-20),
    }
)
"""Every method at its plainest; `dataclasses.replace` gives it groups, a scale and the like."""


@dataclass(frozen=True, kw_only=True)
class Routing:
    """ids (T, k), best first; weights (T, k) float64; decided (T,): no near tie at the border."""

    ids: Tensor
    weights: Tensor
    decided: Tensor


def route(
    rule: Rule, logits: Tensor, bias: Tensor | None, top_k: int, *, score_error: float = 0.0
) -> Routing:
    """The experts of every token. Ties go to the lower id; a broken row gets weights 0.

    `score_error`: how far the scores that this is compared with may be off, beyond float32.
    """
    x, broken = _usable(logits)
    ranking, unsure = _ranking(rule, x, bias)
    unsure = unsure + score_error
    decided = torch.ones(x.shape[0], dtype=torch.bool)
    if rule.num_expert_group > 1:
        ranking, decided = _keep_groups(rule, ranking, unsure)
    order = _order(ranking)
    ids = order[:, :top_k]
    if top_k < x.shape[1] and not _exact(rule):
        decided = decided & _apart(ranking, unsure, order, top_k)
    return Routing(
        ids=ids, weights=_weights(rule, x, ids, broken), decided=decided & ~broken.squeeze(1)
    )


def weights_of(rule: Rule, logits: Tensor, ids: Tensor) -> Tensor:
    """(T, k) float64: what the rule weighs these experts with, whoever chose them."""
    x, broken = _usable(logits)
    return _weights(rule, x, ids.long(), broken)


def score(kind: Score, x: Tensor) -> Tensor:
    """(T, E) float64 logits to scores."""
    if kind == "logits":
        return x
    if kind == "softmax":
        shifted = torch.exp(x - x.max(dim=1, keepdim=True).values)
        return shifted / shifted.sum(dim=1, keepdim=True)
    if kind == "sigmoid":
        return 1.0 / (1.0 + torch.exp(-x))
    return torch.log1p(torch.exp(-x.abs())).add(x.clamp(min=0.0)).sqrt()


def _usable(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Logits in float64, and which rows (T, 1) hold a NaN or -inf alone; those become zeros."""
    x = logits.double()
    broken = x.isnan().any(dim=1, keepdim=True) | (x == -math.inf).all(dim=1, keepdim=True)
    return torch.where(broken, torch.zeros_like(x), x), broken


def _ranking(rule: Rule, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the experts are ordered by, and how far float32 may be from it."""
    values = score(rule.rank, x)
    size = values.abs()
    steps = 8.0 + x.abs()
    if rule.rank == "softmax":
        steps = steps + (x.max(dim=1, keepdim=True).values - x)
    if rule.saturates:
        values = values.float().double()
    if rule.biased:
        assert bias is not None
        values = values + bias.double()
        size = torch.maximum(size, torch.maximum(bias.double().abs(), values.abs()))
    return values, (steps * EPS32 * size).nan_to_num(0.0) + FLOOR32


def _exact(rule: Rule) -> bool:
    """Whether the ranking is the logits themselves, which no implementation rounds."""
    return rule.rank == "logits" and not rule.biased and rule.num_expert_group == 1


def _order(values: Tensor) -> Tensor:
    """Columns from the largest value to the smallest, the lower one first among equals."""
    return torch.sort(values, dim=1, descending=True, stable=True).indices


def _apart(values: Tensor, unsure: Tensor, order: Tensor, count: int) -> Tensor:
    """(T,) whether every chosen column is surely above every other."""
    chosen, others = order[:, :count], order[:, count:]
    least = (values - unsure).gather(1, chosen).min(dim=1).values
    most = (values + unsure).gather(1, others).max(dim=1).values
    return least > most


def _keep_groups(rule: Rule, ranking: Tensor, unsure: Tensor) -> tuple[Tensor, Tensor]:
    """-inf outside the best groups, and which rows' groups are surely these."""
    tokens, experts = ranking.shape
    size = experts // rule.num_expert_group
    grouped = ranking.reshape(tokens, rule.num_expert_group, size)
    best = grouped.sort(dim=2, descending=True).values
    wanted = 1 if rule.group_score == "max" else 2
    group = best[:, :, :wanted].sum(dim=2)
    group_unsure = wanted * unsure.reshape(tokens, rule.num_expert_group, size).amax(dim=2)
    order = _order(group)
    kept = torch.zeros_like(group, dtype=torch.bool).scatter(1, order[:, : rule.topk_group], True)
    decided = torch.ones(tokens, dtype=torch.bool)
    if rule.topk_group < rule.num_expert_group:
        decided = _apart(group, group_unsure, order, rule.topk_group)
    masked = torch.where(kept.unsqueeze(2), grouped, torch.full_like(grouped, -math.inf))
    return masked.reshape(tokens, experts), decided


def _weights(rule: Rule, x: Tensor, ids: Tensor, broken: Tensor) -> Tensor:
    if rule.weigh == "softmax" and rule.divide:
        # exp(x) over its sum, shifted by the largest chosen one: no underflow of all of them.
        weights = score("softmax", x.gather(1, ids))
    else:
        weights = score(rule.weigh, x).gather(1, ids)
        if rule.divide:
            total = weights.sum(dim=1, keepdim=True) + rule.epsilon
            weights = weights / total.clamp(min=rule.floor)
    return torch.where(broken, torch.zeros_like(weights), weights * rule.scale)


def dense(ids: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    """(T, E) float64: each token's weight on every expert; ids of -1 are left out."""
    out = torch.zeros(ids.shape[0], num_experts + 1, dtype=torch.float64)
    out.scatter_add_(1, ids.long() + 1, weights.double())
    return out[:, 1:]


# --- experts --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Act:
    """An expert's activation and its settings."""

    kind: Kind = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    @property
    def gated(self) -> bool:
        """Whether the expert has a gate projection."""
        return self.kind in ("swiglu", "swiglu_step", "geglu", "geglu_tanh")


def activate(act: Act, gate: Tensor | None, up: Tensor) -> Tensor:
    """(n, I) float64."""
    if act.kind == "relu2":
        return torch.where(up > 0, up * up, torch.zeros_like(up))
    if act.kind == "silu":
        return up * score("sigmoid", up)
    if act.kind in ("gelu", "gelu_tanh"):
        return _gelu(up, tanh=act.kind == "gelu_tanh")
    assert gate is not None
    if act.kind in ("geglu", "geglu_tanh"):
        return _gelu(gate, tanh=act.kind == "geglu_tanh") * up
    limit = math.inf if act.limit is None else act.limit
    up = torch.minimum(torch.maximum(up, torch.full_like(up, -limit)), torch.full_like(up, limit))
    if act.kind == "swiglu_step":
        return torch.minimum(gate * score("sigmoid", gate), torch.full_like(gate, limit)) * up
    gate = torch.minimum(gate, torch.full_like(gate, limit))
    return gate * score("sigmoid", act.alpha * gate) * (up + act.beta)


def _gelu(x: Tensor, *, tanh: bool) -> Tensor:
    if tanh:
        return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a whole layer as plain matrices: up (E, I, H), down (E, H, I)."""

    up: Tensor
    down: Tensor
    gate: Tensor | None = None
    up_bias: Tensor | None = None
    gate_bias: Tensor | None = None
    down_bias: Tensor | None = None

    @property
    def count(self) -> int:
        """E, fused shared experts included."""
        return self.up.shape[0]


def same(values: Tensor) -> Tensor:
    """No rounding between the two matrices."""
    return values


def expert(
    experts: Experts,
    number: int,
    x: Tensor,
    act: Act,
    rounding: Callable[[Tensor], Tensor] = same,
) -> Tensor:
    """(n, H) float64: down @ rounding(activation(gate @ x, up @ x))."""

    def matrix(stack: Tensor, bias: Tensor | None, values: Tensor) -> Tensor:
        product = values @ stack[number].double().T
        return product if bias is None else product + bias[number].double()

    up = matrix(experts.up, experts.up_bias, x.double())
    gate = None if experts.gate is None else matrix(experts.gate, experts.gate_bias, x.double())
    hidden = rounding(activate(act, gate, up))
    return matrix(experts.down, experts.down_bias, hidden)


def moe(
    experts: Experts,
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    act: Act,
    *,
    on_input: bool = False,
    local: range | None = None,
    rounding: Callable[[Tensor], Tensor] = same,
) -> Tensor:
    """(T, H) float64: the sum over slots of weight * expert(x), or of expert(weight * x).

    Slots with an id outside `local` (all experts if None), -1 included, add nothing.
    """
    mine = range(experts.count) if local is None else local
    out = torch.zeros(x.shape[0], x.shape[1], dtype=torch.float64)
    for number in mine:
        token, slot = (ids == number).nonzero(as_tuple=True)
        if not len(token):
            continue
        weight = weights[token, slot].double().unsqueeze(1)
        rows = x[token].double()
        if on_input:
            y = expert(experts, number, rows * weight, act, rounding)
        else:
            y = expert(experts, number, rows, act, rounding) * weight
        out.index_add_(0, token, y)
    return out


def with_shared(routing: Routing, num_experts: int, count: int) -> Routing:
    """Every token also goes to the experts E, E + 1, ... with weight 1."""
    tokens = routing.ids.shape[0]
    shared = torch.arange(num_experts, num_experts + count).expand(tokens, count)
    ones = torch.ones(tokens, count, dtype=torch.float64)
    return replace(
        routing,
        ids=torch.cat((routing.ids, shared), dim=1),
        weights=torch.cat((routing.weights, ones), dim=1),
    )


def layer(
    rule: Rule,
    experts: Experts,
    x: Tensor,
    logits: Tensor,
    bias: Tensor | None,
    *,
    top_k: int,
    act: Act,
    num_shared: int = 0,
) -> Tensor:
    """(T, H) float64: the whole layer, routing and experts."""
    routing = route(rule, logits, bias, top_k)
    if num_shared:
        routing = with_shared(routing, logits.shape[1], num_shared)
    return moe(experts, x, routing.ids, routing.weights, act, on_input=rule.on_input)
