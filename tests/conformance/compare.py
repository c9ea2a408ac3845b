"""One call of a kernel beside the strategy and the float64 oracle."""

from __future__ import annotations

import attrs
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import Case
from tests.conformance.kernels import Chosen
from typed_moe import RoutingShape


@attrs.frozen(kw_only=True)
class Counts:
    """What a number of calls gave.

    Attributes:
        calls, rows: how much was run.
        decided: rows whose experts the float64 oracle is sure of, exact ties included.
        wrong: of these, rows where the kernel's experts are not the oracle's.
        apart: of these, rows where the strategy's experts are not the kernel's.
        other: rows that are not decided, where the kernel's experts are not the strategy's.
        broken: rows with an id twice, an id of no expert, or a weight that is not finite.
        coarse: rows with a weight that the stated error of the kernel's scores may move by more
            than half a bfloat16's step.
        weight_error: the largest distance of a weight from the exact one of its expert, over a
            bfloat16's step plus what the stated error of the scores may do to it. Rounding alone
            gives up to 0.5.
    """

    calls: int = 0
    rows: int = 0
    decided: int = 0
    wrong: int = 0
    apart: int = 0
    other: int = 0
    broken: int = 0
    coarse: int = 0
    weight_error: float = 0.0

    def __add__(self, more: Counts) -> Counts:
        """Both together."""
        return Counts(
            calls=self.calls + more.calls,
            rows=self.rows + more.rows,
            decided=self.decided + more.decided,
            wrong=self.wrong + more.wrong,
            apart=self.apart + more.apart,
            other=self.other + more.other,
            broken=self.broken + more.broken,
            coarse=self.coarse + more.coarse,
            weight_error=max(self.weight_error, more.weight_error),
        )

    @property
    def agrees(self) -> bool:
        """Every decided row has its experts, and every weight is as near as is stated."""
        return self.wrong + self.apart + self.broken == 0 and self.weight_error <= 1.0


def compare(
    case: Case,
    chosen: Chosen,
    logits: Tensor,
    bias: Tensor | None,
    *,
    tied: bool = False,
    score_error: float = 0.0,
) -> Counts:
    """Count how the kernel's answer, the strategy's and the oracle's differ.

    The strategy and the oracle get the values that the kernel got: logits and bias as rounded.

    Args:
        case: the strategy, and the oracle's rule for it.
        chosen: what the kernel gave.
        logits: (T, E) as passed.
        bias: (E,) as passed, in float32, or None.
        tied: near ties are exact ones here, so that every row is decided.
        score_error: how far the kernel's scores may be off in themselves, as stated.
    """
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    routed = case.strategy.select_experts(logits, bias, shape=shape)
    # The oracle makes its own tensors, on the CPU where nothing says otherwise.
    with torch.device(logits.device):
        expected = oracle.route(case.rule, logits, bias, case.top_k, score_error=score_error)
        valid = chosen.ids.long().clamp(0, case.num_experts - 1)
        exact = oracle.weights_of(case.rule, logits, valid)
        moved = _moved(case.rule, logits.double(), valid, exact, score_error)
    ids, strategy_ids = _ordered(chosen.ids), _ordered(routed.topk_ids)
    decided = torch.ones_like(expected.decided) if tied else expected.decided
    right = (ids == _ordered(expected.ids)).all(dim=1)
    same = (ids == strategy_ids).all(dim=1)
    broken = _broken(ids, chosen.weights, case.num_experts)
    step = _bf16_step(exact)
    off = (chosen.weights.double() - exact).abs() / (step + moved)
    return Counts(
        rows=len(ids),
        decided=int(decided.sum()),
        wrong=int((decided & ~right).sum()),
        apart=int((decided & ~same).sum()),
        other=int((~decided & ~same).sum()),
        broken=int(broken.sum()),
        coarse=int((moved > 0.5 * step).any(dim=1).sum()),
        weight_error=float(off[~broken].max()) if bool((~broken).any()) else 0.0,
    )


def _ordered(ids: Tensor) -> Tensor:
    return ids.long().sort(dim=1).values


def _broken(ordered: Tensor, weights: Tensor, num_experts: int) -> Tensor:
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
    foreign = ((ordered < 0) | (ordered >= num_experts)).any(dim=1)
    return twice | foreign | ~weights.isfinite().all(dim=1)


def _bf16_step(exact: Tensor) -> Tensor:
    """2^(e - 8) for a value in [2^(e - 1), 2^e).

    Weights below float32's normal range are 0 to a kernel built with fast arithmetic.
    """
    step = torch.exp2(torch.frexp(exact).exponent.double() - 8)
    return step.clamp(min=torch.finfo(torch.float32).tiny)


def _moved(
    rule: oracle.Rule, logits: Tensor, ids: Tensor, exact: Tensor, score_error: float
) -> Tensor:
    """How far a weight may be from the exact one if every score is off by up to `score_error`.

    Plain: as far as the score is, times the scale. Divided by the sum S of k scores: between
    (s - e) / (S + k e) and (s + e) / (S - k e), and nowhere in particular between 0 and the scale
    if S is k e or less.
    """
    if not score_error or rule.weigh != "sigmoid":
        return torch.zeros_like(exact)
    if not rule.divide:
        return torch.full_like(exact, score_error * rule.scale)
    scores = oracle.score("sigmoid", logits).gather(1, ids)
    total, slack = scores.sum(dim=1, keepdim=True), score_error * ids.shape[1]
    most = rule.scale * (scores + score_error) / (total - slack).clamp(min=1e-300)
    least = rule.scale * (scores - score_error).clamp(min=0.0) / (total + slack)
    far = torch.maximum(most - exact, exact - least)
    return torch.where(total > slack, far, torch.full_like(far, rule.scale))
