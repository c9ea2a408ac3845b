"""What SGLang 0.5.23 passes to FlashInfer for four layers, beside what we pass, argument by argument.

SGLang's side is transcribed from its source, `srt/layers/moe/moe_runner/flashinfer_trtllm.py`: read,
not run here, for a GPU that has programmatic dependent launch. Both sides are bound to the installed function
and filled with its defaults, so that an argument left out is one with a value. Each difference is
listed with its reason; a listed difference that is none fails as well.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import attrs
import pytest
import torch
from torch import Tensor

from tests.kernels.recorded_flashinfer import RecordedLibrary
from tests.layer.build import Build, random_experts
from typed_moe import (
    Bf16,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    Llama4,
    MxFp4,
    Nvfp4,
    Renormalize,
    RenormalizeNaive,
    Swiglu,
)
from typed_moe.kernels import FlashInferKernel

fused_moe = pytest.importorskip("flashinfer.fused_moe", reason="its signatures fill in defaults")

TOKENS, HIDDEN, WIDTH = 5, 256, 128
DEEPSEEK_V3 = Build(
    routing=DeepSeekV3(
        num_expert_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        correction_bias_dtype=torch.bfloat16,
    ),
    num_experts=256,
    top_k=8,
)
QWEN3 = Build(routing=RenormalizeNaive(), num_experts=128, top_k=8)
LLAMA4 = Build(routing=Llama4(), num_experts=16, top_k=1)
GPT_OSS = Build(
    routing=Renormalize(),
    num_experts=128,
    top_k=4,
    activation=Swiglu(alpha=1.702, beta=1.0, limit=7.0),
    has_bias=True,
)

Values = Mapping[str, object]
DEEPSEEK_ROUTING: Values = {
    "routing_logits": torch.float32,
    "routing_bias": torch.float32,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "routing_method_type": 2,
}
QWEN3_ROUTING: Values = {
    "routing_logits": torch.bfloat16,
    "routing_bias": None,
    "n_group": None,
    "topk_group": None,
    "routed_scaling_factor": 1.0,
    "routing_method_type": 4,
}
FP8_BLOCK: Values = {"use_shuffled_weight": False, "fp8_quantization_type": 1, "output": "buffer"}
PDL: Values = {"enable_pdl": True}
NO_SETTINGS: Values = dict.fromkeys(
    ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit", "gemm1_bias", "gemm2_bias")
)

TUNE = "fixed for the layer: a value that follows each call's T profiles again and again"
OUTPUT = "the caller gave none here; FusedMoE(...)(x, logits, output=buffer) passes it"
AUTO_PDL = "left to FlashInfer, which knows the device"
SAID = "said, since FlashInfer deprecates leaving it out; linear is what it then assumes"
NO_FACTOR = "None where the method has no factor; the kernel reads it as 1.0"
OWN_BIAS = "cast to what the grouped kernel rounds it to, and only where the strategy allows it"
KEPT = "kept as the gate gave them: rounding changes which experts are chosen (sglang#38695)"
ON_INPUT = "the flag belongs with Llama4: without it the weight goes on the output (sglang#22654)"
COMMON: Mapping[str, str] = {"tune_max_num_tokens": TUNE}


@attrs.frozen
class Pair:
    """One layer and format: SGLang's values, and where ours differ."""

    id: str
    build: Build
    quant: Format
    entry: str
    theirs: Values
    differs: Mapping[str, str]
    logits: torch.dtype = torch.bfloat16


PAIRS = (
    Pair(
        "deepseek-v3-fp8_block",
        DEEPSEEK_V3,
        Fp8BlockScale(),
        "trtllm_fp8_block_scale_moe",
        {**DEEPSEEK_ROUTING, **FP8_BLOCK, "enable_pdl": None},
        {**COMMON, "output": OUTPUT, "routing_bias": OWN_BIAS},
        torch.float32,
    ),
    Pair(
        "qwen3-fp8_block",
        QWEN3,
        Fp8BlockScale(),
        "trtllm_fp8_block_scale_moe",
        {**QWEN3_ROUTING, **FP8_BLOCK, "enable_pdl": None},
        {**COMMON, "output": OUTPUT, "routed_scaling_factor": NO_FACTOR},
    ),
    Pair(
        "deepseek-v3-nvfp4",
        DEEPSEEK_V3,
        Nvfp4(),
        "trtllm_fp4_block_scale_moe",
        {**DEEPSEEK_ROUTING, **NO_SETTINGS, **PDL, "output": "buffer"},
        {
            **COMMON,
            "output": OUTPUT,
            "enable_pdl": AUTO_PDL,
            "routing_bias": OWN_BIAS,
            "hidden_states_scale_layout": SAID,
        },
        torch.float32,
    ),
    Pair(
        "qwen3-nvfp4",
        QWEN3,
        Nvfp4(),
        "trtllm_fp4_block_scale_moe",
        {
            **QWEN3_ROUTING,
            **NO_SETTINGS,
            **PDL,
            "routed_scaling_factor": None,
            "output": "buffer",
        },
        {
            **COMMON,
            "output": OUTPUT,
            "enable_pdl": AUTO_PDL,
            "hidden_states_scale_layout": SAID,
        },
    ),
    Pair(
        "qwen3-bf16",
        QWEN3,
        Bf16(),
        "trtllm_bf16_moe",
        {**QWEN3_ROUTING, "routed_scaling_factor": None},
        COMMON,
    ),
    Pair(
        "deepseek-v3-bf16",
        DEEPSEEK_V3,
        Bf16(),
        "trtllm_bf16_moe",
        DEEPSEEK_ROUTING,
        {**COMMON, "routing_bias": OWN_BIAS},
        torch.float32,
    ),
    Pair(
        "deepseek-v3-fp8_per_tensor",
        DEEPSEEK_V3,
        Fp8PerTensor(),
        "trtllm_fp8_per_tensor_scale_moe",
        {
            **DEEPSEEK_ROUTING,
            "routing_logits": torch.bfloat16,
            "use_routing_scales_on_input": False,
        },
        {**COMMON, "routing_logits": KEPT, "routing_bias": OWN_BIAS},
        torch.float32,
    ),
    Pair(
        "llama4-fp8_per_tensor",
        LLAMA4,
        Fp8PerTensor(),
        "trtllm_fp8_per_tensor_scale_moe",
        {**QWEN3_ROUTING, "routing_method_type": 3, "use_routing_scales_on_input": False},
        {
            **COMMON,
            "use_routing_scales_on_input": ON_INPUT,
            "routed_scaling_factor": NO_FACTOR,
        },
    ),
    Pair(
        "gpt-oss-mxfp4",
        GPT_OSS,
        MxFp4(activation="mxfp8"),
        "trtllm_fp4_block_scale_moe",
        {
            **QWEN3_ROUTING,
            **PDL,
            "routed_scaling_factor": None,
            "routing_method_type": 1,
            "gemm1_alpha": torch.float32,
            "gemm1_beta": torch.float32,
            "gemm1_clamp_limit": torch.float32,
            "gemm1_bias": torch.float32,
            "gemm2_bias": torch.float32,
            "output": "buffer",
        },
        {
            **COMMON,
            "output": OUTPUT,
            "enable_pdl": AUTO_PDL,
            "hidden_states_scale_layout": SAID,
        },
    ),
)
SAME_BY_SHAPE = {"tune_max_num_tokens": 8, "activation_type": 3}


