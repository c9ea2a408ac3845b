"""The Triton kernel, with the records that it was called with."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from typed_moe.config import Format
from typed_moe.kernels import (
    ExpertWeights,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerTensorMoeArgs,
    KernelRequest,
    MoeArgs,
    TritonKernel,
)
from typed_moe.quantization import Quantized, quantize_activation
from typed_moe.routing import KernelRules, Refused


class Watching:
    """`TritonKernel`, which quantises, by another name."""

    def __init__(self, kernel: TritonKernel) -> None:
        self.kernel = kernel
        self.seen: list[MoeArgs] = []

    @property
    def name(self) -> str:
        return "watching"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        return self.kernel.rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        return self.kernel.prepare(weights, request)

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        return self.kernel.quantize(hidden_states, quant, input_scale=input_scale)

    def __call__(self, args: MoeArgs, /) -> Tensor:
        self.seen.append(args)
        return self.kernel(args)


def by_torch(args: MoeArgs) -> MoeArgs:
    """A record whose activations the kernel was to quantise, with PyTorch's."""
    assert isinstance(args, Fp8PerTensorMoeArgs | Fp8BlockMoeArgs | Fp4MoeArgs)
    to = args.to_format
    assert to is not None, "they are in the format already"
    x = quantize_activation(args.hidden_states, to.quant, input_scale=to.input_scale)
    if isinstance(args, Fp8PerTensorMoeArgs):
        return replace(args, hidden_states=x.data, to_format=None)
    scale = x.scale
    if isinstance(args, Fp8BlockMoeArgs) and args.fp8_quantization_type == "DeepSeekFp8":
        assert scale is not None, "one for each 128 values"
        scale = scale.T
    return replace(args, hidden_states=x.data, hidden_states_scale=scale, to_format=None)
