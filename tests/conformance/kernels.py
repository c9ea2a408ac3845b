"""FlashInfer's routing kernels as one function: what a strategy tells a kernel, to ids and weights."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import attrs
import torch
from torch import Tensor

from tests.acceptance.cases import Case
from typed_moe import InKernel
from typed_moe.testing._flashinfer_routing import load_routing_library, routing_kernels


@attrs.frozen(kw_only=True, eq=False)
class Chosen:
    """(T, k) int32 ids and bfloat16 weights."""

    ids: Tensor
    weights: Tensor


def joined(parts: Sequence[Chosen]) -> Chosen:
    """The answers of several calls, one below the other."""
    return Chosen(
        ids=torch.cat([part.ids for part in parts]),
        weights=torch.cat([part.weights for part in parts]),
    )


Kernel = Callable[[InKernel, Tensor, Tensor | None, int], Chosen]
"""(what the strategy tells, logits (T, E), bias (E,), top_k) to the experts chosen.

Raises:
    RuntimeError: the kernel refuses the call.
"""


def load(library: Path) -> Kernel:
    """FlashInfer's `trtllm_gen_routing` over the kernels that `tests.conformance.build` made."""
    return over(load_routing_library(library))


def over(built: object) -> Kernel:
    """The same over a library that is loaded already, or over what stands in front of one."""
    route = routing_kernels(built)

    def kernel(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        result = route(told, logits, bias, top_k)
        return Chosen(ids=result.topk_ids, weights=result.topk_weights)

    return kernel


def poison() -> None:
    """Fill what `torch.empty` gives from now on, so that nothing left over passes for a result."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)


Work = Callable[[Kernel, Case, torch.device], str]


def in_a_process(work: Work, library: Path, case: Case) -> str:
    """Run something that may fault in a process of its own: a fault ends the CUDA context."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_work, work, library, case).result()


def _work(work: Work, library: Path, case: Case) -> str:
    return work(load(library), case, torch.device("cuda"))