def _ours(pair: Pair) -> tuple[str, dict[str, object]]:
    library = RecordedLibrary("0.7.2.post1")
    made = attrs.evolve(
        pair.build,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        quant=pair.quant,
        kernel=FlashInferKernel(library),
        dtype=torch.bfloat16,
    )
    experts = random_experts(made.num_experts, HIDDEN, WIDTH, biases=made.has_bias)
    biased = isinstance(made.routing, DeepSeekV3)
    layer = made.loaded(experts, torch.randn(made.num_experts) if biased else None)
    for name, parameter in layer.named_parameters():
        if name.endswith("input_scale"):
            parameter.data.fill_(0.05)
    logits = torch.randn(TOKENS, made.num_experts, dtype=pair.logits)
    layer(torch.randn(TOKENS, HIDDEN).bfloat16(), logits)
    ((entry, arguments),) = library.calls
    return entry, arguments


def _filled(entry: str, arguments: Mapping[str, object]) -> dict[str, object]:
    bound = inspect.signature(getattr(fused_moe, entry)).bind_partial(**arguments)
    bound.apply_defaults()
    return dict(bound.arguments)


def _plain(value: object) -> object:
    """A tensor by its dtype, an enum member by its number."""
    if isinstance(value, Tensor):
        return value.dtype
    return int(value) if isinstance(value, int) and not isinstance(value, bool) else value


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.id)
def test_argument_by_argument(pair: Pair) -> None:
    """Equal, or different for a reason that is written down."""
    entry, arguments = _ours(pair)
    assert entry == pair.entry
    ours = _filled(entry, arguments)
    theirs = _filled(entry, {**SAME_BY_SHAPE, **pair.theirs})
    sizes = {"num_experts", "top_k", "intermediate_size", "local_expert_offset"}
    differences = {
        name
        for name in theirs
        if name not in sizes
        if _plain(ours.get(name)) != _plain(theirs[name])
    }
    assert differences == set(pair.differs)
    assert ours["num_experts"] == pair.build.num_experts
    assert ours["top_k"] == pair.build.top_k
    assert ours["intermediate_size"] == WIDTH
    assert ours["local_expert_offset"] == 0
    assert ours["local_num_experts"] == pair.build.num_experts


def test_activation_scales_have_sglangs_shapes() -> None:
    """[H / 128, T] float32, contiguous, for DeepSeek FP8; (T, H / 16) float8_e4m3fn for NVFP4."""
    (block,) = (pair for pair in PAIRS if pair.id == "qwen3-fp8_block")
    scale = _ours(block)[1]["hidden_states_scale"]
    assert isinstance(scale, Tensor)
    assert (tuple(scale.shape), scale.dtype) == ((HIDDEN // 128, TOKENS), torch.float32)
    assert scale.is_contiguous()
    (nvfp4,) = (pair for pair in PAIRS if pair.id == "qwen3-nvfp4")
    scale = _ours(nvfp4)[1]["hidden_states_scale"]
    assert isinstance(scale, Tensor)
    assert (tuple(scale.shape), scale.dtype) == ((TOKENS, HIDDEN // 16), torch.float8_e4m3fn)


@pytest.mark.parametrize("quant", [Fp8BlockScale(), Bf16(), Nvfp4()], ids=lambda quant: quant.name)
def test_llama4_is_not_sent_where_no_flag_is(quant: Format) -> None:
    """SGLang sends method 3 there, which weights the output; here ids and weight 1 go."""
    pair = Pair("llama4", LLAMA4, quant, "", {}, {})
    entry, arguments = _ours(pair)
    assert entry.endswith("_routed_moe")
    given = arguments["topk_ids"]
    assert isinstance(given, tuple)
    assert bool((given[1] == 1).all())
