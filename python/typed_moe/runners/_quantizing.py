"""Bringing a call's activations into the layer's format."""

from __future__ import annotations

from typing import final

from torch import Tensor

from typed_moe.kernels import QuantizingKernel, ToFormat
from typed_moe.quantization import Quantized, quantize_activation
from typed_moe.runners._planning import Decision


@final
class ActivationQuantizer:
    """Left to the kernel where it quantises; else by PyTorch.

    Attributes:
        to_format: what its records say of that; None where activations are in the format.
    """

    def __init__(self, decision: Decision, input_scale: Tensor | None = None) -> None:
        self._quant = decision.plan.request.quant
        self._input_scale = input_scale
        by_kernel = isinstance(decision.kernel, QuantizingKernel)
        self.to_format = ToFormat(quant=self._quant, input_scale=input_scale) if by_kernel else None

    def __call__(self, hidden_states: Tensor) -> Quantized:
        """(T, H) floating point in the format of the layer, or as it is for the kernel to quantise."""
        if self.to_format is not None:
            return Quantized(data=hidden_states, scale=None)
        return quantize_activation(hidden_states, self._quant, input_scale=self._input_scale)
