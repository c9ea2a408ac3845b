"""Every family's transformers 5.23 config object -> the strategy of hf-routing.md, section 4.

The second half runs each family's own router next to the strategy: same experts, same weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import attrs
import pytest
import torch
from torch import Tensor, nn

from tests.models.hf import hf_config, quiet_import
from typed_moe.models import HasToDict, moe_layer_ids, moe_spec, num_hidden_layers, strategy_for
from typed_moe.routing import (
    BiasedSigmoid,
    BiasRule,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    RoutingShape,
    RoutingStrategy,
    ScaledSoftmax,
    SigmoidRenorm,
    SqrtSoftplus,
    TopKSigmoid,
)


@attrs.frozen
class Case:
    """A config class, settings over its defaults, and the strategy that its router equals."""

    model_type: str
    routing: RoutingStrategy
    settings: Mapping[str, object] = attrs.field(factory=dict)
    layer_id: int = 0

    def label(self) -> str:
        """The test id."""
        shown = ",".join(f"{name}={value}" for name, value in self.settings.items())
        return f"{self.model_type}({shown[:60]})"


def v3(groups: int, kept: int, scale: float) -> DeepSeekV3:
    """Biased grouped sigmoid, renormalised."""
    return DeepSeekV3(num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale)


def f10(groups: int, kept: int, scale: float) -> BiasedSigmoid:
    """F10: the same, not renormalised."""
    return BiasedSigmoid(num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale)


def f12(groups: int, kept: int, scale: float) -> GroupedSoftmax:
    """F12: softmax with groups scored by their best expert."""
    return GroupedSoftmax(
        num_expert_group=groups,
        topk_group=kept,
        group_score="max",
        norm_topk_prob=False,
        routed_scaling_factor=scale,
    )


def f13(groups: int, kept: int, norm: bool, scale: float) -> GroupedSoftmax:
    """F13: softmax with groups scored by their two best experts."""
    return GroupedSoftmax(
        num_expert_group=groups,
        topk_group=kept,
        group_score="top2_sum",
        norm_topk_prob=norm,
        routed_scaling_factor=scale,
    )


def f11(norm: bool, scale: float) -> ScaledSoftmax:
    """F11: softmax, scaled."""
    return ScaledSoftmax(norm_topk_prob=norm, routed_scaling_factor=scale)


NAIVE, NORM, NOT_NORM = RenormalizeNaive(), {"norm_topk_prob": True}, {"norm_topk_prob": False}
GROUPED = {"n_group": 4, "topk_group": 2}

CASES = [
    Case("mixtral", NAIVE),
    Case("olmoe", Default()),
    Case("olmoe", NAIVE, NORM),
    Case("qwen2_moe", Default()),
    Case("qwen2_moe", NAIVE, NORM),
    Case("qwen3_moe", Default()),
    Case("qwen3_moe", NAIVE, NORM),
    Case("qwen3_next", NAIVE),
    Case("qwen3_next", Default(), NOT_NORM),
    Case("qwen3_5_moe", NAIVE),
    Case("qwen3_5_moe_text", NAIVE),
    Case("deepseek_v2", Default()),
    Case("deepseek_v2", f11(False, 2.0), {"routed_scaling_factor": 2.0}),
    Case("deepseek_v2", f12(4, 2, 1.0), {"topk_method": "group_limited_greedy", **GROUPED}),
    Case(
        "deepseek_v2",
        f12(4, 2, 16.0),
        {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, **GROUPED},
    ),
    Case("deepseek_v2", Default(), GROUPED),  # greedy does not look at groups
    Case(
        "deepseek_v2",
        f11(False, 16.0),
        {
            "topk_method": "group_limited_greedy",
            "routed_scaling_factor": 16.0,
            "n_group": 1,
            "topk_group": 1,
        },
    ),
    Case("deepseek_v3", v3(8, 4, 2.5)),
    Case("deepseek_v3", f10(8, 4, 2.5), NOT_NORM),
    Case(
        "deepseek_v3", v3(1, 1, 1.0), {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.0}
    ),
    Case("deepseek_v3", v3(1, 1, 2.5), {"n_group": None, "topk_group": None}),
    Case("deepseek_v32", v3(8, 4, 2.5)),
    Case("deepseek_v32", f10(8, 4, 2.5), NOT_NORM),
    Case("deepseek_v4", SqrtSoftplus(routed_scaling_factor=1.5), layer_id=3),
    Case(
        "deepseek_v4",
        DeepSeekV3(routed_scaling_factor=1.5, router_logits_dtype=None),
        {"scoring_func": "sigmoid"},
        layer_id=3,
    ),
    Case("glm4_moe", v3(1, 1, 1.0)),
    Case("glm4_moe", f10(1, 1, 1.0), NOT_NORM),
    Case("glm4_moe", v3(4, 2, 1.0), GROUPED),
    Case("glm4_moe_lite", v3(1, 1, 1.8)),
    Case("glm4_moe_lite", f10(1, 1, 1.8), NOT_NORM),
    Case("glm_moe_dsa", v3(1, 1, 2.5)),
    Case("glm_moe_dsa", f10(1, 1, 2.5), NOT_NORM),
    Case("kimi_k25", v3(8, 4, 2.5)),
    Case("minimax_m2", MiniMax2()),
    Case("llama4", Llama4()),
    Case("llama4_text", Llama4()),
    Case("gpt_oss", Renormalize()),
    Case("nemotron_h", v3(1, 1, 1.0)),
    Case("nemotron_h", f10(1, 1, 1.0), NOT_NORM),
    Case("cohere2_moe", Renormalize()),
    Case("cohere2_moe", SigmoidRenorm(), {"expert_selection_fn": "sigmoid"}),
    Case("cohere2_moe", TopKSigmoid(), {"expert_selection_fn": "sigmoid", **NOT_NORM}),
    Case("step3p5", MiniMax2()),
    Case("step3p7", MiniMax2()),
    Case(
        "step3p5",
        MiniMax2(routed_scaling_factor=3.0, router_logits_dtype=torch.float32),
        {"moe_router_scaling_factor": 3.0, "need_fp32_gate": True},
    ),
    Case("step3p5", MiniMax2(), {"need_fp32_gate": False}),
    Case("mistral4", NAIVE),
    Case("mistral4", Default(), NOT_NORM),
    Case("mistral4", f11(True, 2.0), {"routed_scaling_factor": 2.0}),
    Case("mistral4", f11(False, 2.0), {"routed_scaling_factor": 2.0, **NOT_NORM}),
    Case("mistral4", f13(4, 2, True, 1.0), GROUPED),
    Case("mistral4", f13(4, 2, False, 2.0), {"routed_scaling_factor": 2.0, **GROUPED, **NOT_NORM}),
    Case("mistral_large4", NAIVE),
    Case("mistral_large4_text", NAIVE),
    Case("mistral_large4_text", f11(True, 2.0), {"routed_scaling_factor": 2.0}),
    Case("mistral_large4_text", f13(4, 2, True, 1.0), GROUPED),
]


@pytest.mark.parametrize("case", CASES, ids=Case.label)
def test_strategy_for(case: Case) -> None:
    """The config object and its dict both give the hand-written strategy."""
    config = hf_config(case.model_type, **case.settings)
    assert strategy_for(config, case.layer_id) == case.routing
    assert strategy_for(config.to_dict(), case.layer_id) == case.routing


def test_kimi_k25_keeps_the_raw_type_of_its_text_model() -> None:
    """The raw file says kimi_k2, which transformers turns into deepseek_v3."""
    text = {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1}
    config = hf_config("kimi_k25", text_config=text)
    assert strategy_for(config) == v3(1, 1, 2.5)


def test_both_spellings_of_the_expert_count() -> None:
    """transformers 5 renames num_experts; either spelling gives the same spec."""
    raw = {"norm_topk_prob": True, "num_experts": 64}
    as_read = moe_spec(hf_config("qwen3_moe", **raw))
    assert "num_experts" not in hf_config("qwen3_moe", **raw).to_dict()
    assert as_read.num_experts == 64
    assert as_read.sources["num_experts"] == "num_local_experts = 64"
    assert moe_spec({**hf_config("qwen3_moe", **raw).to_dict(), "num_experts": 64}) == as_read


def small(model_type: str, **settings: object) -> HasToDict:
    """A config whose router is small: 16 experts, 4 per token, 32 wide."""
    sizes: dict[str, object] = {"hidden_size": 32, "num_attention_heads": 4}
    name = "num_experts" if model_type in ("olmoe", "qwen2_moe") else "num_local_experts"
    top_k = 1 if model_type.startswith("llama4") else 4
    if model_type in ("qwen3_next", "qwen3_5_moe_text", "cohere2_moe"):
        name = "num_experts"
    if model_type.startswith(("deepseek", "glm", "nemotron", "mistral", "step")):
        name = "n_routed_experts"
    return hf_config(model_type, **{**sizes, name: 16, "num_experts_per_tok": top_k, **settings})


# model_type: folder and router class in transformers.
ROUTERS = {
    "mixtral": ("mixtral", "MixtralTopKRouter"),
    "olmoe": ("olmoe", "OlmoeTopKRouter"),
    "qwen2_moe": ("qwen2_moe", "Qwen2MoeTopKRouter"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeTopKRouter"),
    "qwen3_next": ("qwen3_next", "Qwen3NextTopKRouter"),
    "qwen3_5_moe_text": ("qwen3_5_moe", "Qwen3_5MoeTopKRouter"),
    "deepseek_v2": ("deepseek_v2", "DeepseekV2TopkRouter"),
    "deepseek_v3": ("deepseek_v3", "DeepseekV3TopkRouter"),
    "deepseek_v32": ("deepseek_v32", "DeepseekV32TopkRouter"),
    "deepseek_v4": ("deepseek_v4", "DeepseekV4TopKRouter"),
    "glm4_moe": ("glm4_moe", "Glm4MoeTopkRouter"),
    "glm4_moe_lite": ("glm4_moe_lite", "Glm4MoeLiteTopkRouter"),
    "glm_moe_dsa": ("glm_moe_dsa", "GlmMoeDsaTopkRouter"),
    "minimax_m2": ("minimax_m2", "MiniMaxM2TopKRouter"),
    "llama4_text": ("llama4", "Llama4Router"),
    "gpt_oss": ("gpt_oss", "GptOssTopKRouter"),
    "nemotron_h": ("nemotron_h", "NemotronHTopkRouter"),
    "cohere2_moe": ("cohere2_moe", "Cohere2MoeTopKRouter"),
    "step3p5": ("step3p7", "Step3p7TopKRouter"),
    "mistral4": ("mistral4", "Mistral4TopkRouter"),
    "mistral_large4_text": ("mistral_large4", "MistralLarge4TextTopkRouter"),
}

RUNNABLE = [
    case for case in CASES if case.model_type in ROUTERS and None not in case.settings.values()
]


def dense(ids: Tensor, weights: Tensor) -> Tensor:
    """(T, 16) weights, zero where an expert is not chosen."""
    return torch.zeros(ids.shape[0], 16).scatter_(1, ids.long(), weights.float())


def router_of(model_type: str, config: HasToDict) -> nn.Module:
    """transformers' router of one layer, with random weights and correction bias."""
    folder, name = ROUTERS[model_type]
    module = quiet_import(f"transformers.models.{folder}.modeling_{folder}")
    router = getattr(module, name)(config)
    assert isinstance(router, nn.Module)
    for tensor in [*router.parameters(), *router.buffers()]:
        nn.init.normal_(tensor, std=0.3)
    return router


