"""Acceptance tests 20, 22 and 23 of routing-bugs.md: whole MoE blocks against transformers'."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor, nn

from tests.hf._cases import CASES, Case
from tests.hf._families import COHERE2_MOE, DEEPSEEK_V3, DEEPSEEK_V4, Settings
from tests.hf._models import Model, config_of, model_of
from tests.hf._swap import SwappedMoe, block_output, swapped
from tests.models.hf import hf_config
from typed_moe import (
    FusedMoE,
    RoutingForm,
    RoutingShape,
    UnsupportedRouting,
    moe_spec,
    strategy_for,
)

CASE = {case.name: case for case in CASES}
TOKENS, HIDDEN = 64, 32


def _with(name: str, settings: Settings) -> Case:
    """A case with other settings; its `routing` and `drops` are then not to be used."""
    case = CASE[name]
    return attrs.evolve(case, settings={**case.settings, **settings})


def _first(model: Model) -> nn.Module:
    return model.module.get_submodule(model.path(model.layers[0]))


def _ours(model: Model, form: RoutingForm | None = None) -> SwappedMoe:
    """Our block in place of the model's first."""
    with swapped(model, form=form) as blocks:
        return blocks[0]


# --- 20 -------------------------------------------------------------------------------------------

BOTH_WAYS = (
    ("olmoe", "softmax"),
    ("qwen2_moe", "softmax"),
    ("qwen3_moe", "softmax"),
    ("qwen3_next", "softmax"),
    ("mistral4", "softmax"),
    ("deepseek_v3", "sigmoid"),
    ("deepseek_v3-groups", "sigmoid"),
    ("glm4_moe", "sigmoid"),
    ("nemotron_h", "sigmoid"),
    ("cohere2_moe-sigmoid", "sigmoid"),
)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no_norm"])
@pytest.mark.parametrize(("name", "scores"), BOTH_WAYS)
def test_acceptance_20_norm_topk_prob_is_honoured(name: str, scores: str, norm: bool) -> None:
    """True: the weights sum to the scale. False: they are the raw scores, never raw logits."""
    model = model_of(_with(name, {"norm_topk_prob": norm}))
    ours, x = _ours(model), torch.randn(TOKENS, HIDDEN)
    assert (ours.combined(x) - block_output(_first(model), model.case.family, x)).abs().max() < 1e-5

    spec, logits = ours.spec, ours.router_logits(x)
    shape = RoutingShape(num_experts=spec.num_experts, top_k=spec.top_k)
    routed = spec.routing.select_experts(logits, ours.experts.e_score_correction_bias, shape=shape)
    scale = getattr(spec.routing, "routed_scaling_factor", 1.0)
    total = routed.topk_weights.sum(dim=1)
    if norm:
        assert (total - scale).abs().max() < 1e-5
        return
    raw = logits.softmax(dim=1) if scores == "softmax" else logits.sigmoid()
    raw = scale * raw.gather(1, routed.topk_ids.long())
    torch.testing.assert_close(routed.topk_weights, raw, atol=1e-6, rtol=0.0)
    assert (total - scale).abs().min() > 1e-4


def test_acceptance_20_sqrt_softplus_is_always_renormalised() -> None:
    """transformers ignores the field on DeepSeek-V4, so a config that says False is refused."""
    model = model_of(CASE["deepseek_v4"])
    ours, x = _ours(model), torch.randn(TOKENS, HIDDEN)
    assert (ours.combined(x) - block_output(_first(model), model.case.family, x)).abs().max() < 1e-5
    with pytest.raises(UnsupportedRouting, match="norm_topk_prob is False"):
        strategy_for(config_of(DEEPSEEK_V4, {"norm_topk_prob": False}), 1)


def test_acceptance_20_a_softmax_with_a_bias_does_not_become_a_sigmoid() -> None:
    """Ernie 4.5 adds a bias to a softmax, which no strategy here does; V3 never takes a softmax."""
    with pytest.raises(UnsupportedRouting, match="ernie4_5_moe"):
        strategy_for(hf_config("ernie4_5_moe"), 1)
    with pytest.raises(UnsupportedRouting, match="scoring_func is 'softmax'"):
        strategy_for({**config_of(DEEPSEEK_V3, {}).to_dict(), "scoring_func": "softmax"})
    with pytest.raises(UnsupportedRouting, match="expert_selection_fn is 'tanh'"):
        strategy_for({**config_of(COHERE2_MOE, {}).to_dict(), "expert_selection_fn": "tanh"})


# --- 22 -------------------------------------------------------------------------------------------

SCALED = (
    "deepseek_v2-F11",
    "deepseek_v2-F12",
    "deepseek_v3-groups",
    "deepseek_v3-F10",
    "kimi_k2",
    "glm4_moe",
    "glm4_moe-F10",
    "mistral4-F11",
    "mistral4-F13",
    "nemotron_h",
    "step3p7",
    "deepseek_v4",
)
CAN_DO_WITHOUT = SCALED[:9]
"""Models that transformers builds with n_shared_experts = 0."""


