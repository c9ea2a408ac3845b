"""One expert in float32: first matrix, activation, second matrix."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from typed_moe.kernels.args import ActivationType, ExpertArgs

_GATED = ("Swiglu", "SwigluStep", "Geglu", "GegluTanh")


def is_gated_type(activation_type: ActivationType) -> bool:
    """Whether the first matrix has a gate half and an up half."""
    return activation_type in _GATED


@final
@attrs.frozen(kw_only=True, eq=False)
class ExpertSettings:
    """The activation's settings of one expert, as tensors without a dimension."""

    alpha: Tensor | None
    beta: Tensor | None
    limit: Tensor | None


def settings_of(args: ExpertArgs, expert: int) -> ExpertSettings:
    """This rank's expert number `expert`'s entries of the per-expert vectors."""

    def entry(vector: Tensor | None) -> Tensor | None:
        return None if vector is None else vector[expert]

    return ExpertSettings(
        alpha=entry(args.gemm1_alpha),
        beta=entry(args.gemm1_beta),
        limit=entry(args.gemm1_clamp_limit),
    )


def activate(
    first: Tensor, activation_type: ActivationType, settings: ExpertSettings, *, gate_first: bool
) -> Tensor:
    """The activation of a first matrix's output.

    Args:
        first: (n, 2I) for a gated activation, (n, I) otherwise; float32.
        activation_type: by name.
        settings: of this expert.
        gate_first: whether the gate is the first half.

    Returns:
        (n, I) float32.
    """
    if not is_gated_type(activation_type):
        return _ungated(first, activation_type)
    left, right = first.chunk(2, dim=-1)
    gate, up = (left, right) if gate_first else (right, left)
    if activation_type == "Swiglu":
        return _swiglu(gate, up, settings)
    if activation_type == "SwigluStep":
        swish = functional.silu(gate)
        if settings.limit is None:
            return swish * up
        return swish.clamp(max=settings.limit) * up.clamp(-settings.limit, settings.limit)
    approximate = "tanh" if activation_type == "GegluTanh" else "none"
    return functional.gelu(gate, approximate=approximate) * up


def _swiglu(gate: Tensor, up: Tensor, settings: ExpertSettings) -> Tensor:
    if settings.limit is not None:
        gate = gate.clamp(max=settings.limit)
        up = up.clamp(-settings.limit, settings.limit)
    alpha = 1.0 if settings.alpha is None else settings.alpha
    beta = 0.0 if settings.beta is None else settings.beta
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _ungated(first: Tensor, activation_type: ActivationType) -> Tensor:
    if activation_type == "Relu2":
        return functional.relu(first).square()
    if activation_type == "Silu":
        return functional.silu(first)
    approximate = "tanh" if activation_type == "GeluTanh" else "none"
    return functional.gelu(first, approximate=approximate)
