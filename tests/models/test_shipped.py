"""The shipped configs, against values written down by hand from the models' facts."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import pytest
import torch

from tests.models.hf import from_json
from typed_moe.config import Activation, Relu2, Swiglu, SwigluStep
from typed_moe.models import load_config, moe_layer_ids, moe_spec, shipped_configs, strategy_for
from typed_moe.routing import (
    BiasRule,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    RoutingStrategy,
    SqrtSoftplus,
    TopKSigmoid,
)


@attrs.frozen
class Golden:
    """routing, E, k, H, I, (shared experts, their width), first MoE layer, MoE layers."""

    routing: RoutingStrategy
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    shared: tuple[int, int]
    first: int
    layers: int
    activation: Activation = attrs.field(factory=Swiglu)


def ungrouped(scale: float) -> DeepSeekV3:
    """DeepSeekV3 with one group, every setting written out."""
    return DeepSeekV3(
        num_expert_group=1,
        topk_group=1,
        routed_scaling_factor=scale,
        router_logits_dtype=torch.float32,
    )


GPT_OSS = Swiglu(alpha=1.702, beta=1.0, limit=7.0)
V2 = GroupedSoftmax(
    num_expert_group=8,
    topk_group=3,
    group_score="max",
    norm_topk_prob=False,
    routed_scaling_factor=16.0,
)
V3 = DeepSeekV3(
    num_expert_group=8,
    topk_group=4,
    routed_scaling_factor=2.5,
    router_logits_dtype=torch.float32,
)
M2 = MiniMax2(routed_scaling_factor=1.0, router_logits_dtype=None)
STEP = MiniMax2(routed_scaling_factor=3.0, router_logits_dtype=torch.float32)
V4 = SqrtSoftplus(routed_scaling_factor=1.5)

GOLDEN = {
    "deepseek-moe-16b": Golden(Default(), 64, 6, 2048, 1408, (2, 2816), 1, 27),
    "deepseek-v2": Golden(V2, 160, 6, 5120, 1536, (2, 3072), 1, 59),
    "deepseek-v2-lite": Golden(Default(), 64, 6, 2048, 1408, (2, 2816), 1, 26),
    "deepseek-v3": Golden(V3, 256, 8, 7168, 2048, (1, 2048), 3, 58),
    "deepseek-v4-flash": Golden(V4, 256, 6, 4096, 2048, (1, 2048), 3, 43, Swiglu(limit=10.0)),
    "glm-4.5": Golden(ungrouped(2.5), 160, 8, 5120, 1536, (1, 1536), 3, 89),
    "glm-4.5-air": Golden(ungrouped(1.0), 128, 8, 4096, 1408, (1, 1408), 1, 45),
    "glm-4.7": Golden(ungrouped(2.5), 160, 8, 5120, 1536, (1, 1536), 3, 89),
    "glm-5": Golden(ungrouped(2.5), 256, 8, 6144, 2048, (1, 2048), 3, 75),
    "gpt-oss-120b": Golden(Renormalize(), 128, 4, 2880, 2880, (0, 0), 0, 36, GPT_OSS),
    "gpt-oss-20b": Golden(Renormalize(), 32, 4, 2880, 2880, (0, 0), 0, 24, GPT_OSS),
    "kimi-k2": Golden(ungrouped(2.827), 384, 8, 7168, 2048, (1, 2048), 1, 60),
    "kimi-k2.5": Golden(ungrouped(2.827), 384, 8, 7168, 2048, (1, 2048), 1, 60),
    "llama4-maverick": Golden(Llama4(), 128, 1, 5120, 8192, (1, 8192), 1, 24),
    "llama4-scout": Golden(Llama4(), 16, 1, 5120, 8192, (1, 8192), 0, 48),
    "minimax-m2": Golden(M2, 256, 8, 3072, 1536, (0, 0), 0, 62),
    "mixtral-8x7b": Golden(RenormalizeNaive(), 8, 2, 4096, 14336, (0, 0), 0, 32),
    "nemotron-3-nano-30b-a3b": Golden(
        ungrouped(2.5), 128, 6, 2688, 1856, (1, 3712), 1, 23, Relu2()
    ),
    "north-mini-code-1.0": Golden(TopKSigmoid(), 128, 8, 2048, 768, (0, 0), 1, 48),
    "olmoe-1b-7b": Golden(Default(), 64, 8, 2048, 1024, (0, 0), 0, 16),
    "qwen2-57b-a14b": Golden(Default(), 64, 8, 3584, 2560, (1, 20480), 0, 28),
    "qwen3-235b-a22b": Golden(RenormalizeNaive(), 128, 8, 4096, 1536, (0, 0), 0, 94),
    "qwen3-30b-a3b": Golden(RenormalizeNaive(), 128, 8, 2048, 768, (0, 0), 0, 48),
    "qwen3-next-80b-a3b": Golden(RenormalizeNaive(), 512, 10, 2048, 512, (1, 512), 0, 48),
    "qwen3.5-35b-a3b": Golden(RenormalizeNaive(), 256, 8, 2048, 512, (1, 512), 0, 40),
    "step-3.5-flash": Golden(STEP, 288, 8, 4096, 1280, (1, 1280), 3, 42),
}


def test_every_shipped_config_is_in_the_golden_table() -> None:
    """No config ships without hand-written values."""
    assert tuple(sorted(GOLDEN)) == shipped_configs()


@pytest.mark.parametrize("name", GOLDEN)
def test_acceptance_36_config_gives_the_exact_strategy(name: str) -> None:
    """Acceptance test 36: each released config gives exactly its model's rule and sizes."""
    golden = GOLDEN[name]
    config = load_config(name)
    assert strategy_for(config, golden.first) == golden.routing
    spec = moe_spec(config)
    assert spec.routing == golden.routing
    assert spec.layer_id == golden.first
    assert (spec.num_experts, spec.top_k) == (golden.num_experts, golden.top_k)
    assert (spec.hidden_size, spec.intermediate_size) == (
        golden.hidden_size,
        golden.intermediate_size,
    )
    shared = (spec.num_shared_experts, spec.shared_expert_intermediate_size)
    assert shared == golden.shared
    assert spec.activation == golden.activation
    assert len(moe_layer_ids(config)) == golden.layers


