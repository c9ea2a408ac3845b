"""What FlashInfer's trtllm MoE entry points take, as data.

Version: 0.7.2.post1. Sources: the wheel's `fused_moe/core.py` (arguments),
`RoutingCustomPolicy.cuh:820-900` (compiled tiers), `trtllm_fused_moe_routing_deepseek.cu`
and `..._routing_llama4.cu` (kernel limits), `trtllm_fused_moe_kernel_launcher.cu` (checks).
The limits of from-logits routing were run against the real kernels on an H100, 2026-11-23.

typed-moe does not call FlashInfer yet. The table is here so that a plan can say what such a
kernel would do with a layer, and why it would refuse it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never

import torch

from typed_moe.config import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    Nvfp4,
    Unquantized,
)
from typed_moe.kernels.args import Family
from typed_moe.routing import GroupLimits, MethodRules, Tier

VERSION = "0.7.2.post1"
DEVICES = "SM100, SM103 and SM120 GPUs"

_LOGITS = (torch.float32, torch.bfloat16)
_BIAS = (torch.float32, torch.bfloat16)


_SMALL = MethodRules(tiers=(Tier(max_experts=256, max_top_k=8),), logits_dtypes=_LOGITS)
_SOFTMAX = MethodRules(tiers=(Tier(max_experts=2048, max_top_k=32),), logits_dtypes=_LOGITS)
_BIASED = MethodRules(
    tiers=(Tier(max_experts=1024, max_top_k=32),), logits_dtypes=_LOGITS, bias_dtypes=_BIAS
)

METHODS: Mapping[str, MethodRules] = MappingProxyType(
    {
        "Default": _SMALL,
        "Renormalize": _SOFTMAX,
        "RenormalizeNaive": _SOFTMAX,
        "TopK": _SMALL,
        "Sigmoid": _SMALL,
        "TopKSigmoid": _SMALL,
        "SigmoidRenorm": _SMALL,
        "Llama4": MethodRules(tiers=(Tier(max_experts=128, max_top_k=1),), logits_dtypes=_LOGITS),
        "MiniMax2": _BIASED,
        "DeepSeekV3": MethodRules(
            tiers=(
                Tier(max_experts=384, max_top_k=8),
                Tier(min_experts=385, max_experts=1024, max_top_k=22),
            ),
            logits_dtypes=_LOGITS,
            bias_dtypes=_BIAS,
            grouped_tiers=(Tier(max_experts=384, max_top_k=8),),
            groups=GroupLimits(
                max_groups=8, max_experts_per_group=32, max_topk_group=4, top_k_below_kept=True
            ),
            grouped_bias_dtype=torch.bfloat16,
        ),
    }
)
"""Routing methods from logits, the same for every entry point."""

WEIGHT_ON_INPUT: frozenset[Family] = frozenset({"fp8_per_tensor_scale"})
"""Families whose entry points can apply the weight to the expert's input."""

EXPERT_BIAS: frozenset[Family] = frozenset({"fp8_block_scale", "fp4_block_scale"})
"""Families whose from-logits entry points take `gemm1_bias` and `gemm2_bias`."""


def family_of(fmt: Format) -> Family | None:
    """The entry points that take a format; None where FlashInfer has none."""
    match fmt:
        case Unquantized():
            return None
        case Bf16():
            return "bf16"
        case Fp8PerTensor():
            return "fp8_per_tensor_scale"
        case Fp8BlockScale() | MxFp8():
            return "fp8_block_scale"
        case Nvfp4() | MxFp4():
            return "fp4_block_scale"
        case _:
            assert_never(fmt)
