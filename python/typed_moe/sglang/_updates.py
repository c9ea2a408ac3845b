"""Weights that are written over while a model is served: in place, or not at all.

SGLang loads new weights into a layer's parameters (`update_weights_from_disk`, `_from_tensor`,
`_from_distributed`, `_from_ipc`). A layer whose kernel reads those parameters themselves, as they were
loaded, takes them, in a captured CUDA graph too. One whose kernel reads another layout, or scales that
were made of the loaded ones, would go on with what was derived: it says no, before anything is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import cast

from torch import nn

from typed_moe.config import Bf16, Format, Fp8BlockScale, Unquantized
from typed_moe.kernels import ExpertWeights
from typed_moe.sglang._protocols import Function

_NOTHING_DERIVED = (Unquantized, Bf16, Fp8BlockScale)
"""The formats of which a runner computes nothing when it is made."""

# SGLang's updater asks every module for it, and answers the request with what it says.
_REFUSAL = "_derived_weight_cache_error"


def reads_the_parameters(
    layer: object, quant: Format, given: ExpertWeights, prepared: ExpertWeights
) -> bool:
    """Whether the kernel reads the layer's parameters where and as SGLang's loaders write them.

    Args:
        layer: SGLang's.
        quant: its format.
        given: what was made of its parameters.
        prepared: what the kernel made of that.
    """
    stored = {parameter.data_ptr() for parameter in cast("nn.Module", layer).parameters()}
    return (
        prepared is given
        and isinstance(quant, _NOTHING_DERIVED)
        and all(
            tensor.data_ptr() in stored for tensor in vars(prepared).values() if tensor is not None
        )
    )


def refuse_updates(layer: object, sentence: str) -> None:
    """Let SGLang answer every request to update the model with this."""
    setattr(layer, _REFUSAL, sentence)


def guarded(loader: object, check: Callable[[], None]) -> object:
    """A parameter's `weight_loader` that asks first.

    Args:
        loader: SGLang's.
        check: raises where nothing may be written any more.
    """
    return functools.partial(_load, check, cast("Function", loader))


def _load(check: Callable[[], None], loader: Function, *args: object, **kwargs: object) -> object:
    check()
    return loader(*args, **kwargs)