@pytest.mark.parametrize("name", GOLDEN)
def test_source_is_named(name: str) -> None:
    """Every shipped config says where its values came from."""
    source = load_config(name)["_source"]
    assert isinstance(source, Mapping)
    assert set(source) == {"repository", "file", "note"}
    assert all(isinstance(value, str) and value for value in source.values())


@pytest.mark.parametrize("name", GOLDEN)
def test_every_setting_says_where_it_came_from(name: str) -> None:
    """Each decided thing has its field and value, or its default."""
    spec = moe_spec(load_config(name))
    things = ["model_type", "layers", "routing", "num_experts", "top_k", "hidden_size"]
    things += ["intermediate_size", "router_weight_fp32", "names"]
    routing = type(spec.routing)
    if isinstance(spec.routing, DeepSeekV3 | GroupedSoftmax):
        things += ["routing.num_expert_group", "routing.topk_group"]
    if hasattr(spec.routing, "routed_scaling_factor"):
        things += ["routing.routed_scaling_factor"]
    assert not [thing for thing in things if not spec.sources.get(thing)]
    assert spec.sources["routing"].startswith(routing.__name__)


@pytest.mark.parametrize("name", GOLDEN)
def test_the_strategy_wants_a_bias_where_the_checkpoint_has_one(name: str) -> None:
    """A bias tensor and a rule that reads it come together."""
    spec = moe_spec(load_config(name))
    assert spec.has_correction_bias == (spec.routing.bias is BiasRule.REQUIRED)
    assert spec.has_correction_bias == (spec.correction_bias_name is not None)


# transformers has neither, or maps the type of the nested config itself.
NOT_IN_TRANSFORMERS = {"deepseek-moe-16b", "kimi-k2"}


@pytest.mark.parametrize("name", sorted(set(GOLDEN) - NOT_IN_TRANSFORMERS))
def test_transformers_reading_of_the_file_gives_the_same_layer(name: str) -> None:
    """Both spellings: the raw config.json, and the object that transformers makes of it."""
    raw = load_config(name)
    ours = moe_spec(raw)
    theirs = moe_spec(from_json(raw))
    renamed = attrs.evolve(ours, model_type=theirs.model_type)  # kimi_k2 -> deepseek_v3
    assert renamed == theirs
    assert moe_layer_ids(raw) == moe_layer_ids(from_json(raw))


def test_step_clamps_only_the_layers_with_a_limit() -> None:
    """swiglu_limits is per layer: 7 on the last two, none elsewhere."""
    config = load_config("step-3.5-flash")
    assert moe_spec(config, 42).activation == Swiglu()
    assert moe_spec(config, 43).activation == SwigluStep(limit=7.0)
    assert moe_spec(config, 44).activation == SwigluStep(limit=7.0)
    assert moe_spec(config, 44).sources["activation"] == "swiglu_limits[44] = 7.0"
