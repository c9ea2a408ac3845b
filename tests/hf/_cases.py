"""The rules that are compared: per family its config settings, its strategy, and what to drop."""

from __future__ import annotations

from typing import Literal, final

import attrs
from torch import Tensor, nn
from typing_extensions import override

from tests.hf._families import (
    COHERE2_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    DEEPSEEK_V4,
    DEEPSEEK_V32,
    GLM4_MOE,
    GLM4_MOE_LITE,
    GLM_MOE_DSA,
    GPT_OSS,
    LLAMA4,
    MINIMAX_M2,
    MISTRAL4,
    MISTRAL_LARGE4,
    MIXTRAL,
    NEMOTRON_H,
    OLMOE,
    QWEN2_MOE,
    QWEN3_5_MOE,
    QWEN3_MOE,
    QWEN3_NEXT,
    STEP3P7,
    Family,
    Settings,
)
from typed_moe import (
    BiasedSigmoid,
    BiasRule,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    RoutingStrategy,
    ScaledSoftmax,
    SigmoidRenorm,
    SqrtSoftplus,
    TopKSigmoid,
)


@final
@attrs.frozen(kw_only=True)
class Drop:
    """A rule that differs in one ingredient. `routing` None: a correction bias of zeros."""

    what: str
    routing: RoutingStrategy | None


@final
@attrs.frozen(eq=False)
class Case:
    """One rule of one family.

    Attributes:
        name: of the test.
        family: its model.
        settings: of the config, over the family's.
        routing: what `strategy_for` has to give.
        drops: strategy by the ingredient that it lacks or adds.
    """

    name: str
    family: Family
    settings: Settings
    routing: RoutingStrategy
    drops: tuple[Drop, ...]

    @override
    def __str__(self) -> str:
        return self.name


