"""What FlashInfer's trtllm MoE entry points take, as data, for releases from 0.5.0 on.

Sources: the wheels of 0.5.0, 0.5.3, 0.6.0, 0.6.3, 0.6.7, 0.6.8, 0.6.12, 0.6.18, 0.7.0 and
0.7.2.post1: `fused_moe/core.py` (arguments), `RoutingCustomPolicy.cuh` (compiled tiers, 0.6.8 on),
`trtllm_fused_moe_routing_renormalize.cu` (before), `..._deepseek.cu` and `..._llama4.cu` (kernel
limits), `trtllm_fused_moe_kernel_launcher.cu` (checks). All that is said of routing from logits
is compared with 0.7.2.post1's own routing kernels by `python -m tests.conformance`, last on an
H100, 2026-11-23 (docs/conformance.md).

Argument names are not here: they are read from the installed functions.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import assert_never, final

import attrs
import torch

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
    Unquantized,
)
from typed_moe.kernels.args import Family
from typed_moe.kernels.flashinfer_versions import Version, version_text
from typed_moe.routing import BrokenRows, GroupLimits, MethodRules, PrecomputedRules, Tier

OLDEST: Version = (0, 5, 0)
NEWEST = "0.7.2.post1"
"""The newest release that the table was checked against; later ones are taken to be like it."""

_LOGITS = (torch.float32, torch.bfloat16)
_BIAS = (torch.float32, torch.bfloat16)
_SIGMOID_ERROR = 4.0e-6
"""Of `sigmoid_accurate` in `RoutingKernel.cuh`, 0.5 * tanh(x / 2) + 0.5, in the fast arithmetic that
FlashInfer compiles with: 3.99e-6 over all float32 (8.2e-8 without), H100, 2026-11-23."""
_SOFTMAX_ROWS = BrokenRows(nan="nan", minus_infinity="nan", one_nan="nan")
_LOGIT_ROWS = BrokenRows(nan="nan", minus_infinity="other", one_nan="other")
_SIGMOID_ROWS = BrokenRows(nan="nan", minus_infinity="zero", one_nan="other")
_BIASED_ROWS = BrokenRows(nan="nan", minus_infinity="zero", one_nan="nan")

_SMALL = MethodRules(tiers=(Tier(max_experts=256, max_top_k=8),), logits_dtypes=_LOGITS)
_SMALL_SIGMOID = attrs.evolve(_SMALL, score_error=_SIGMOID_ERROR, broken_rows=_SIGMOID_ROWS)
_SOFTMAX = MethodRules(
    tiers=(Tier(max_experts=2048, max_top_k=32),),
    logits_dtypes=_LOGITS,
    broken_rows=_SOFTMAX_ROWS,
)
_BIASED = MethodRules(
    tiers=(Tier(max_experts=1024, max_top_k=32),),
    logits_dtypes=_LOGITS,
    bias_dtypes=_BIAS,
    no_bias="fault",
    score_error=_SIGMOID_ERROR,
    broken_rows=_BIASED_ROWS,
)
_LLAMA4 = MethodRules(
    tiers=(Tier(max_experts=128, max_top_k=1),),
    logits_dtypes=_LOGITS,
    score_error=_SIGMOID_ERROR,
    broken_rows=BrokenRows(one_nan="other"),
)
_DEEPSEEK_V3 = MethodRules(
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
    no_bias="fault",
    grouped_no_bias="zeros",
    score_error=_SIGMOID_ERROR,
    broken_rows=_BIASED_ROWS,
)


@final
@attrs.frozen
class Method:
    """A routing method from logits, and the first release whose kernel can be relied on."""

    rules: MethodRules
    since: Version
    before: str
    """What earlier releases do, with its source."""


_RENORMALIZE = Method(
    _SOFTMAX,
    (0, 6, 8),
    "they choose wrong experts where all logits are negative (flashinfer#2822)",
)
_UNCOVERED = "a size without a compiled kernel leaves the routing uninitialised (flashinfer#3840)"
_LOST_WEIGHTS = (
    "weights are recovered as (biased score - bias), which is 0 for a small sigmoid beside a large "
    "bias (flashinfer#3875)"
)

METHODS: Mapping[str, Method] = MappingProxyType(
    {
        "Default": Method(attrs.evolve(_SMALL, broken_rows=_SOFTMAX_ROWS), (0, 6, 16), _UNCOVERED),
        "Renormalize": _RENORMALIZE,
        "RenormalizeNaive": _RENORMALIZE,
        "TopK": Method(attrs.evolve(_SMALL, broken_rows=_LOGIT_ROWS), (0, 6, 16), _UNCOVERED),
        "Sigmoid": Method(_SMALL_SIGMOID, (0, 6, 16), _UNCOVERED),
        "SigmoidRenorm": Method(_SMALL_SIGMOID, (0, 6, 16), _UNCOVERED),
        "TopKSigmoid": Method(_SMALL_SIGMOID, (0, 6, 18), "they have no such method"),
        "Llama4": Method(
            _LLAMA4,
            (0, 6, 16),
            "the flag that puts the weight on the input is read and dropped (flashinfer#4252)",
        ),
        "MiniMax2": Method(_BIASED, (0, 6, 18), _LOST_WEIGHTS),
        "DeepSeekV3": Method(_DEEPSEEK_V3, (0, 6, 18), _LOST_WEIGHTS),
    }
)
"""Routing methods from logits, the same for every entry point.

