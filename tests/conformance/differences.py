"""Where kernel and mathematics differ: rows that are no numbers, rounded biases, missing ones."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from tests.acceptance.cases import Case
from tests.conformance.compare import compare
from tests.conformance.inputs import normal
from tests.conformance.kernels import Chosen, Kernel
from tests.conformance.runs import SEED, first_line, passed_bias, wait
from tests.conformance.sizes import Planned, plan
from typed_moe import InKernel
from typed_moe.routing import BrokenRows
from typed_moe.routing._records import RowWeights


@attrs.frozen(kw_only=True)
class Broken:
    """What a kernel made of rows that are no numbers.

    Attributes:
        weights: by kind of row.
        valid: their ids are distinct, and of experts that exist.
        alone: a good row among them got what it gets by itself.
    """

    weights: BrokenRows
    valid: bool
    alone: bool


def broken_rows(kernel: Kernel, planned: Planned, device: torch.device, tokens: int) -> Broken:
    """Run T rows whose second to fourth are NaN, -inf, and numbers with one NaN."""
    case, told = planned.case, planned.anyway
    torch.manual_seed(SEED)
    with device:
        logits, bias = normal(case, tokens)
    alone = kernel(told, logits[:1].contiguous(), passed_bias(told, bias), case.top_k)
    logits[1], logits[2] = math.nan, -math.inf
    logits[3, case.num_experts // 2] = math.nan
    chosen = kernel(told, logits, passed_bias(told, bias), case.top_k)
    nan, infinite, one = (_weights(chosen.weights[row]) for row in (1, 2, 3))
    return Broken(
        weights=BrokenRows(nan=nan, minus_infinity=infinite, one_nan=one),
        valid=_valid(chosen.ids[1:4], case.num_experts),
        alone=_same(chosen, alone),
    )


def _weights(weights: Tensor) -> RowWeights:
    if bool(weights.isnan().all()):
        return "nan"
    return "zero" if bool((weights == 0).all()) else "other"


def _valid(ids: Tensor, num_experts: int) -> bool:
    ordered = ids.sort(dim=1).values
    inside = bool(((ordered >= 0) & (ordered < num_experts)).all())
    return inside and bool((ordered[:, 1:] > ordered[:, :-1]).all())


def _same(chosen: Chosen, alone: Chosen) -> bool:
    ids = torch.equal(chosen.ids[0], alone.ids[0])
    return ids and torch.equal(chosen.weights[0], alone.weights[0])


def rounded_bias(kernel: Kernel, case: Case, device: torch.device) -> tuple[int, int]:
    """(decided rows, of these those with other experts) where float32 biases are passed."""
    told = plan(case).anyway
    torch.manual_seed(SEED)
    with device:
        logits, bias = normal(case, 2048)
    counts = compare(
        case,
        kernel(told, logits, bias, case.top_k),
        logits,
        bias,
        score_error=plan(case).rules.score_error,
    )
    return counts.decided, counts.wrong


def null_bias(kernel: Kernel, case: Case, device: torch.device) -> str:
    """What a missing bias is to a biased method: "zeros", or what its fault says.

    A fault ends the process's CUDA context.
    """
    told = plan(case).anyway
    assert isinstance(told, InKernel)
    torch.manual_seed(SEED)
    with device:
        logits, bias = normal(case, 64)
    assert bias is not None
    try:
        chosen = kernel(told, logits, None, case.top_k)
        wait(device)
    except RuntimeError as fault:
        return first_line(fault)
    zeros = torch.zeros_like(bias)
    error = plan(case).rules.score_error
    agrees = compare(case, chosen, logits, zeros, score_error=error).agrees
    return "zeros" if agrees else "something else"