@final
class SqrtSoftplusRaw(RoutingStrategy):
    """DeepSeek-V4's rule without the division, as a stranger would write it."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    @property
    @override
    def name(self) -> str:
        return "SqrtSoftplusRaw"

    @property
    @override
    def bias(self) -> BiasRule:
        return BiasRule.REQUIRED

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        assert e_score_correction_bias is not None
        scores = nn.functional.softplus(router_logits.float()).sqrt()
        ids = (scores + e_score_correction_bias).topk(shape.top_k, dim=-1).indices
        return Routed(topk_ids=ids, topk_weights=scores.gather(1, ids) * self._scale)


def v3(groups: int, kept: int, scale: float) -> DeepSeekV3:
    """Biased sigmoid, renormalised."""
    return DeepSeekV3(num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale)


def f10(groups: int, kept: int, scale: float) -> BiasedSigmoid:
    """Biased sigmoid, not renormalised."""
    return BiasedSigmoid(num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale)


def f11(scale: float, *, norm: bool) -> ScaledSoftmax:
    """Softmax times a factor."""
    return ScaledSoftmax(norm_topk_prob=norm, routed_scaling_factor=scale)


def grouped(score: Literal["max", "top2_sum"], scale: float, *, norm: bool) -> GroupedSoftmax:
    """Softmax within the 2 best of 4 groups: F12 with the maximum, F13 with the top-2 sum."""
    return GroupedSoftmax(
        num_expert_group=4,
        topk_group=2,
        group_score=score,
        norm_topk_prob=norm,
        routed_scaling_factor=scale,
    )


def drops(**rules: RoutingStrategy | None) -> tuple[Drop, ...]:
    """`drops(scale=...)`: the rule without its scale."""
    return tuple(Drop(what=what, routing=rule) for what, rule in rules.items())


DEFAULT, NAIVE = Default(), RenormalizeNaive()
NORM, NO_NORM = {"norm_topk_prob": True}, {"norm_topk_prob": False}
PLAIN: Settings = {"n_group": 1, "topk_group": 1, **NORM}
GROUPS: Settings = {"n_group": 4, "topk_group": 2, **NORM}
UNSCALED: Settings = {"routed_scaling_factor": 1.0}
SCALED: Settings = {"routed_scaling_factor": 2.5}
KIMI: Settings = {"routed_scaling_factor": 2.827}
LIMITED: Settings = {**GROUPS, **SCALED, **NO_NORM, "topk_method": "group_limited_greedy"}
GREEDY: Settings = {"topk_method": "greedy"}
SIGMOID: Settings = {"expert_selection_fn": "sigmoid"}
SOFTMAX: Settings = {"expert_selection_fn": "softmax", "num_shared_experts": 2}
SUM: Settings = {"shared_expert_combination_strategy": "sum"}
STEP: Settings = {"moe_router_scaling_factor": 3.0}
V4: Settings = {"routed_scaling_factor": 1.5}

SOFTMAX_CASES = (
    Case("mixtral", MIXTRAL, {}, NAIVE, drops(renorm=DEFAULT)),
    Case("olmoe", OLMOE, NO_NORM, DEFAULT, drops(no_renorm=NAIVE)),
    Case("olmoe-norm", OLMOE, NORM, NAIVE, drops(renorm=DEFAULT)),
    Case("qwen2_moe", QWEN2_MOE, NO_NORM, DEFAULT, drops(no_renorm=NAIVE)),
    Case("qwen2_moe-norm", QWEN2_MOE, NORM, NAIVE, drops(renorm=DEFAULT)),
    Case("qwen3_moe", QWEN3_MOE, NORM, NAIVE, drops(renorm=DEFAULT)),
    Case("qwen3_moe-no_norm", QWEN3_MOE, NO_NORM, DEFAULT, drops(no_renorm=NAIVE)),
    Case("qwen3_next", QWEN3_NEXT, NORM, NAIVE, drops(renorm=DEFAULT)),
    Case("qwen3_next-no_norm", QWEN3_NEXT, NO_NORM, DEFAULT, drops(no_renorm=NAIVE)),
    Case("qwen3_5_moe", QWEN3_5_MOE, {}, NAIVE, drops(renorm=DEFAULT)),
    Case("gpt_oss", GPT_OSS, {}, Renormalize(), drops(renorm=DEFAULT)),
    Case("llama4", LLAMA4, {}, Llama4(), drops(weight_on_input=TopKSigmoid())),
    Case("cohere2_moe-softmax", COHERE2_MOE, SOFTMAX, Renormalize(), drops(renorm=DEFAULT)),
    Case(
        "cohere2_moe-sigmoid",
        COHERE2_MOE,
        {**SIGMOID, **NORM},
        SigmoidRenorm(),
        drops(renorm=TopKSigmoid()),
    ),
    Case(
        "cohere2_moe-sigmoid-no_norm",
        COHERE2_MOE,
        {**SIGMOID, **NO_NORM, **SUM},
        TopKSigmoid(),
        drops(no_renorm=SigmoidRenorm()),
    ),
    Case(
        "deepseek_v2",
        DEEPSEEK_V2,
        {**GREEDY, **UNSCALED, **NO_NORM},
        DEFAULT,
        drops(no_renorm=NAIVE),
    ),
    Case(
        "deepseek_v2-F11",
        DEEPSEEK_V2,
        {**GREEDY, **SCALED, **NO_NORM},
        f11(2.5, norm=False),
        drops(scale=DEFAULT, no_renorm=f11(2.5, norm=True)),
    ),
    Case(
        "deepseek_v2-F12",
        DEEPSEEK_V2,
        LIMITED,
        grouped("max", 2.5, norm=False),
        drops(
            groups=f11(2.5, norm=False),
            groups_by_maximum=grouped("top2_sum", 2.5, norm=False),
            scale=grouped("max", 1.0, norm=False),
            no_renorm=grouped("max", 2.5, norm=True),
        ),
    ),
    Case("mistral4", MISTRAL4, {**PLAIN, **UNSCALED}, NAIVE, drops(renorm=DEFAULT)),
    Case(
        "mistral4-no_norm",
        MISTRAL4,
        {**PLAIN, **UNSCALED, **NO_NORM},
        DEFAULT,
        drops(no_renorm=NAIVE),
    ),
    Case(
        "mistral4-F11",
        MISTRAL4,
        {**PLAIN, **SCALED},
        f11(2.5, norm=True),
        drops(scale=NAIVE, renorm=f11(2.5, norm=False)),
    ),
    Case(
        "mistral4-F11-no_norm",
        MISTRAL4,
        {**PLAIN, **SCALED, **NO_NORM},
        f11(2.5, norm=False),
        drops(scale=DEFAULT, no_renorm=f11(2.5, norm=True)),
    ),
    Case(
        "mistral4-F13",
        MISTRAL4,
        {**GROUPS, **SCALED},
        grouped("top2_sum", 2.5, norm=True),
        drops(
            groups=f11(2.5, norm=True),
            groups_by_top2_sum=grouped("max", 2.5, norm=True),
            scale=grouped("top2_sum", 1.0, norm=True),
            renorm=grouped("top2_sum", 2.5, norm=False),
        ),
    ),
    Case("mistral_large4", MISTRAL_LARGE4, {**PLAIN, **UNSCALED}, NAIVE, drops(renorm=DEFAULT)),
    Case(
        "mistral_large4-F13",
        MISTRAL_LARGE4,
        {**GROUPS, **SCALED},
        grouped("top2_sum", 2.5, norm=True),
        drops(
            groups=f11(2.5, norm=True),
            groups_by_top2_sum=grouped("max", 2.5, norm=True),
            scale=grouped("top2_sum", 1.0, norm=True),
            renorm=grouped("top2_sum", 2.5, norm=False),
        ),
    ),
)
BIASED_CASES = (
    Case(
        "deepseek_v3-groups",
        DEEPSEEK_V3,
        {**GROUPS, **SCALED},
        v3(4, 2, 2.5),
        drops(bias=None, scale=v3(4, 2, 1.0), groups=v3(1, 1, 2.5), renorm=f10(4, 2, 2.5)),
    ),
    Case(
        "deepseek_v3-F10",
        DEEPSEEK_V3,
        {**GROUPS, **SCALED, **NO_NORM},
        f10(4, 2, 2.5),
        drops(bias=None, scale=f10(4, 2, 1.0), groups=f10(1, 1, 2.5), no_renorm=v3(4, 2, 2.5)),
    ),
    Case(
        "deepseek_v3",
        DEEPSEEK_V3,
        {**PLAIN, **UNSCALED},
        v3(1, 1, 1.0),
        drops(bias=None, renorm=f10(1, 1, 1.0), no_scale=v3(1, 1, 2.5), no_groups=v3(4, 2, 1.0)),
    ),
    Case(
        "kimi_k2",
        DEEPSEEK_V3,
        {**PLAIN, **KIMI},
        v3(1, 1, 2.827),
        drops(bias=None, scale=v3(1, 1, 1.0), renorm=f10(1, 1, 2.827)),
    ),
    Case(
        "glm4_moe",
        GLM4_MOE,
        {**PLAIN, **SCALED},
        v3(1, 1, 2.5),
        drops(bias=None, scale=v3(1, 1, 1.0), renorm=f10(1, 1, 2.5)),
    ),
    Case(
        "glm4_moe-F10",
        GLM4_MOE,
        {**PLAIN, **SCALED, **NO_NORM},
        f10(1, 1, 2.5),
        drops(bias=None, scale=f10(1, 1, 1.0), no_renorm=v3(1, 1, 2.5)),
    ),
    Case(
        "glm4_moe_lite",
        GLM4_MOE_LITE,
        {**PLAIN, "routed_scaling_factor": 1.8},
        v3(1, 1, 1.8),
        drops(bias=None, scale=v3(1, 1, 1.0), renorm=f10(1, 1, 1.8)),
    ),
    Case(
        "glm_moe_dsa",
        GLM_MOE_DSA,
        {**PLAIN, **SCALED},
        v3(1, 1, 2.5),
        drops(bias=None, scale=v3(1, 1, 1.0), renorm=f10(1, 1, 2.5)),
    ),
    Case(
        "deepseek_v32",
        DEEPSEEK_V32,
        {**GROUPS, **SCALED},
        v3(4, 2, 2.5),
        drops(bias=None, scale=v3(4, 2, 1.0), groups=v3(1, 1, 2.5), renorm=f10(4, 2, 2.5)),
    ),
    Case("minimax_m2", MINIMAX_M2, {}, MiniMax2(), drops(bias=None, renorm=BiasedSigmoid())),
    Case(
        "nemotron_h",
        NEMOTRON_H,
        {**PLAIN, **SCALED},
        v3(1, 1, 2.5),
        drops(bias=None, scale=v3(1, 1, 1.0), renorm=f10(1, 1, 2.5)),
    ),
    Case(
        "nemotron_h-latent",
        NEMOTRON_H,
        {**GROUPS, **SCALED, "moe_latent_size": 24},
        v3(4, 2, 2.5),
        drops(bias=None, scale=v3(4, 2, 1.0), groups=v3(1, 1, 2.5), renorm=f10(4, 2, 2.5)),
    ),
    Case(
        "nemotron_h-F10",
        NEMOTRON_H,
        {**PLAIN, **SCALED, **NO_NORM},
        f10(1, 1, 2.5),
        drops(bias=None, scale=f10(1, 1, 1.0), no_renorm=v3(1, 1, 2.5)),
    ),
    Case(
        "step3p7",
        STEP3P7,
        STEP,
        MiniMax2(routed_scaling_factor=3.0),
        drops(bias=None, scale=MiniMax2(), renorm=BiasedSigmoid(routed_scaling_factor=3.0)),
    ),
    Case(
        "deepseek_v4",
        DEEPSEEK_V4,
        V4,
        SqrtSoftplus(routed_scaling_factor=1.5),
        drops(
            bias=None,
            scale=SqrtSoftplus(),
            renorm=SqrtSoftplusRaw(1.5),
            sqrt_softplus=v3(1, 1, 1.5),
        ),
    ),
    Case(
        "deepseek_v4-sigmoid",
        DEEPSEEK_V4,
        {**V4, "scoring_func": "sigmoid"},
        DeepSeekV3(routed_scaling_factor=1.5, router_logits_dtype=None),  # a gate in any dtype
        drops(bias=None, scale=v3(1, 1, 1.0), renorm=f10(1, 1, 1.5)),
    ),
)
CASES = SOFTMAX_CASES + BIASED_CASES
