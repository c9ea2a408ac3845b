"""FlashInfer's functions, watched while SGLang calls them; and a FlashInfer that is never called."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from types import ModuleType
from typing import final

import torch
from torch import Tensor

from typed_moe.kernels import Family, FromLogits, Precomputed, entry_point
from typed_moe.kernels._flashinfer_library import EnumName, FlashInferLibrary
from typed_moe.routing import Refused
from typed_moe.sglang._differences import Call
from typed_moe.sglang._protocols import Function

_FAMILIES: tuple[Family, ...] = (
    "bf16",
    "fp8_block_scale",
    "fp8_per_tensor_scale",
    "fp4_block_scale",
)
ENTRY_POINTS = tuple(
    entry_point(family, routing) for family in _FAMILIES for routing in (FromLogits, Precomputed)
)
# SGLang imports them inside its functions, at each call, from one of these.
_MODULES = ("flashinfer", "flashinfer.fused_moe")


@contextmanager
def watch() -> Iterator[list[Call]]:
    """Keep what is passed to FlashInfer's fused MoE functions; they run as ever.

    Yields:
        The calls, in order, filled while the context is open.
    """
    calls: list[Call] = []
    replaced: list[tuple[ModuleType, str, Function]] = []
    for module in (sys.modules[name] for name in _MODULES if name in sys.modules):
        for entry in ENTRY_POINTS:
            function = vars(module).get(entry)
            if function is not None:
                replaced.append((module, entry, function))
                setattr(module, entry, _kept(entry, function, calls))
    try:
        yield calls
    finally:
        for module, entry, function in replaced:
            setattr(module, entry, function)


def _kept(entry: str, function: Function, calls: list[Call]) -> Function:
    @wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        calls.append(Call(entry_point=entry, arguments=dict(bound.arguments)))
        return function(*args, **kwargs)

    return call


@final
class UncalledFlashInfer:
    """The installed release, whose functions are not called: `calls` has what they would be given.

    Its kernels run wherever SGLang calls them, so no device is refused.
    """

    def __init__(self, installed: FlashInferLibrary) -> None:
        self._installed = installed
        self.calls: list[Call] = []

    @property
    def version(self) -> str:
        """The installed release's."""
        return self._installed.version

    def parameters(self, entry_point: str) -> frozenset[str]:
        """The installed release's."""
        return self._installed.parameters(entry_point)

    def number(self, enum: EnumName, member: str) -> int | None:
        """The installed release's."""
        return self._installed.number(enum, member)

    def refuses(self, device: torch.device) -> Refused | None:
        """None: SGLang has chosen the device."""
        del device
        return None

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """Keep the arguments, with the function's defaults; the result is not to be used."""
        function = vars(sys.modules["flashinfer.fused_moe"])[entry_point]
        bound = inspect.signature(function).bind(**arguments)
        bound.apply_defaults()
        self.calls.append(Call(entry_point=entry_point, arguments=dict(bound.arguments)))
        hidden, output = arguments["hidden_states"], arguments.get("output")
        if isinstance(output, Tensor):
            return output
        assert isinstance(hidden, Tensor), "every entry point takes it"
        width = hidden.shape[1] * (2 if hidden.dtype is torch.uint8 else 1)
        return torch.empty(hidden.shape[0], width, dtype=torch.bfloat16, device=hidden.device)

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """SGLang's layers add up."""
        raise NotImplementedError(f"{entry_point} is watched with its sum alone")
