"""Pack, unpack and the activation quantisation that each format implies, in PyTorch."""

from typed_moe.quantization._activations import dequantize_activation, quantize_activation
from typed_moe.quantization._error import relative_error_bound, stored_error_bound
from typed_moe.quantization._record import Quantized
from typed_moe.quantization._scales import calibration_scale
from typed_moe.quantization._weights import dequantize_weight, quantize_weight

__all__ = [
    "Quantized",
    "calibration_scale",
    "dequantize_activation",
    "dequantize_weight",
    "quantize_activation",
    "quantize_weight",
    "relative_error_bound",
    "stored_error_bound",
]
