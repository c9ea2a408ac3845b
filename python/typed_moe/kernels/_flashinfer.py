"""The one file that imports flashinfer."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from enum import IntEnum
from functools import cache
from typing import Protocol, cast, final

import flashinfer
import torch
from flashinfer import fused_moe
from flashinfer.fused_moe import core
from torch import Tensor

from typed_moe.kernels._flashinfer_library import EnumName
from typed_moe.routing import Refused


@final
class InstalledFlashInfer:
    """The FlashInfer of this environment."""

    @property
    def version(self) -> str:
        """As the package says."""
        return flashinfer.__version__

    def parameters(self, entry_point: str) -> frozenset[str]:
        """See `FlashInferLibrary.parameters`."""
        return _parameters(entry_point)

    def number(self, enum: EnumName, member: str) -> int | None:
        """See `FlashInferLibrary.number`."""
        return _number(enum, member)

    def refuses(self, device: torch.device) -> Refused | None:
        """See `FlashInferLibrary.refuses`."""
        if device.type != "cuda":
            return Refused(f"runs on SM100 and SM103 GPUs; this layer is on {device}")
        major, minor = torch.cuda.get_device_capability(device)
        # The launchers let SM12x through from 0.6.7 on, but no kernels are compiled for it
        # (`_TRTLLM_ROUTED_ARCHS` in FlashInfer's fused_moe/api.py, flashinfer#4107).
        if major != 10:
            return Refused(f"runs on SM100 and SM103 GPUs; this one is SM{major}{minor}")
        return None

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """See `FlashInferLibrary.call`."""
        result = _function(entry_point)(**arguments)
        # A bare tensor today, a list from 0.8 on; fp4 and mxint4 give a list already.
        return result[0] if isinstance(result, list) else result

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `FlashInferLibrary.call_unfinalized`."""
        rows, weights, index = _function(entry_point)(**arguments)
        return rows, weights, index


class _Function(Protocol):
    def __call__(self, **arguments: object) -> Tensor | list[Tensor]: ...


@cache
def _function(entry_point: str) -> _Function:
    return cast("_Function", getattr(fused_moe, entry_point))


@cache
def _parameters(entry_point: str) -> frozenset[str]:
    if not hasattr(fused_moe, entry_point):
        return frozenset()
    return frozenset(inspect.signature(_function(entry_point)).parameters)


@cache
def _number(enum: EnumName, member: str) -> int | None:
    """`fused_moe` exports each enum some releases after `fused_moe.core` defines it."""
    for module in (fused_moe, core):
        members = cast("type[IntEnum] | None", getattr(module, enum, None))
        if members is not None and member in members.__members__:
            return int(members[member])
    return None
