"""FlashInfer's routing kernels as one function: what a strategy tells a kernel, to ids and weights."""

from __future__ import annotations

import importlib
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Protocol, cast

import attrs
import torch
from torch import Tensor

from tests.acceptance.cases import Case
from typed_moe import InKernel

TILE_TOKENS = 8
"""Rows that an expert's tile has; the choice of experts does not depend on it."""


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


class _Result(Protocol):
    topk_ids: Tensor
    topk_weights: Tensor


class _Routing(Protocol):
    def __call__(
        self,
        routing_logits: Tensor,
        routing_bias: Tensor | None,
        routing_method: IntEnum,
        top_k: int,
        *,
        n_group: int,
        topk_group: int,
        routed_scaling_factor: float,
        tile_tokens_dim: int,
        norm_topk_prob: bool,
        skip_check: bool,
    ) -> _Result: ...


def load(library: Path) -> Kernel:
    """FlashInfer's `trtllm_gen_routing` over the kernels that `tests.conformance.build` made.

    FlashInfer's Python runs as it is, but for two things: its module is the file given, in place
    of a build for Blackwell, and its check of the compute capability is skipped.
    """
    return over(importlib.import_module("tvm_ffi").load_module(str(library)))


def over(built: object) -> Kernel:
    """The same over a library that is loaded already, or over what stands in front of one."""
    routing = importlib.import_module("flashinfer.fused_moe.trtllm_gen_routing")
    _replace_module(routing, built)
    route = cast("_Routing", routing.trtllm_gen_routing)
    methods = cast("type[IntEnum]", routing.RoutingMethodType)

    def kernel(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        result = route(
            logits,
            bias,
            methods[told.routing_method_type],
            top_k,
            # The fused entry points turn None into 0 before they get here.
            n_group=told.n_group or 0,
            topk_group=told.topk_group or 0,
            routed_scaling_factor=told.routed_scaling_factor or 1.0,
            tile_tokens_dim=TILE_TOKENS,
            norm_topk_prob=told.norm_topk_prob,
            skip_check=True,
        )
        return Chosen(ids=result.topk_ids, weights=result.topk_weights)

    return kernel


def _replace_module(routing: ModuleType, built: object) -> None:
    spec = SimpleNamespace(build_and_load=lambda: built)
    vars(routing)["gen_trtllm_gen_routing_module"] = lambda: spec
    routing.get_trtllm_gen_routing_module.cache_clear()


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
