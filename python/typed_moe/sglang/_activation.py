"""SGLang's activation settings, as its Triton runner reads them."""

from __future__ import annotations

from typed_moe.config import (
    Activation,
    Geglu,
    Gelu,
    Relu2,
    Silu,
    Swiglu,
    SwigluStep,
)
from typed_moe.errors import UnsupportedRouting
from typed_moe.sglang._seam import ConfigLike


def activation_of(config: ConfigLike) -> Activation:
    """The activation between an expert's two matrices.

    With `gemm1_alpha` it is gpt-oss's, whose up projection gets 1 added. `gemm1_clamp_limit` alone
    clamps after the swish, `swiglu_limit` before it.

    Raises:
        UnsupportedRouting: another activation.

    Source: `fused_experts_impl` of SGLang 0.5.23, `moe_runner/triton_utils/fused_moe.py`.
    """
    alpha, beta, limit = config.gemm1_alpha, config.gemm1_beta, config.gemm1_clamp_limit
    match config.activation, config.is_gated:
        case "silu", True if alpha is not None:
            return Swiglu(alpha=alpha, beta=1.0 if beta is None else beta, limit=limit)
        case "silu", True if limit is not None:
            return SwigluStep(limit=limit)
        case "silu", True:
            return Swiglu(limit=config.swiglu_limit)
        case ("gelu" | "gelu_tanh") as name, True:
            return Geglu(approximate="tanh" if name == "gelu_tanh" else "none")
        case "relu2", False:
            return Relu2()
        case "silu", False:
            return Silu()
        case "gelu", False:
            return Gelu()
        case name, gated:
            raise UnsupportedRouting(
                f"activation {name!r} {'with' if gated else 'without'} a gate; served are silu, gelu "
                "and gelu_tanh with one, and silu, gelu and relu2 without"
            )


def is_interleaved(config: ConfigLike) -> bool:
    """Whether w13 has a gate row and an up row by turns, as gpt-oss stores them."""
    return (
        config.activation == "silu"
        and config.is_gated
        and config.gemm1_alpha is not None
        and config.gate_up_interleaved
    )
