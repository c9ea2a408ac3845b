"""What `typed-moe verify` runs: every strategy, format and placement, at one small size."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.config import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Placement,
    Unquantized,
)
from typed_moe.routing import (
    BiasedSigmoid,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    RoutingStrategy,
    ScaledSoftmax,
    Sigmoid,
    SigmoidRenorm,
    SqrtSoftplus,
    TopK,
    TopKSigmoid,
)

HIDDEN = 256
INTERMEDIATE = 256
"""A tensor-parallel half of it is the 128 that kernels' layouts and FP8 blocks ask for."""
EXPERTS = 16
TOKENS = 6

STRATEGIES: tuple[RoutingStrategy, ...] = (
    Default(),
    Renormalize(),
    RenormalizeNaive(),
    TopK(),
    Sigmoid(),
    SigmoidRenorm(),
    TopKSigmoid(),
    Llama4(),
    MiniMax2(routed_scaling_factor=2.5),
    DeepSeekV3(routed_scaling_factor=2.827),
    # The grouped kernel reads a bfloat16 bias; the bias below is exact in it.
    DeepSeekV3(
        num_expert_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        correction_bias_dtype=torch.bfloat16,
    ),
    BiasedSigmoid(routed_scaling_factor=2.5),
    BiasedSigmoid(num_expert_group=4, topk_group=2),
    SqrtSoftplus(routed_scaling_factor=1.5),
    ScaledSoftmax(norm_topk_prob=False, routed_scaling_factor=16.0),
    GroupedSoftmax(num_expert_group=4, topk_group=2, group_score="max", norm_topk_prob=False),
)
"""Every strategy, those with groups also without."""

FORMATS: tuple[Format, ...] = (
    Unquantized(),
    Bf16(),
    Fp8PerTensor(),
    Fp8PerChannel(),
    Fp8BlockScale(),
    MxFp8(),
    MxFp4(),
    MxFp4(activation="mxfp8"),
    Nvfp4(),
    MxInt4(),
)
"""Every format, MXFP4 with both of its activations."""

PLACEMENTS: Mapping[str, tuple[Placement, ...]] = MappingProxyType(
    {
        "whole": (Placement(),),
        "tp 2": tuple(Placement(tp_size=2, tp_rank=rank) for rank in (0, 1)),
        "ep 2": tuple(Placement(ep_size=2, ep_rank=rank) for rank in (0, 1)),
    }
)
"""By name, the ranks whose outputs are added up."""


def top_k_of(strategy: RoutingStrategy) -> int:
    """Experts per token: Llama 4's kernels and models have one."""
    return 1 if isinstance(strategy, Llama4) else 2


def format_label(quant: Format) -> str:
    """Its name, and for MXFP4 what it is multiplied with."""
    return f"mxfp4 x {quant.activation}" if isinstance(quant, MxFp4) else quant.name


def settings_label(strategy: RoutingStrategy) -> str:
    """Its name, and whether it has groups."""
    groups = getattr(strategy, "num_expert_group", 1)
    return f"{strategy.name}, {groups} groups" if groups > 1 else strategy.name


@final
@attrs.frozen(kw_only=True, eq=False)
class Inputs:
    """What every layer is fed.

    Attributes:
        hidden_states: (T, H) bfloat16.
        logits: (T, E) float32.
        bias: (E,) float32, exact in bfloat16.
        weights: of the whole layer under checkpoint names, exact in bfloat16.
    """

    hidden_states: Tensor
    logits: Tensor
    bias: Tensor
    weights: tuple[tuple[str, Tensor], ...]


def draw_inputs() -> Inputs:
    """The same on every machine: drawn on the CPU from one seed."""
    generator = torch.Generator().manual_seed(2026)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weights = []
    for expert in range(EXPERTS):
        for name, rows, columns in (
            ("gate_proj", INTERMEDIATE, HIDDEN),
            ("up_proj", INTERMEDIATE, HIDDEN),
            ("down_proj", HIDDEN, INTERMEDIATE),
        ):
            matrix = (normal(rows, columns) * (2 / columns**0.5)).bfloat16()
            weights.append((f"{expert}.{name}.weight", matrix))
    return Inputs(
        hidden_states=normal(TOKENS, HIDDEN).bfloat16(),
        logits=normal(TOKENS, EXPERTS),
        bias=(normal(EXPERTS) * 0.2).bfloat16().float(),
        weights=tuple(weights),
    )
