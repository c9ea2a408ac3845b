"""Acceptance tests on normalisation and scale: who multiplies, and exactly once."""

from __future__ import annotations

from typing import cast

import attrs
import pytest
import torch

from tests import oracle
from tests.acceptance import checks
from tests.acceptance.cases import CASES, WITH_BIAS, Case, find
from tests.acceptance.routes import Route, direct, in_kernel, routes
from typed_moe import (
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    ScaledSoftmax,
    ScaleOwner,
    Sigmoid,
    SigmoidRenorm,
    SqrtSoftplus,
    TopK,
    TopKSigmoid,
)

every = pytest.mark.parametrize(
    ("case", "route"), [pytest.param(c, r, id=name) for name, c, r in routes()]
)


@every
def test_acceptance_21_scale_exactly_once(case: Case, route: Route) -> None:
    """vllm#45037, #24118, sglang#8364: the factor is in the weights once, in every form."""
    checks.check_21_scale_once(case, route)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_21_the_plan_names_one_owner(case: Case) -> None:
    """sglang#8511: three possible owners of the factor; here exactly one is named."""
    scale = case.strategy.scale(RoutingForm.PRECOMPUTED)

    assert scale.factor == case.rule.scale
    assert scale.owner is not ScaleOwner.KERNEL
    assert (scale.owner is ScaleOwner.HOST) == (not hasattr(case.strategy, "routed_scaling_factor"))


@pytest.mark.parametrize(
    "strategy",
    [Default, Renormalize, RenormalizeNaive, TopK, Sigmoid, TopKSigmoid, SigmoidRenorm, Llama4],
)
def test_acceptance_21_a_method_without_scale_refuses_one(strategy: type) -> None:
    """FlashInfer ignores a factor given to these methods, so they have no such field."""
    with pytest.raises(TypeError, match="routed_scaling_factor"):
        strategy(routed_scaling_factor=2.5)


@every
def test_acceptance_24_one_expert(case: Case, route: Route) -> None:
    """sglang#40187: top-1 with a factor, under an allocator filled with NaN, 100 times alike."""
    # Fills fresh memory with NaN; torch.utils.deterministic.fill_uninitialized_memory is on.
    torch.use_deterministic_algorithms(True)
    try:
        if case.rule.num_expert_group == 1:
            checks.check_24_one_expert(case, route)
        one = attrs.evolve(case, top_k=1)
        logits = checks.normal_logits(one, 4)
        bias = one.bias()
        first = route(one, logits, bias)
        for _ in range(100 if route in (direct, in_kernel) else 3):
            assert torch.equal(route(one, logits, bias).dense, first.dense)
    finally:
        torch.use_deterministic_algorithms(False)


def test_acceptance_25_renormalize_equals_renormalize_naive() -> None:
    """vllm#43223: the two labels are one function; same ids, weights within one unit."""
    logits = torch.randn(4096, 128) * 3
    shape = RoutingShape(num_experts=128, top_k=8)
    one = Renormalize().select_experts(logits, shape=shape)
    other = RenormalizeNaive().select_experts(logits, shape=shape)

    assert torch.equal(one.topk_ids, other.topk_ids)
    # A softmax over 128 and a division against one over 8: a few roundings apart.
    torch.testing.assert_close(one.topk_weights, other.topk_weights, rtol=1e-6, atol=1e-7)


GROUPED_V3 = DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5)
GROUPED_SOFTMAX = GroupedSoftmax(
    num_expert_group=8, topk_group=3, group_score="max", norm_topk_prob=False
)
PERTURBED: tuple[tuple[RoutingStrategy, RoutingStrategy], ...] = (
    (GROUPED_V3, attrs.evolve(GROUPED_V3, num_expert_group=4)),
    (GROUPED_V3, attrs.evolve(GROUPED_V3, topk_group=2)),
    (GROUPED_V3, attrs.evolve(GROUPED_V3, routed_scaling_factor=1.0)),
    (MiniMax2(), MiniMax2(routed_scaling_factor=1.5)),
    (SqrtSoftplus(), SqrtSoftplus(routed_scaling_factor=1.5)),
    (
        ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=1.0),
        ScaledSoftmax(norm_topk_prob=False, routed_scaling_factor=1.0),
    ),
    (
        ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=1.0),
        ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=16.0),
    ),
    (GROUPED_SOFTMAX, attrs.evolve(GROUPED_SOFTMAX, num_expert_group=4)),
    (GROUPED_SOFTMAX, attrs.evolve(GROUPED_SOFTMAX, topk_group=2)),
    (GROUPED_SOFTMAX, attrs.evolve(GROUPED_SOFTMAX, group_score="top2_sum")),
    (GROUPED_SOFTMAX, attrs.evolve(GROUPED_SOFTMAX, norm_topk_prob=True)),
    (GROUPED_SOFTMAX, attrs.evolve(GROUPED_SOFTMAX, routed_scaling_factor=16.0)),
)


@pytest.mark.parametrize(("strategy", "changed"), PERTURBED, ids=repr)
def test_acceptance_26_no_field_is_dead(
    strategy: RoutingStrategy, changed: RoutingStrategy
) -> None:
    """TRT-LLM#13247: a flag that is stored and never used. Each field changes the output."""
    logits = torch.randn(64, 64) * 2
    bias = torch.randn(64) if strategy.bias.value == "required" else None
    shape = RoutingShape(num_experts=64, top_k=4)
    before = strategy.select_experts(logits, bias, shape=shape)
    after = changed.select_experts(logits, bias, shape=shape)

    dense = [oracle.dense(r.topk_ids, r.topk_weights, 64) for r in (before, after)]
    assert not torch.allclose(dense[0], dense[1], rtol=1e-3)


def test_acceptance_26_every_field_is_perturbed_somewhere() -> None:
    """The list above misses no setting; the two dtype settings have tests 14 and 61."""
    covered = {
        (type(one).__name__, field.name)
        for one, other in PERTURBED
        for field in attrs.fields(cast("type[attrs.AttrsInstance]", type(one)))
        if getattr(one, field.name) != getattr(other, field.name)
    }
    for case in CASES:
        for field in attrs.fields(cast("type[attrs.AttrsInstance]", type(case.strategy))):
            if field.name.endswith("_dtype") or case.strategy.name == "BiasedSigmoid":
                continue
            assert (case.strategy.name, field.name) in covered


def test_acceptance_26_the_dtype_fields_change_what_is_refused() -> None:
    """`router_logits_dtype` decides which logits are refused; bfloat16 passes once it may."""
    shape = RoutingShape(num_experts=8, top_k=2)
    logits, bias = torch.randn(3, 8).bfloat16(), torch.zeros(8)
    with pytest.raises(TypeError, match="bfloat16"):
        DeepSeekV3().select_experts(logits, bias, shape=shape)
    DeepSeekV3(router_logits_dtype=torch.bfloat16).select_experts(logits, bias, shape=shape)


@pytest.mark.parametrize("case", WITH_BIAS, ids=lambda case: case.id)
def test_acceptance_21_kernel_is_told_the_factor(case: Case) -> None:
    """vllm#23123, #43769: the factor reaches the kernel as an argument, not as a hope."""
    if case.strategy.name not in ("DeepSeekV3", "MiniMax2"):
        pytest.skip("no kernel knows this rule")
    from tests.acceptance.routes import told_by

    assert told_by(find(case.id)).routed_scaling_factor == case.rule.scale
