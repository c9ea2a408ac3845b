"""Activations in the words of the argument records."""

from __future__ import annotations

from typing import assert_never

from typed_moe.config import Activation, Geglu, Gelu, Relu2, Silu, Swiglu, SwigluStep
from typed_moe.kernels.args import ActivationType


def activation_arguments(
    activation: Activation,
) -> tuple[ActivationType, float | None, float | None, float | None]:
    """`activation_type` by name, alpha, beta, limit; None where the plain form is meant."""
    match activation:
        case Swiglu(alpha=alpha, beta=beta, limit=limit):
            return (
                "Swiglu",
                None if alpha == 1.0 else alpha,
                None if beta == 0.0 else beta,
                limit,
            )
        case SwigluStep(limit=limit):
            return "SwigluStep", None, None, limit
        case Geglu(approximate=approximate):
            return ("GegluTanh" if approximate == "tanh" else "Geglu"), None, None, None
        case Relu2():
            return "Relu2", None, None, None
        case Silu():
            return "Silu", None, None, None
        case Gelu(approximate=approximate):
            return ("GeluTanh" if approximate == "tanh" else "Gelu"), None, None, None
        case _:
            assert_never(activation)
