"""Acceptance tests 13 to 19 and 61: the correction bias, and the dtypes that routing depends on."""

from __future__ import annotations

import attrs
import pytest
import torch

import typed_moe
from tests.acceptance import checks
from tests.acceptance.cases import CASES, WITH_BIAS, Case, find
from tests.acceptance.routes import Route, direct, layer_of, routes
from typed_moe import BiasedSigmoid, DeepSeekV3, InKernel, KernelRules, MiniMax2, RoutingShape
from typed_moe.kernels.reference import REFERENCE_RULES
from typed_moe.routing import MethodRules, Refused, Tier

BIASED_ROUTES = [
    pytest.param(case, route, id=name) for name, case, route in routes(tuple(WITH_BIAS))
]
biased = pytest.mark.parametrize(("case", "route"), BIASED_ROUTES)
by_bias = pytest.mark.parametrize("case", WITH_BIAS, ids=lambda case: case.id)


@biased
def test_acceptance_13_all_biases_negative(case: Case, route: Route) -> None:
    """vllm#13474, flashinfer#2168, #4639: a mask of 0 beats negative biased scores."""
    checks.check_13_negative_bias(case, route)


@biased
def test_acceptance_14_narrow_band_bias(case: Case, route: Route) -> None:
    """sglang#37133, #31213: 238 distinct biases became 8 in bfloat16."""
    checks.check_14_narrow_bias(case, route)


def _bf16_only(name: str) -> KernelRules:
    tiers = (Tier(max_experts=512, max_top_k=32),)
    return KernelRules(
        kernel="narrow",
        methods={
            name: MethodRules(
                tiers=tiers, logits_dtypes=(torch.float32,), bias_dtypes=(torch.bfloat16,)
            )
        },
        weight_on_input=False,
        source="this test",
    )


@pytest.mark.parametrize("strategy", [DeepSeekV3(), MiniMax2()], ids=lambda s: str(s.name))
def test_acceptance_14_a_kernel_that_rounds_the_bias_is_refused(
    strategy: DeepSeekV3 | MiniMax2,
) -> None:
    """flashinfer#2909, vllm#38989: the cast needs the strategy's leave."""
    shape = RoutingShape(num_experts=256, top_k=8)
    refused = strategy.in_kernel(shape, _bf16_only(strategy.name))
    assert isinstance(refused, Refused)
    assert "bfloat16" in refused.reason
    assert "correction_bias_dtype" in refused.reason
    allowed = attrs.evolve(strategy, correction_bias_dtype=torch.bfloat16)
    told = allowed.in_kernel(shape, _bf16_only(strategy.name))
    assert isinstance(told, InKernel)
    assert told.bias_dtype is torch.bfloat16


@biased
def test_acceptance_15_large_bias_on_tiny_sigmoids(case: Case, route: Route) -> None:
    """flashinfer#3875: weights recovered as (biased - bias) were 0 for GLM-5.2."""
    checks.check_15_large_bias(case, route)


@pytest.mark.parametrize(
    ("case", "route"),
    [
        pytest.param(case, route, id=name)
        for name, case, route in routes((*WITH_BIAS, find("SigmoidRenorm")))
    ],
)
def test_acceptance_16_all_chosen_scores_underflow(case: Case, route: Route) -> None:
    """flashinfer#3803, #3946: 0 / 0 in one of two branches."""
    checks.check_16_underflow(case, route)


@biased
def test_acceptance_17_bias_selects_but_does_not_weigh(case: Case, route: Route) -> None:
    """The bias leaked into the weights."""
    checks.check_17_bias_selects_only(case, route)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_18_wrong_biases_raise(case: Case) -> None:
    """vllm#38989, sglang#10426: a bias that is missing, unwanted or of another shape raises."""
    logits = torch.randn(3, case.num_experts)
    right, wrong = torch.zeros(case.num_experts), torch.zeros(case.num_experts + 1)
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        direct(case, logits, wrong)
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        direct(case, logits, None if case.biased else right)
    if case.biased:
        with pytest.raises(ValueError, match=r"on meta.*move one"):
            direct(case, logits, right.to("meta"))


