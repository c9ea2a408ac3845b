"""transformers' routers alone, at sizes near the released models', and the rows they are shown."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import final

import attrs
import torch
from torch import Tensor, nn

from tests import oracle
from tests.hf._cases import Case
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
    Call,
    Family,
)
from tests.hf._models import BIAS_SPREAD, GATE_SPREAD, config_of, model_of
from typed_moe import RoutingShape, RoutingStrategy, strategy_for
from typed_moe.models import HasToDict

SIZES: Mapping[Family, tuple[int, int]] = {
    MIXTRAL: (8, 2),
    OLMOE: (64, 8),
    QWEN2_MOE: (64, 8),
    QWEN3_MOE: (128, 8),
    QWEN3_NEXT: (512, 10),
    QWEN3_5_MOE: (256, 8),
    GPT_OSS: (128, 4),
    LLAMA4: (128, 1),
    COHERE2_MOE: (128, 8),
    DEEPSEEK_V2: (160, 6),
    DEEPSEEK_V3: (256, 8),
    DEEPSEEK_V32: (256, 8),
    DEEPSEEK_V4: (256, 6),
    GLM4_MOE: (160, 8),
    GLM4_MOE_LITE: (64, 4),
    GLM_MOE_DSA: (256, 8),
    MINIMAX_M2: (256, 8),
    NEMOTRON_H: (128, 6),
    STEP3P7: (288, 8),
    MISTRAL4: (128, 4),
    MISTRAL_LARGE4: (128, 4),
}
"""Experts and top-k of a released model of the family."""

_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")


@final
@attrs.frozen(kw_only=True, eq=False)
class Router:
    """A family's router with `hidden_size` = E.

    Attributes:
        case: whose.
        module: transformers'.
        routing: our strategy for the same config.
        shape: E and k.
        bias: the correction bias, None without.
        output_scale: what the model's block multiplies the routed output by; it is not in the
            router's weights, and is in ours.
    """

    case: Case
    module: nn.Module
    routing: RoutingStrategy
    shape: RoutingShape
    bias: Tensor | None
    output_scale: float

    def answer(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (T, E), ids (T, k), weights (T, k) as the model's experts would get them."""
        if self.case.family.call is Call.LOGITS_SECOND:
            scores, logits = self.module(x)
            weights, ids = scores.topk(self.shape.top_k, dim=1)
        elif self.case.family.call is Call.WITH_BIAS:
            logits, weights, ids = self.module(x, self.bias)
        else:
            logits, weights, ids = self.module(x)
        return logits, ids, weights * self.output_scale


def size_of(case: Case) -> tuple[int, int]:
    """Experts and top-k; Kimi-K2 has DeepSeek-V3's code at a size of its own."""
    return (384, 8) if case.name == "kimi_k2" else SIZES[case.family]


def router_of(case: Case) -> Router:
    """The case's router at the released model's size."""
    family = case.family
    experts, top_k = size_of(case)
    count = next(name for name in _COUNTS if name in family.settings)
    settings = {**case.settings, count: experts, "hidden_size": experts}
    settings["num_experts_per_tok"] = top_k
    if settings.get("n_group", 1) != 1:
        settings.update(n_group=8, topk_group=3 if family is DEEPSEEK_V2 else 4)
    config = config_of(family, settings)
    tiny = model_of(case)
    layer = tiny.layers[0]
    gate = tiny.module.get_submodule(tiny.path(layer)).get_submodule(family.gate)
    module = type(gate)(_text(config))
    module.requires_grad_(False)
    for name, tensor in module.state_dict().items():
        tensor.normal_(0.0, 0.5 if name == "bias" else BIAS_SPREAD)
    routing = strategy_for(config, layer)
    bias = module.state_dict().get("e_score_correction_bias")
    if family.call is Call.WITH_BIAS:
        bias = torch.randn(experts) * BIAS_SPREAD
    scale = settings.get("moe_router_scaling_factor", 1.0)
    assert isinstance(scale, float)
    return Router(
        case=case,
        module=module,
        routing=routing,
        shape=RoutingShape(num_experts=experts, top_k=top_k),
        bias=bias,
        output_scale=scale,
    )


def _text(config: HasToDict) -> HasToDict:
    """The text part of a config, which is what a router is built from."""
    text: HasToDict = getattr(config, "text_config", config)
    return text


def rows(router: Router, count: int) -> Iterator[Tensor]:
    """`count` router inputs in ten chunks: half through a random gate, half adverse logits."""
    experts, size = router.shape.num_experts, count // 10
    weight = router.module.get_parameter("weight")
    weight.normal_(0.0, GATE_SPREAD / math.sqrt(experts))
    for _ in range(5):
        yield torch.randn(size, experts)
    weight.copy_(torch.eye(experts))  # the logits are the input
    yield -5.0 * torch.rand(size, experts) - 0.1  # all negative
    yield 0.05 * torch.randn(size, experts)  # all alike
    yield GATE_SPREAD * torch.randn(size, experts) - 20.0  # sigmoids of 1e-9
    yield GATE_SPREAD * torch.randn(size, experts) + 3.0  # most sigmoids near 1
    # Float32 sigmoids tie above 17, so a rule that ranks by them alone is shown none of those.
    wide = 1.0 if router.routing.name == "SigmoidRenorm" else 6.0
    yield wide * torch.randn(size, experts)


def rule_of(routing: RoutingStrategy) -> oracle.Rule:
    """What the oracle ranks by for a strategy; its weights are left plain."""
    return replace(
        oracle.RULES[routing.name],
        saturates=False,
        num_expert_group=getattr(routing, "num_expert_group", 1),
        topk_group=getattr(routing, "topk_group", 1),
        group_score=getattr(routing, "group_score", "top2_sum"),
    )


def choice_of(case: Case) -> tuple[object, ...]:
    """What decides a case's experts, its weights apart: cases with the same choose alike."""
    rule = rule_of(case.routing)
    return (
        case.family,
        size_of(case),
        rule.rank,
        rule.biased,
        rule.num_expert_group,
        rule.group_score,
    )


def decided(router: Router, logits: Tensor) -> Tensor:
    """(T,) rows whose choice float32 rounding cannot change, says the float64 oracle.

    A score counts as uncertain by (8 + |logit|) float32 rounding steps of the larger of score
    and bias; a row is decided where the k-th best expert, and the last kept group, stay above
    the next one by more than that.
    """
    rule = rule_of(router.routing)
    return oracle.route(rule, logits, router.bias, router.shape.top_k).decided
