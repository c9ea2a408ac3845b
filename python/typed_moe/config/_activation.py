"""Activations of an expert, between its first and its second matrix."""

from __future__ import annotations

from typing import ClassVar, Literal, assert_never, final

import attrs


def _positive(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    if not value > 0:
        raise ValueError(f"{attribute.name} is {value}; allowed: a positive number")


@final
@attrs.frozen(kw_only=True)
class Swiglu:
    """Gated swish: gate * sigmoid(alpha * gate) * (up + beta), clamped first where asked.

    With `limit`: gate = min(gate, limit), up = clamp(up, -limit, limit). The defaults are
    silu(gate) * up. gpt-oss is `Swiglu(alpha=1.702, beta=1.0, limit=7.0)`, DeepSeek-V4
    `Swiglu(limit=10.0)`. The three settings are FlashInfer's `gemm1_alpha`, `gemm1_beta`
    and `gemm1_clamp_limit`.
    """

    name: ClassVar[Literal["swiglu"]] = "swiglu"
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = attrs.field(default=None, validator=attrs.validators.optional(_positive))


@final
@attrs.frozen(kw_only=True)
class SwigluStep:
    """Gated swish clamped after the swish: min(silu(gate), limit) * clamp(up, -limit, limit).

    Step-3.5 and Step-3.7, whose limit differs between layers.
    """

    name: ClassVar[Literal["swiglu_step"]] = "swiglu_step"
    limit: float = attrs.field(default=7.0, validator=_positive)


@final
@attrs.frozen(kw_only=True)
class Geglu:
    """Gated GELU: gelu(gate) * up; `approximate` is torch's: `"none"` (erf) or `"tanh"`."""

    name: ClassVar[Literal["geglu"]] = "geglu"
    approximate: Literal["none", "tanh"] = attrs.field(
        default="none", validator=attrs.validators.in_(("none", "tanh"))
    )


@final
@attrs.frozen(kw_only=True)
class Relu2:
    """Ungated squared ReLU: relu(up)^2. Nemotron-H; the expert has no gate projection."""

    name: ClassVar[Literal["relu2"]] = "relu2"


@final
@attrs.frozen(kw_only=True)
class Silu:
    """Ungated swish: up * sigmoid(up); the expert has no gate projection."""

    name: ClassVar[Literal["silu"]] = "silu"


@final
@attrs.frozen(kw_only=True)
class Gelu:
    """Ungated GELU: gelu(up); `approximate` is torch's: `"none"` (erf) or `"tanh"`."""

    name: ClassVar[Literal["gelu"]] = "gelu"
    approximate: Literal["none", "tanh"] = attrs.field(
        default="none", validator=attrs.validators.in_(("none", "tanh"))
    )


Activation = Swiglu | SwigluStep | Geglu | Relu2 | Silu | Gelu
"""Any activation an expert can have."""


def is_gated(activation: Activation) -> bool:
    """Whether the first matrix has a gate half and an up half (2I rows) or one half (I rows)."""
    match activation:
        case Swiglu() | SwigluStep() | Geglu():
            return True
        case Relu2() | Silu() | Gelu():
            return False
        case _:
            assert_never(activation)
