"""The calls that compare: what agrees, and what the kernel refuses."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs
import torch
from torch import Tensor

from tests.acceptance.cases import Case
from tests.conformance.compare import Counts, compare
from tests.conformance.inputs import draws, normal, tied
from tests.conformance.kernels import Kernel, joined
from tests.conformance.sizes import FEW_TOKENS, TOKENS, Planned
from typed_moe import InKernel

SEED = 20261123
EVERYWHERE = ("normal", "01")
"""Inputs that are run at every T; the others at `FEW_TOKENS`."""


@attrs.frozen(kw_only=True)
class Agreement:
    """What the calls of one case with one kind of input gave."""

    case: Case
    inputs: str
    counts: Counts


def agreements(kernel: Kernel, planned: Planned, device: torch.device) -> Iterator[Agreement]:
    """Run a case that the kernel takes on every input, in both dtypes of logits."""
    case, told = planned.case, planned.told
    assert isinstance(told, InKernel)
    for name, draw in draws(case).items():
        torch.manual_seed(SEED)
        with device:
            values, bias = draw(case, sum(_batches(name)))
        bias = passed_bias(told, bias)
        counts = Counts()
        for dtype in told.logits_dtypes:
            logits = values.to(dtype)
            chosen = [
                kernel(told, x, bias, case.top_k) for x in torch.split(logits, _batches(name))
            ]
            counts += compare(
                case,
                joined(chosen),
                logits,
                None if bias is None else bias.float(),
                tied=tied(case, name),
                score_error=planned.rules.score_error,
            )
        calls = len(told.logits_dtypes) * len(_batches(name))
        yield Agreement(case=case, inputs=name, counts=attrs.evolve(counts, calls=calls))


def _batches(name: str) -> list[int]:
    """The T of each call; a row's answer is its own, so that the calls are compared together."""
    return list(TOKENS if name in EVERYWHERE else FEW_TOKENS)


def passed_bias(told: InKernel, bias: Tensor | None) -> Tensor | None:
    """The bias as the runner passes it: rounded where the strategy allows that and says so."""
    return None if bias is None else bias.to(told.bias_dtype or bias.dtype)


def refuses(kernel: Kernel, planned: Planned, device: torch.device) -> str | None:
    """What the kernel's own check says of a size; None where it runs."""
    case = planned.case
    torch.manual_seed(SEED)
    with device:
        logits, bias = normal(case, 64)
    try:
        kernel(planned.anyway, logits, passed_bias(planned.anyway, bias), case.top_k)
        wait(device)
    except RuntimeError as refused:
        return first_line(refused)
    return None


def wait(device: torch.device) -> None:
    """A fault in a kernel is told at the next wait."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def first_line(refused: Exception) -> str:
    """What an error says, without the place in FlashInfer's source that says it."""
    lines = [line.strip() for line in str(refused).splitlines() if line.strip()]
    told = re.sub(r"^\w+ in function '\w+' at \S+: ", "", lines[0] if lines else "")
    return told or type(refused).__name__
