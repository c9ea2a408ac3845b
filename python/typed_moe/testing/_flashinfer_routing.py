"""FlashInfer's `trtllm_gen_routing` over routing kernels that somebody built for another card.

FlashInfer's Python runs as it is, but for two things: its module is the one given, in place of a build
for Blackwell, and its check of the compute capability is skipped.
"""

from __future__ import annotations

import importlib
from enum import IntEnum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Protocol, cast

from torch import Tensor

from typed_moe.routing import InKernel

TILE_TOKENS = 8
"""Rows that an expert's tile has; the choice of experts does not depend on it."""


class RoutingResult(Protocol):
    """**Protocol:** (T, k) int32 ids and bfloat16 weights."""

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
    ) -> RoutingResult: ...


class RoutingKernels(Protocol):
    """**Protocol:** (what a strategy tells, logits (T, E), bias (E,), top_k) to the choice."""

    def __call__(
        self, told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int, /
    ) -> RoutingResult:
        """Raises: RuntimeError: the kernel refuses the call."""
        ...


class RoutingLibrary(Protocol):
    """**Protocol:** the module that FlashInfer's Python calls."""

    def trtllm_gen_routing(self, *arguments: object) -> object:
        """By position, with the tensors to write into."""
        ...


def load_routing_library(file: Path) -> RoutingLibrary:
    """A library that `tests.conformance.build` made.

    Raises:
        ImportError: apache-tvm-ffi, FlashInfer's loader, is not installed.
        OSError, RuntimeError: the file is no such library.
    """
    module = importlib.import_module("tvm_ffi").load_module(str(file))
    return cast("RoutingLibrary", module)


def routing_kernels(library: object) -> RoutingKernels:
    """FlashInfer's own function over a library, or over what stands in front of one."""
    routing = importlib.import_module("flashinfer.fused_moe.trtllm_gen_routing")
    _replace_module(routing, library)
    route = cast("_Routing", routing.trtllm_gen_routing)
    methods = cast("type[IntEnum]", routing.RoutingMethodType)

    def kernels(
        told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int, /
    ) -> RoutingResult:
        return route(
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

    return kernels


def _replace_module(routing: ModuleType, library: object) -> None:
    spec = SimpleNamespace(build_and_load=lambda: library)
    vars(routing)["gen_trtllm_gen_routing_module"] = lambda: spec
    routing.get_trtllm_gen_routing_module.cache_clear()
