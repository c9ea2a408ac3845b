"""Room 5: a strategy and quantised weights become one argument record and one kernel call."""

from __future__ import annotations

from typing import assert_never

from typed_moe.config import (
    Bf16,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Unquantized,
)
from typed_moe.kernels import ExpertWeights
from typed_moe.runners._base import NO_BUFFERS, CallBuffers, MoeRunner
from typed_moe.runners._bf16 import Bf16Runner
from typed_moe.runners._ep import Dispatched, EpMoeRunner, TokenExchange
from typed_moe.runners._exchanges import AllGatherReduceScatter, AllReduce
from typed_moe.runners._fp4 import Fp4Runner
from typed_moe.runners._fp8_block import Fp8BlockRunner
from typed_moe.runners._fp8_per_channel import Fp8PerChannelRunner
from typed_moe.runners._fp8_per_tensor import Fp8PerTensorRunner
from typed_moe.runners._kernel_runner import KernelRunner
from typed_moe.runners._mxint4 import MxInt4Runner
from typed_moe.runners._plan import Candidate, Plan
from typed_moe.runners._planning import Decision, decide

__all__ = [
    "NO_BUFFERS",
    "AllGatherReduceScatter",
    "AllReduce",
    "Bf16Runner",
    "CallBuffers",
    "Candidate",
    "Decision",
    "Dispatched",
    "EpMoeRunner",
    "ExpertWeights",
    "Fp4Runner",
    "Fp8BlockRunner",
    "Fp8PerChannelRunner",
    "Fp8PerTensorRunner",
    "KernelRunner",
    "MoeRunner",
    "MxInt4Runner",
    "Plan",
    "TokenExchange",
    "decide",
    "make_runner",
]


def make_runner(decision: Decision, weights: ExpertWeights) -> KernelRunner:
    """The runner of the plan's format, for weights that the plan's kernel has prepared."""
    match decision.plan.request.quant:
        case Unquantized() | Bf16():
            return Bf16Runner(decision, weights)
        case Fp8PerTensor():
            return Fp8PerTensorRunner(decision, weights)
        case Fp8PerChannel():
            return Fp8PerChannelRunner(decision, weights)
        case Fp8BlockScale() | MxFp8():
            return Fp8BlockRunner(decision, weights)
        case Nvfp4() | MxFp4():
            return Fp4Runner(decision, weights)
        case MxInt4():
            return MxInt4Runner(decision, weights)
        case quant:
            assert_never(quant)