DeepSeekV3's grouped kernel is right one release earlier than the ungrouped one (flashinfer#3946);
the difference is not worth a second line. int4 reads bfloat16 biases alone before 0.6.18
(flashinfer#3898), where no method with a bias is routed.
"""

WEIGHT_ON_INPUT: frozenset[Family] = frozenset({"fp8_per_tensor_scale", "fp8_per_channel_scale"})
"""Families whose entry points can apply the weight to the expert's input, where told to."""

TUPLE_IDS: Mapping[Family, Version] = MappingProxyType(
    {
        "fp4_block_scale": (0, 6, 16),
        "bf16": (0, 6, 18),
        "fp8_per_tensor_scale": (0, 6, 18),
        "fp8_block_scale": (0, 6, 18),
    }
)
"""Since when precomputed ids and float32 weights are taken side by side.

Earlier ones take a packed word of id and bfloat16 weight. FP4 takes a pair from 0.6.12 on, and
reads its float32 weights as such from 0.6.16 on (flashinfer#3763). A family that is not here takes
packed words in every release.
"""

REPLAY_SINCE: Version = (0, 6, 13)
REPLAY: Mapping[str | None, Version] = MappingProxyType({"Llama4": (0, 6, 18)})
"""Since when `routing_replay_out` is written; before, most kernels leave it as it was (#3382)."""

WEIGHTS_LABELLED: Mapping[Family, Version] = MappingProxyType(
    {
        "bf16": (0, 6, 16),
        "fp8_per_tensor_scale": (0, 6, 16),
        "fp8_per_channel_scale": (0, 6, 16),
        "fp8_block_scale": (0, 6, 16),
        "fp4_block_scale": (0, 6, 15),
        "mxint4_block_scale": (0, 6, 16),
    }
)
"""Since when `do_finalize=False` from logits says that its weights are bfloat16, which they are.

Before, float32 logits gave a tensor that calls itself float32 (flashinfer#3595, #3644, #3925). The
logits' dtype is a call's, so the whole release is refused from logits. Precomputed weights have
their dtype in every release: bfloat16 out of packed words, the caller's own where they are a tensor.
"""

ACTIVATIONS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "bf16": frozenset({"Swiglu", "SwigluStep", "Relu2"}),
        "fp8_per_tensor": frozenset({"Swiglu", "SwigluStep", "Relu2"}),
        "fp8_per_channel": frozenset({"Swiglu", "Relu2"}),
        "fp8_block": frozenset({"Swiglu"}),
        "mxfp8": frozenset({"Swiglu", "SwigluStep", "Relu2"}),
        "nvfp4": frozenset({"Swiglu", "SwigluStep", "Relu2"}),
        "mxfp4": frozenset({"Swiglu", "Relu2"}),
        "mxint4": frozenset({"Swiglu"}),
    }
)
"""By format. FlashInfer's docstrings; SwigluStep as its references compute it.

Geglu is left out: FlashInfer's docstrings name it without saying which GELU it is.
"""

PLAIN_SWIGLU = frozenset({"mxint4"})
"""Formats that run Swiglu without alpha, beta and limit only.

The entry points take all three, but a precomputed call may run a tactic that leaves them out:
`MxInt4BlockScaleLauncher::run_da_body` of 0.7.2.post1 sets them to null.
"""

RAW_LIMITS = frozenset({"fp8_per_tensor", "nvfp4"})
"""Formats whose epilogue clamps before the output scale is applied.

There SwigluStep's limit goes in divided by that scale (`core.py`: "the raw accumulator limit").
For Swiglu nothing says in which units alpha, beta and limit are, so they are refused there.
"""


def precomputed_rules(family: Family, version: Version) -> PrecomputedRules:
    """What a `_routed` entry point takes, apart from being there at all.

    Before 0.6.7 the permutation kernel stops at 512 experts and top_k 10
    (`trtllm_fused_moe_routing_renormalize.cu`); from then on at 2048 and 32.
    """
    tier = Tier(max_experts=2048, max_top_k=32)
    if version < (0, 6, 7):
        tier = Tier(max_experts=512, max_top_k=10)
    since = TUPLE_IDS.get(family)
    packed = since is None or version < since
    return PrecomputedRules(tiers=(tier,), packed=packed)


def methods(
    version: Version, family: Family
) -> tuple[Mapping[str, MethodRules], Mapping[str, str]]:
    """The methods that a release routes from logits, and why it does not route the others.

    With FP8 per channel, a weight on the input asks for bfloat16 logits (launcher,
    `Fp8PerChannelLauncher::check_routing`).
    """
    served = {name: method.rules for name, method in METHODS.items() if version >= method.since}
    if family == "fp8_per_channel_scale" and "Llama4" in served:
        served["Llama4"] = attrs.evolve(_LLAMA4, logits_dtypes=(torch.bfloat16,))
    refused = {
        name: f"FlashInfer below {version_text(method.since)} does not route {name} here: "
        f"{method.before}"
        for name, method in METHODS.items()
        if version < method.since
    }
    return MappingProxyType(served), MappingProxyType(refused)


def family_of(fmt: Format) -> Family | None:
    """The entry points that take a format; None where FlashInfer has none."""
    match fmt:
        case Unquantized():
            return None
        case Bf16():
            return "bf16"
        case Fp8PerTensor():
            return "fp8_per_tensor_scale"
        case Fp8PerChannel():
            return "fp8_per_channel_scale"
        case Fp8BlockScale() | MxFp8():
            return "fp8_block_scale"
        case Nvfp4() | MxFp4():
            return "fp4_block_scale"
        case MxInt4():
            return "mxint4_block_scale"
        case _:
            assert_never(fmt)
