"""`enforce`: the calls to FlashInfer's trtllm kernels are made by our runners."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Protocol, cast, final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.runners import Plan
from typed_moe.sglang._ahead import LayersAhead
from typed_moe.sglang._layers import SglangExperts, layer_of
from typed_moe.sglang._ours import (
    OurExperts,
    is_bypassed,
    our_experts,
    top_k_of,
    translated,
)
from typed_moe.sglang._protocols import DispatchLike, LayerLike, RunnerConfigLike
from typed_moe.sglang._translate import RoutedOutside

_Stamp = tuple[tuple[int, int], ...]


@final
@attrs.frozen(kw_only=True, eq=False)
class _Made:
    """A runner, and what it was made from."""

    ours: OurExperts
    stamp: _Stamp
    bypassed: bool


@final
class Enforcer:
    """The runners of this process's layers.

    Args:
        library: the FlashInfer to call.

    Attributes:
        ahead: what is refused before a layer is called.
    """

    def __init__(self, library: Callable[[], FlashInferLibrary]) -> None:
        self._library = library
        self.ahead: LayersAhead = LayersAhead(library)
        self._made: WeakKeyDictionary[LayerLike, _Made] = WeakKeyDictionary()

    def plans(self) -> tuple[Plan, ...]:
        """Of the layers that have been called."""
        return tuple(made.ours.plan for made in self._made.values())

    def call(
        self,
        read: Callable[[DispatchLike, int], SglangExperts],
        info: object,
        config: RunnerConfigLike,
        dispatch: DispatchLike,
    ) -> object:
        """SGLang's combine input, computed by our runner.

        Raises:
            UnsupportedRouting: FlashInfer does not serve the layer; the message says why, and that
                SGLang's own call is to be had with another mode.
        """
        hidden = dispatch.hidden_states
        if hidden.shape[0] == 0:
            return _combine_input(torch.empty_like(hidden))
        topk = dispatch.topk_output
        if is_bypassed(topk) and isinstance(translated(dispatch, config), RoutedOutside):
            # No strategy computes it, so SGLang's own TopK does, before the kernel.
            dispatch = dispatch._replace(topk_output=topk.to_standard())
        made = self._runner(read, info, config, dispatch)
        return _combine_input(made.ours(dispatch, _output_for(hidden)))

    def _runner(
        self,
        read: Callable[[DispatchLike, int], SglangExperts],
        info: object,
        config: RunnerConfigLike,
        dispatch: DispatchLike,
    ) -> _Made:
        layer = layer_of(config)
        topk = dispatch.topk_output
        bypassed, stamp = is_bypassed(topk), _stamp(info)
        made = self._made.get(layer)
        # Weights may be replaced while serving, and derived scales are the old ones' then.
        if made is not None and (made.stamp, made.bypassed) == (stamp, bypassed):
            return made
        try:
            ours = our_experts(
                read(dispatch, top_k_of(topk)), translated(dispatch, config), self._library()
            )
        except UnsupportedRouting as refused:
            raise UnsupportedRouting(
                f"{layer.layer_name}: {refused}. TYPED_MOE_SGLANG=observe serves it with SGLang's "
                "own call"
            ) from refused
        made = self._made[layer] = _Made(ours=ours, stamp=stamp, bypassed=bypassed)
        return made


def _stamp(info: object) -> _Stamp:
    """Which tensors a payload holds, and how often each was written to."""
    return tuple(
        # Torch's name for its public promise: one more with each write in place.
        (value.data_ptr(), 0 if value.is_inference() else value._version)  # noqa: SLF001
        for value in vars(info).values()
        if isinstance(value, Tensor)
    )


class _CombineInput(Protocol):
    def __call__(self, *, hidden_states: Tensor) -> object: ...


def _combine_input(hidden_states: Tensor) -> object:
    module = importlib.import_module("sglang.srt.layers.moe.token_dispatcher.standard")
    return cast("_CombineInput", module.StandardCombineInput)(hidden_states=hidden_states)


def _output_for(hidden_states: Tensor) -> Tensor:
    """Where the result goes: in SGLang's symmetric memory, where its all-reduce wants it."""
    memory = importlib.import_module("sglang.srt.distributed.device_communicators.pynccl_allocator")
    attention = importlib.import_module("sglang.srt.layers.dp_attention")
    context = importlib.import_module("sglang.srt.runtime_context")
    with memory.use_symmetric_memory(
        context.get_parallel().tp_group, disabled=not attention.is_allocation_symmetric()
    ):
        return torch.empty(hidden_states.shape, dtype=torch.bfloat16, device=hidden_states.device)