def _scale(case: Case, scale: float) -> Settings:
    name = "moe_router_scaling_factor" if case.name == "step3p7" else "routed_scaling_factor"
    return {name: scale}


def _ratio(got: Tensor, expected: Tensor) -> float:
    """The factor that takes `expected` nearest to `got`."""
    return float((got * expected).sum() / expected.square().sum())


@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=["planned", "precomputed"])
@pytest.mark.parametrize(
    ("name", "shared"),
    [(name, True) for name in SCALED] + [(name, False) for name in CAN_DO_WITHOUT],
    ids=lambda value: value if isinstance(value, str) else ("shared" if value else "no_shared"),
)
def test_acceptance_22_whole_block_with_scale(
    name: str, shared: bool, form: RoutingForm | None
) -> None:
    """The ratio to transformers' output is 1, not 2.5 or 0.4; so it is for the routed part."""
    settings = {**_scale(CASE[name], 2.5), **({} if shared else {"n_shared_experts": 0})}
    model = model_of(_with(name, settings))
    block, ours = _first(model), _ours(model, form)
    assert (ours.spec.num_shared_experts > 0) == shared
    x = torch.randn(TOKENS, HIDDEN)
    expected = block_output(block, model.case.family, x)
    got = ours.combined(x)
    assert _ratio(got, expected) == pytest.approx(1.0, abs=1e-3)
    assert (got - expected).abs().max() <= 1e-5
    shared_output = ours.shared(x) if shared else torch.zeros_like(expected)
    assert _ratio(ours.routed(x), expected - shared_output) == pytest.approx(1.0, abs=1e-3)


def _with_fused_shared(block: nn.Module, model: Model, form: RoutingForm | None) -> FusedMoE:
    """The block's experts with its two shared ones fused behind them, each scaled by 1."""
    family = model.case.family
    spec = moe_spec(model.config, model.layers[0])
    count, shared = spec.num_shared_experts, block.get_submodule(family.shared or "")
    parts = {
        name: shared.get_parameter(f"{name}.weight").chunk(count, dim=int(name == "down_proj"))
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    tensors = block.get_submodule("experts").state_dict()
    pairs = zip(parts["gate_proj"], parts["up_proj"], strict=True)
    first = torch.stack([torch.cat(pair) for pair in pairs])
    experts = FusedMoE(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        routing=spec.routing,
        activation=spec.activation,
        num_fused_shared_experts=count,
        routing_form=form,
    )
    weights = [
        ("gate_up_proj", torch.cat([tensors["gate_up_proj"], first])),
        ("down_proj", torch.cat([tensors["down_proj"], torch.stack(parts["down_proj"])])),
    ]
    experts.load_weights(weights, layout=family.layout)
    if experts.e_score_correction_bias is not None:
        bias = block.get_submodule(family.gate).get_buffer("e_score_correction_bias")
        experts.load_weights([("e_score_correction_bias", bias)])
    return experts


@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=["planned", "precomputed"])
@pytest.mark.parametrize("name", CAN_DO_WITHOUT)
def test_acceptance_22_whole_block_with_fused_shared_experts(
    name: str, form: RoutingForm | None
) -> None:
    """Shared experts run as experts E and E + 1 are not scaled either."""
    model = model_of(_with(name, {**_scale(CASE[name], 2.5), "n_shared_experts": 2}))
    block, x = _first(model), torch.randn(TOKENS, HIDDEN)
    experts = _with_fused_shared(block, model, form)
    got = experts(x, _ours(model).router_logits(x))
    expected = block_output(block, model.case.family, x)
    assert _ratio(got, expected) == pytest.approx(1.0, abs=1e-3)
    assert (got - expected).abs().max() <= 1e-5


# --- 23 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=["planned", "precomputed"])
@pytest.mark.parametrize("name", SCALED)
def test_acceptance_23_twice_the_scale_is_twice_the_routed_output(
    name: str, form: RoutingForm | None
) -> None:
    """Twice the routed part, the same shared part, and transformers agrees with both.

    Exactly twice, but where the scale changes who routes: a softmax with a scale has no kernel.
    """
    x, routed, shared, forms = torch.randn(TOKENS, HIDDEN), [], [], set()
    block = _first(model_of(_with(name, _scale(CASE[name], 1.0))))
    for scale in (1.0, 2.0):
        model = model_of(_with(name, _scale(CASE[name], scale)))
        _first(model).load_state_dict(block.state_dict())
        ours = _ours(model, form)
        expected = block_output(_first(model), model.case.family, x)
        assert (ours.combined(x) - expected).abs().max() <= 1e-5
        routed.append(ours.routed(x))
        shared.append(ours.shared(x))
        forms.add(ours.experts.plan.form)
    assert routed[0].abs().max() > 0.1
    limit = 0.0 if len(forms) == 1 else 2e-6
    assert (routed[1] - 2.0 * routed[0]).abs().max() <= limit
    assert torch.equal(shared[1], shared[0])
