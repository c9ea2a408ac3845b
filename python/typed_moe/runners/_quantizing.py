"""Bringing a call's activations into the layer's format."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from typed_moe.kernels import QuantizingKernel
from typed_moe.quantization import Quantized, quantize_activation
from typed_moe.runners._planning import Decision


@final
class ActivationQuantizer:
    """By the kernel in its own launch; torch.compile makes one of PyTorch's by itself."""

    def __init__(self, decision: Decision, input_scale: Tensor | None = None) -> None:
        self._quant = decision.plan.request.quant
        self._input_scale = input_scale
        kernel = decision.kernel
        self._kernel = kernel if isinstance(kernel, QuantizingKernel) else None

    def __call__(self, hidden_states: Tensor) -> Quantized:
        """(T, H) floating point in the format of the layer."""
        if self._kernel is None or torch.compiler.is_compiling():
            return quantize_activation(hidden_states, self._quant, input_scale=self._input_scale)
        return self._kernel.quantize(hidden_states, self._quant, input_scale=self._input_scale)