@pytest.mark.parametrize("case", RUNNABLE, ids=Case.label)
def test_the_strategy_computes_what_transformers_router_computes(case: Case) -> None:
    """Same experts and weights as the family's own router, on random logits and bias."""
    torch.manual_seed(0)
    config = small(case.model_type, **case.settings)
    router = router_of(case.model_type, config)
    hidden = torch.randn(64, 32)
    bias = getattr(router, "e_score_correction_bias", torch.randn(16) * 0.3)
    if case.model_type == "llama4_text":
        expected, logits = router(hidden)
    else:
        own = (bias,) if case.model_type == "minimax_m2" else ()
        logits, weights, ids = router(hidden, *own)
        expected = dense(ids, weights)
    scale = config.to_dict().get("moe_router_scaling_factor", 1.0)  # Step scales the output
    assert isinstance(scale, float)
    strategy = strategy_for(config, case.layer_id)
    routed = strategy.select_experts(
        logits.detach(),
        bias if strategy.bias is BiasRule.REQUIRED else None,
        shape=RoutingShape(num_experts=16, top_k=1 if case.model_type == "llama4_text" else 4),
    )
    torch.testing.assert_close(
        dense(routed.topk_ids, routed.topk_weights), expected.detach() * scale, atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("config", "layers"),
    [
        (hf_config("mixtral", num_hidden_layers=3), (0, 1, 2)),
        (hf_config("qwen2_moe", num_hidden_layers=4, decoder_sparse_step=2), (1, 3)),
        (hf_config("qwen3_moe", num_hidden_layers=4, mlp_only_layers=[0, 2]), (1, 3)),
        (hf_config("deepseek_v3", num_hidden_layers=5), (3, 4)),
        (hf_config("deepseek_v32", num_hidden_layers=4, first_k_dense_replace=1), (1, 2, 3)),
        (
            hf_config(
                "glm_moe_dsa", num_hidden_layers=3, mlp_layer_types=["sparse", "dense", "sparse"]
            ),
            (0, 2),
        ),
        (hf_config("glm4_moe_lite", num_hidden_layers=3), (1, 2)),
        (hf_config("deepseek_v4", num_hidden_layers=4), (0, 1, 2, 3)),
        (hf_config("llama4_text", num_hidden_layers=6, interleave_moe_layer_step=2), (1, 3, 5)),
        (hf_config("llama4_text", num_hidden_layers=6, moe_layers=[0, 5]), (0, 5)),
        (hf_config("nemotron_h"), (1,)),
        (hf_config("nemotron_h", hybrid_override_pattern="ME*EM-"), (1, 3)),
        (hf_config("cohere2_moe", num_hidden_layers=4, first_k_dense_replace=2), (2, 3)),
        (hf_config("step3p5", num_hidden_layers=6), (3, 4, 5)),
        (hf_config("step3p5", num_hidden_layers=4, moe_layers_enum="1,3"), (1, 3)),
        (hf_config("mistral4", num_hidden_layers=3, first_k_dense_replace=1), (1, 2)),
        (hf_config("mistral_large4_text", num_hidden_layers=3), (1, 2)),
    ],
)
def test_moe_layer_ids(config: HasToDict, layers: tuple[int, ...]) -> None:
    """Which layers are MoE, and the first one with a rule we can honour."""
    assert moe_layer_ids(config) == layers
    assert moe_spec(config).layer_id == (3 if layers == (0, 1, 2, 3) else layers[0])


def test_layers_that_a_pattern_counts() -> None:
    """From the pattern where there is one, from the field elsewhere."""
    assert num_hidden_layers(hf_config("nemotron_h", hybrid_override_pattern="ME*EM-")) == 6
    assert num_hidden_layers(hf_config("deepseek_v3", num_hidden_layers=5)) == 5


def test_nemotron_latent_size_is_the_experts_width() -> None:
    """The router reads the model's width, the experts the latent one."""
    spec = moe_spec(hf_config("nemotron_h", moe_latent_size=1024))
    assert (spec.hidden_size, spec.router_hidden_size) == (1024, 4096)
    assert spec.sources["hidden_size"] == "moe_latent_size = 1024"
