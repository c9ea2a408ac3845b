"""What a kernel is to a runner: facts about it, and a call."""

from __future__ import annotations

from typing import Protocol, final, runtime_checkable

import attrs
import torch
from torch import Tensor

from typed_moe.config import Activation, Format, Placement
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import MoeArgs, Routing
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.quantization import Quantized
from typed_moe.routing import KernelRules, Refused, RoutingShape


@final
@attrs.frozen(kw_only=True)
class KernelRequest:
    """The layer that a kernel is asked to serve.

    Attributes:
        shape: routed experts and top_k.
        quant: the format of weights and activations.
        activation: of the experts.
        placement: this rank's share.
        hidden_size, intermediate_size: of one expert, whole.
        num_fused_shared_experts: shared experts that run as extra slots.
        has_bias: whether the experts have bias vectors.
        device: where the weights are.
        dtype: of activations and unquantised weights.
    """

    shape: RoutingShape
    quant: Format
    activation: Activation
    placement: Placement
    hidden_size: int
    intermediate_size: int
    num_fused_shared_experts: int
    has_bias: bool
    device: torch.device
    dtype: torch.dtype


class MoeKernel(Protocol):
    """**Protocol:** takes an argument record, gives the routed experts' output."""

    @property
    def name(self) -> str:
        """The name that plans print."""
        ...

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """What it computes for this layer, or why it cannot serve it."""
        ...

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """The layer's weights in the kernel's own layout; the same object if that is theirs.

        The layer stores them with the gate's rows first, scales row-major. A kernel that wants
        them otherwise writes into the tensors it is given, or gives others back, and returns a
        new record: the layer keeps what comes back in their place, so that there is no second
        copy. Called once after loading, before the first call.
        """
        ...

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """Run. Returns (T, H), float32 or bfloat16; partial sums where the rank is one of several.

        Not called with T = 0: runners return the empty result by themselves.
        """
        ...


@runtime_checkable
class UnfinalizedKernel(Protocol):
    """**Protocol:** a `MoeKernel` that also leaves the weighted sum to its caller."""

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        """The dtypes for a layer that `rules` accepts, or why its rows come finalized alone.

        Args:
            request: the layer.
            routing: the type of its records' `routing`.
        """
        ...

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        """Run, up to the sum. The record has no `output`; not called with T = 0."""
        ...


@runtime_checkable
class QuantizingKernel(Protocol):
    """**Protocol:** a `MoeKernel` that brings activations into a format in its own launch.

    Its records come with `to_format`, the activations floating point still: so it may quantise while it
    routes.
    """

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        """What `typed_moe.quantization.quantize_activation` gives, bit for bit.

        Args:
            hidden_states: (T, H) floating point.
            quant: the format of the layer.
            input_scale: float32, one value: the static scale of a format that has one.
        """
        ...
