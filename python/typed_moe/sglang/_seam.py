"""SGLang's objects, as far as our quantisation method reads and writes them."""

from __future__ import annotations

from typing import Protocol

import torch

from typed_moe.sglang._protocols import LayerLike, RunnerConfigLike


class ConfigLike(RunnerConfigLike, Protocol):
    """**Protocol:** more of `MoeRunnerConfig`."""

    params_dtype: torch.dtype | None
    no_combine: bool


class QuantConfigLike(Protocol):
    """**Protocol:** `QuantizationConfig`."""

    def get_name(self) -> str: ...
    def get_quant_method(self, layer: object, prefix: str) -> QuantMethodLike | None: ...


class QuantMethodLike(Protocol):
    """**Protocol:** `FusedMoEMethodBase`."""

    moe_runner_config: object

    def create_weights(self, *, layer: object, **asked: object) -> None: ...


class SeamLayerLike(LayerLike, Protocol):
    """**Protocol:** more of `FusedMoE`."""

    with_bias: bool
    quant_method: object
    weight_load_method: object


class BackendLike(Protocol):
    """**Protocol:** `RegisteredMoeRunnerBackend`."""

    @property
    def value(self) -> str: ...
