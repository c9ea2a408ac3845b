"""Layers with random experts, beside the same experts as the oracle takes them."""

from __future__ import annotations

import math

import attrs
import torch
from torch import Tensor

from tests import oracle
from typed_moe import (
    Activation,
    Format,
    FusedMoE,
    Geglu,
    Gelu,
    MoeKernel,
    Placement,
    Relu2,
    RoutingForm,
    RoutingStrategy,
    Silu,
    Swiglu,
    SwigluStep,
    TokenExchange,
    Unquantized,
)

ACTIVATIONS: dict[str, tuple[Activation, oracle.Act]] = {
    "swiglu": (Swiglu(), oracle.Act(kind="swiglu")),
    "swiglu-gpt-oss": (
        Swiglu(alpha=1.702, beta=1.0, limit=7.0),
        oracle.Act(kind="swiglu", alpha=1.702, beta=1.0, limit=7.0),
    ),
    "swiglu-limit": (Swiglu(limit=0.5), oracle.Act(kind="swiglu", limit=0.5)),
    "swiglu-step": (SwigluStep(limit=0.5), oracle.Act(kind="swiglu_step", limit=0.5)),
    "geglu": (Geglu(), oracle.Act(kind="geglu")),
    "geglu-tanh": (Geglu(approximate="tanh"), oracle.Act(kind="geglu_tanh")),
    "relu2": (Relu2(), oracle.Act(kind="relu2")),
    "silu": (Silu(), oracle.Act(kind="silu")),
    "gelu": (Gelu(), oracle.Act(kind="gelu")),
    "gelu-tanh": (Gelu(approximate="tanh"), oracle.Act(kind="gelu_tanh")),
}
"""Every activation as the package and as the oracle name it."""


def random_experts(
    count: int, hidden: int, intermediate: int, *, gated: bool = True, biases: bool = False
) -> oracle.Experts:
    """Float32 experts whose outputs are of the size of their inputs."""

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(count, rows, columns).mul(2.0 / math.sqrt(columns))

    def vector(rows: int) -> Tensor | None:
        return torch.randn(count, rows) if biases else None

    return oracle.Experts(
        up=matrix(intermediate, hidden),
        down=matrix(hidden, intermediate),
        gate=matrix(intermediate, hidden) if gated else None,
        up_bias=vector(intermediate),
        gate_bias=vector(intermediate) if gated else None,
        down_bias=vector(hidden),
    )


def separate(experts: oracle.Experts) -> list[tuple[str, Tensor]]:
    """The checkpoint tensors of the layout SEPARATE."""
    named: list[tuple[str, Tensor]] = []
    for number in range(experts.count):
        for name, weight, bias in (
            ("gate_proj", experts.gate, experts.gate_bias),
            ("up_proj", experts.up, experts.up_bias),
            ("down_proj", experts.down, experts.down_bias),
        ):
            if weight is not None:
                named.append((f"{number}.{name}.weight", weight[number]))
            if bias is not None:
                named.append((f"{number}.{name}.bias", bias[number]))
    return named


@attrs.frozen(kw_only=True)
class Build:
    """What a layer is made of, apart from its weights."""

    routing: RoutingStrategy
    num_experts: int = 8
    top_k: int = 2
    hidden_size: int = 16
    intermediate_size: int = 12
    quant: Format = attrs.field(factory=Unquantized)
    activation: Activation = attrs.field(factory=Swiglu)
    num_fused_shared_experts: int = 0
    has_bias: bool = False
    placement: Placement = attrs.field(factory=Placement)
    exchange: TokenExchange | None = None
    kernel: MoeKernel | None = None
    routing_form: RoutingForm | None = None
    prefix: str = ""
    dtype: torch.dtype = torch.float32

    def empty(self, device: str = "cpu") -> FusedMoE:
        """The layer, with nothing loaded."""
        return FusedMoE(
            num_experts=self.num_experts,
            top_k=self.top_k,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            routing=self.routing,
            quant=self.quant,
            activation=self.activation,
            num_fused_shared_experts=self.num_fused_shared_experts,
            has_bias=self.has_bias,
            placement=self.placement,
            exchange=self.exchange,
            kernel=self.kernel,
            routing_form=self.routing_form,
            prefix=self.prefix,
            dtype=self.dtype,
            device=device,
        )

    def loaded(self, experts: oracle.Experts, bias: Tensor | None = None) -> FusedMoE:
        """The layer with these experts, and this correction bias."""
        layer = self.empty()
        weights = separate(experts)
        if bias is not None:
            weights.append(("e_score_correction_bias", bias))
        assert layer.load_weights(weights) == {name for name, _ in weights}
        return layer


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| over all values."""
    return float((got.double() - expected).norm() / expected.norm())