@biased
def test_acceptance_18_bias_of_either_dtype_works(case: Case, route: Route) -> None:
    """sglang#10426, vllm#25711: a bf16 bias gives what its float32 copy gives."""
    bias = (torch.rand(case.num_experts) - 0.5).bfloat16()
    logits = torch.randn(8, case.num_experts)
    wide, narrow = route(case, logits, bias.float()), route(case, logits, bias)
    assert torch.equal(wide.dense, narrow.dense)


@by_bias
def test_acceptance_19_a_bias_that_was_never_loaded(case: Case) -> None:
    """sglang#10440: the bias handed over was an uninitialised torch.empty."""
    layer = layer_of(case.strategy, case.num_experts, case.top_k)
    layer.prefix = "model.layers.3.mlp.experts"
    logits = torch.randn(2, case.num_experts)
    hidden = torch.zeros(2, case.num_experts)
    message = r"model\.layers\.3\.mlp\.experts.*e_score_correction_bias"
    with pytest.raises(ValueError, match=message):
        layer.validate_weights()
    with pytest.raises(ValueError, match=message):
        layer(hidden, logits)
    bias = torch.zeros(case.num_experts)
    bias[5] = torch.nan
    layer.load_weights([("e_score_correction_bias", bias)])
    with pytest.raises(ValueError, match=message):
        layer(hidden, logits)
    layer.load_weights([("e_score_correction_bias", torch.zeros(case.num_experts))])
    assert layer(hidden, logits).isfinite().all()


@by_bias
def test_acceptance_19_a_nan_bias_put_into_a_running_layer(case: Case) -> None:
    """sglang#10440: the look at the bias is not a matter of the first call alone."""
    layer = layer_of(case.strategy, case.num_experts, case.top_k)
    layer.load_weights([("e_score_correction_bias", torch.zeros(case.num_experts))])
    layer(torch.zeros(2, case.num_experts), torch.randn(2, case.num_experts))
    state = layer.state_dict()
    state["e_score_correction_bias"] = torch.full((case.num_experts,), torch.nan)
    layer.load_state_dict(state)
    with pytest.raises(ValueError, match="e_score_correction_bias"):
        layer(torch.zeros(2, case.num_experts), torch.randn(2, case.num_experts))


@pytest.mark.parametrize("strategy", [DeepSeekV3(), BiasedSigmoid()], ids=lambda s: str(s.name))
def test_acceptance_61_rounded_logits_need_leave(strategy: DeepSeekV3 | BiasedSigmoid) -> None:
    """sglang#38695, #35055: logits rounded to bf16 at a model's border cost 12.6 points."""
    logits, bias = torch.randn(4, 64).bfloat16(), torch.zeros(64)
    shape = RoutingShape(num_experts=64, top_k=4)
    with pytest.raises(TypeError, match=r"torch\.float32.*torch\.bfloat16"):
        strategy.select_experts(logits, bias, shape=shape)
    for form in (None, *typed_moe.RoutingForm):
        if form is typed_moe.RoutingForm.IN_KERNEL and strategy.name == "BiasedSigmoid":
            continue
        layer = layer_of(strategy, 64, 4, form)
        layer.load_weights([("e_score_correction_bias", bias)])
        with pytest.raises(TypeError, match=r"torch\.float32.*torch\.bfloat16"):
            layer(torch.zeros(4, 64), logits)
    allowed = attrs.evolve(strategy, router_logits_dtype=torch.bfloat16)
    assert allowed.select_experts(logits, bias, shape=shape).topk_ids.shape == (4, 4)
    assert "router_logits_dtype=torch.bfloat16" in repr(allowed)
    assert "torch.bfloat16 or better" in str(layer_of(allowed, 64, 4).plan)


def test_acceptance_61_the_reference_kernel_rounds_no_bias() -> None:
    """sglang#37133: float32 biases reach the reference kernel as they are stored."""
    told = DeepSeekV3().in_kernel(RoutingShape(num_experts=256, top_k=8), REFERENCE_RULES)
    assert isinstance(told, InKernel)
    assert told.bias_dtype is None
