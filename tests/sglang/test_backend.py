"""`--moe-runner-backend typed_moe` and `FusedMoE(..., routing=...)`: SGLang's layer on our runners."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests import oracle
from tests.oracle import RULES, Act, Rule
from tests.sglang import host
from typed_moe import (
    DeepSeekV3,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    RoutingStrategy,
    UnsupportedRouting,
)
from typed_moe.routing import ScaleOwner
from typed_moe.sglang import Plugin, plans_of

pytestmark = pytest.mark.sglang

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 6, 256, 128, 8, 2
SOFTMAX = RULES["RenormalizeNaive"]
DEEPSEEK = DeepSeekV3(num_expert_group=2, topk_group=1, routed_scaling_factor=2.5)
DEEPSEEK_RULE = dataclasses.replace(
    RULES["DeepSeekV3"], num_expert_group=2, topk_group=1, scale=2.5
)
DEEPSEEK_TOPK = {
    "use_grouped_topk": True,
    "num_expert_group": 2,
    "topk_group": 1,
    "scoring_func": "sigmoid",
    "routed_scaling_factor": 2.5,
    "apply_routed_scaling_factor_on_output": True,
}


@pytest.fixture
def auto(typed_moe: Plugin) -> Plugin:
    """The plugin, and SGLang's own choice of backend."""
    host.publish()
    return typed_moe


class Ends(RoutingStrategy):
    """A rule of nobody's: the first and the last expert, half each."""

    @property
    @override
    def name(self) -> str:
        return "Ends"

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        del e_score_correction_bias
        ids = torch.tensor([[0, shape.num_experts - 1]]).repeat(router_logits.shape[0], 1)
        return Routed(topk_ids=ids.int(), topk_weights=torch.full(ids.shape, 0.5))


Sglang = Any  # type: ignore[explicit-any]  # SGLang's objects are not typed here


def make_layer(**arguments: object) -> Sglang:
    """SGLang's layer, float32; filled, unless it is quantised."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    settings: dict[str, object] = {
        "num_experts": EXPERTS,
        "hidden_size": HIDDEN,
        "intermediate_size": WIDTH,
        "layer_id": 0,
        "top_k": TOP_K,
        "params_dtype": torch.float32,
        "prefix": "model.layers.0.mlp.experts",
    }
    layer = FusedMoE(**{**settings, **arguments})
    if "quant_config" not in arguments:
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.05)
    return layer


def make_topk(layer: Sglang, method: str | None = "RenormalizeNaive", **settings: object) -> Sglang:
    """SGLang's TopK, bound to the layer as its models do it."""
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.moe.utils import RoutingMethodType

    topk = TopK(TOP_K, layer_id=0, **settings)
    topk.bind_runner_backend(
        layer.runner_backend,
        routing_method_type=None if method is None else RoutingMethodType[method],
    )
    return topk


def run(layer: Sglang, x: Tensor, routed: object) -> Tensor:
    """Load the weights as SGLang does when they are there, and call."""
    layer.quant_method.process_weights_after_loading(layer)
    with torch.no_grad():
        output: Tensor = layer(x, routed)
    return output


def stack_of(layer: Sglang) -> oracle.Experts:
    w13 = layer.w13_weight.data
    return oracle.Experts(gate=w13[:, :WIDTH], up=w13[:, WIDTH:], down=layer.w2_weight.data)


def draw() -> tuple[Tensor, Tensor]:
    torch.manual_seed(11)
    return torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)


def expected(layer: Sglang, rule: Rule, x: Tensor, logits: Tensor, bias: Tensor | None) -> Tensor:
    return oracle.layer(rule, stack_of(layer), x, logits, bias, top_k=TOP_K, act=Act())


def equal(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)


# --- the backend's name ---


def test_the_backend_is_on_sglangs_command_line(typed_moe: Plugin) -> None:
    from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES

    assert "typed_moe" in MOE_RUNNER_BACKEND_CHOICES
    assert plans_of(make_layer())[:1] == ()
    assert type(make_layer().quant_method).__name__ == "TypedMoeMethod"


def test_another_backend_is_left_alone(auto: Plugin) -> None:
    layer = make_layer()
    assert type(layer.quant_method).__name__ == "UnquantizedFusedMoEMethod"
    assert plans_of(layer) == ()


def test_no_tokens(typed_moe: Plugin) -> None:
    layer = make_layer()
    topk = make_topk(layer)
    x = torch.empty(0, HIDDEN)
    assert run(layer, x, topk(x, torch.empty(0, EXPERTS))).shape == (0, HIDDEN)
    assert run(layer, x, topk.empty_topk_output(x.device)).shape == (0, HIDDEN)


def test_a_call_before_the_weights_is_an_error(typed_moe: Plugin) -> None:
    layer, (x, logits) = make_layer(), draw()
    topk = make_topk(layer)
    with pytest.raises(RuntimeError, match="before SGLang loaded its weights"):
        layer(x, topk(x, logits))


def test_a_topk_that_was_bound_to_another_layer(typed_moe: Plugin) -> None:
    layer, (x, logits) = make_layer(), draw()
    make_topk(layer)
    other = make_layer()
    topk = make_topk(other)
    with pytest.raises(ValueError, match="by a TopK that was not bound to it; 1 that leave"):
        run(layer, x, topk(x, logits))


def test_a_config_that_a_piecewise_graph_made_anew(typed_moe: Plugin) -> None:
    """SGLang rebuilds a TopKConfig from a few fields there; the layer has kept the strategy."""
    from sglang.srt.layers.moe.topk import BypassedTopKOutput, TopKConfig

    bias = torch.randn(EXPERTS)
    layer, (x, logits) = make_layer(routed_scaling_factor=2.5), draw()
    make_topk(layer, "DeepSeekV3", correction_bias=bias, **DEEPSEEK_TOPK)
    few = TopKConfig(top_k=TOP_K, topk_group=1, num_expert_group=2, correction_bias=bias)
    found = run(layer, x, BypassedTopKOutput(x, logits, few))
    equal(found, expected(layer, DEEPSEEK_RULE, x, logits, bias))


# --- who routes ---


@pytest.mark.parametrize(
    ("method", "settings", "routes"),
    [
        ("RenormalizeNaive", {}, "RenormalizeNaive"),
        ("Renormalize", {}, "Renormalize"),
        ("Renormalize", {"renormalize": False}, "RoutedBySglang"),
        ("DeepSeekV3", {}, "RoutedBySglang"),
        (None, {}, "RoutedBySglang"),
    ],
)
def test_logits_come_where_number_and_topk_agree(
    method: str | None, settings: dict[str, object], routes: str, typed_moe: Plugin
) -> None:
    """Elsewhere SGLang's TopK routes, as it does before a kernel of FlashInfer's."""
    layer, (x, logits) = make_layer(), draw()
    topk = make_topk(layer, method, **settings)
    rule = RULES["Default"] if settings else SOFTMAX
    equal(run(layer, x, topk(x, logits)), expected(layer, rule, x, logits, None))
    (plan,) = plans_of(layer)
    assert plan.strategy.name == routes


@pytest.mark.parametrize(
    ("bag", "setting", "value"),
    [
        ("moe", "enable_eplb", True),
        ("moe", "ep_num_redundant_experts", 2),
        ("moe", "init_expert_location", "elsewhere.json"),
        ("moe", "expert_distribution_recorder_mode", "stat"),
        ("features", "enable_return_routed_experts", True),
    ],
)
def test_a_server_that_wants_the_ids_has_its_topk_route(
    bag: str, setting: str, value: object, typed_moe: Plugin
) -> None:
    from sglang.srt.runtime_context import get_exec

    layer = make_layer()
    with getattr(get_exec(), bag).override(**{setting: value}):
        make_topk(layer)
    (plan,) = plans_of(layer)
    assert plan.strategy.name == "RoutedBySglang"
    assert f"--{setting.replace('_', '-')}" in repr(plan.strategy)


def test_redundant_experts(typed_moe: Plugin) -> None:
    """Two experts are there twice: SGLang's TopK routes to where they are, and our layer follows."""
    from sglang.srt.eplb.expert_location_dispatch import ExpertLocationDispatchInfo
    from sglang.srt.runtime_context import get_exec

    # Experts 0 and 5 are at home in slots 9 and 8 on this rank; in 0 and 5 are others' copies.
    places = torch.tensor([9, 1, 2, 3, 4, 8, 6, 7], dtype=torch.int32)
    info = ExpertLocationDispatchInfo(
        ep_dispatch_algorithm="static",
        partial_logical_to_rank_dispatch_physical_map=places,
        partial_logical_to_all_physical_map=places.unsqueeze(1),
        partial_logical_to_all_physical_map_num_valid=torch.ones(EXPERTS, dtype=torch.int32),
        num_physical_experts=EXPERTS + 2,
    )
    layer, (x, logits) = make_layer(num_experts=EXPERTS + 2), draw()
    with get_exec().moe.override(ep_num_redundant_experts=2):
        topk = make_topk(layer)
    routed = topk(x, logits, expert_location_dispatch_info=info)
    routing = oracle.route(SOFTMAX, logits, None, TOP_K)
    assert {0, 5} & set(routing.ids.flatten().tolist())
    wanted = oracle.moe(stack_of(layer), x, places[routing.ids], routing.weights, Act())
    equal(run(layer, x, routed), wanted)
    (plan,) = plans_of(layer)
    assert "--ep-num-redundant-experts" in repr(plan.strategy)


def test_no_topk_is_bound(typed_moe: Plugin) -> None:
    """As hash routing and some models do: ids and weights are given, and the plan says so."""
    layer, (x, logits) = make_layer(), draw()
    routing = oracle.route(SOFTMAX, logits, None, TOP_K)
    equal(
        run(layer, x, _standard(routing.ids, routing.weights)),
        expected(layer, SOFTMAX, x, logits, None),
    )
    (plan,) = plans_of(layer)
    assert "the model binds no TopK to the layer" in repr(plan.strategy)


def test_acceptance_49_fused_shared_experts(typed_moe: Plugin) -> None:
    """Behind the routed ones, in slots that the TopK fills."""
    layer, (x, logits) = make_layer(num_experts=9, num_fused_shared_experts=1, top_k=3), draw()
    routing = oracle.with_shared(oracle.route(SOFTMAX, logits, None, TOP_K), EXPERTS, 1)
    found = run(layer, x, _standard(routing.ids, routing.weights))
    equal(found, oracle.moe(stack_of(layer), x, routing.ids, routing.weights, Act()))


def _standard(ids: Tensor, weights: Tensor) -> object:
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    output: object = StandardTopKOutput(weights.float(), ids.int(), torch.empty(0))
    return output


# --- routing= ---


def test_a_strategy_of_a_users_own(auto: Plugin) -> None:
    """With any backend; the layer takes the logits."""
    layer, (x, logits) = make_layer(routing=Ends()), draw()
    ids = torch.tensor([[0, EXPERTS - 1]]).repeat(TOKENS, 1)
    wanted = oracle.moe(stack_of(layer), x, ids, torch.full(ids.shape, 0.5), Act())
    equal(run(layer, x, logits), wanted)
    assert plans_of(layer)[0].strategy.name == "Ends"


def test_a_bias_beside_routing(auto: Plugin) -> None:
    bias = torch.randn(EXPERTS)
    layer, (x, logits) = make_layer(routing=DEEPSEEK, e_score_correction_bias=bias), draw()
    equal(run(layer, x, logits), expected(layer, DEEPSEEK_RULE, x, logits, bias))


def test_routing_beside_a_topk_that_says_the_same(auto: Plugin) -> None:
    bias = torch.randn(EXPERTS)
    layer, (x, logits) = make_layer(routing=DEEPSEEK), draw()
    topk = make_topk(layer, None, correction_bias=bias, **DEEPSEEK_TOPK)
    equal(run(layer, x, topk(x, logits)), expected(layer, DEEPSEEK_RULE, x, logits, bias))


@pytest.mark.parametrize(
    ("routing", "settings", "computes"),
    [
        (RenormalizeNaive(), {"renormalize": False}, r"Default\(\)"),
        (Renormalize(), DEEPSEEK_TOPK, "no strategy|grouped|Grouped|sigmoid"),
        (Ends(), {}, r"RenormalizeNaive\(\)"),
    ],
)
def test_routing_beside_a_topk_that_says_otherwise(
    routing: RoutingStrategy, settings: dict[str, object], computes: str, auto: Plugin
) -> None:
    layer = make_layer(routing=routing)
    with pytest.raises(
        ValueError, match=rf"routing=.*together with a TopK that computes.*({computes})"
    ):
        make_topk(layer, None, **settings)


def test_another_factor_in_the_topk(auto: Plugin) -> None:
    layer = make_layer(routing=DEEPSEEK)
    settings = {**DEEPSEEK_TOPK, "routed_scaling_factor": 2.0}
    with pytest.raises(ValueError, match=r"routed_scaling_factor=2\.5.*routed_scaling_factor=2\.0"):
        make_topk(layer, None, correction_bias=torch.zeros(EXPERTS), **settings)


def test_a_number_is_no_strategy(auto: Plugin) -> None:
    with pytest.raises(TypeError, match="routing is 2; allowed: a RoutingStrategy object"):
        make_layer(routing=2)


def test_ids_for_a_layer_with_routing(auto: Plugin) -> None:
    layer, (x, logits) = make_layer(routing=RenormalizeNaive()), draw()
    routing = oracle.route(SOFTMAX, logits, None, TOP_K)
    with pytest.raises(ValueError, match="is given ids and weights by a TopK that was to leave"):
        run(layer, x, _standard(routing.ids, routing.weights))


def test_logits_for_a_layer_without_routing(typed_moe: Plugin) -> None:
    layer, (x, logits) = make_layer(), draw()
    with pytest.raises(ValueError, match="was given router logits; allowed: a TopK's output"):
        run(layer, x, logits)


# --- the factor ---


@pytest.mark.parametrize("in_topk", [False, True], ids=["by our layer", "in the weights"])
def test_a_factor_without_a_block_around(in_topk: bool, typed_moe: Plugin) -> None:
    """SGLang's own runners multiply where the TopK does not; so does the layer."""
    layer, (x, logits) = make_layer(routed_scaling_factor=2.5), draw()
    assert layer.should_fuse_routed_scaling_factor_in_topk
    topk = make_topk(
        layer,
        routed_scaling_factor=2.5,
        apply_routed_scaling_factor_on_output=in_topk,
    )
    rule = dataclasses.replace(SOFTMAX, scale=2.5)
    equal(run(layer, x, topk(x, logits)), expected(layer, rule, x, logits, None))
    (owned,) = layer.quant_method.experts.owners
    assert owned.scale.owner is (ScaleOwner.STRATEGY if in_topk else ScaleOwner.KERNEL)


def test_a_factor_and_no_topk_is_an_error_at_loading(typed_moe: Plugin) -> None:
    layer = make_layer(routed_scaling_factor=2.5)
    with pytest.raises(UnsupportedRouting, match=r"routed_scaling_factor is 2\.5.*binds no TopK"):
        layer.quant_method.process_weights_after_loading(layer)


def test_two_factors_are_an_error(typed_moe: Plugin) -> None:
    layer = make_layer(routed_scaling_factor=2.0)
    with pytest.raises(
        UnsupportedRouting, match=r"multiplies by 2\.5.*routed_scaling_factor is 2\.0"
    ):
        make_topk(layer, "DeepSeekV3", correction_bias=torch.zeros(EXPERTS), **DEEPSEEK_TOPK)


# --- refused at construction ---


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"no_combine": True}, "no_combine"),
        ({"activation": "situ"}, "activation 'situ' with a gate"),
        (
            {"apply_router_weight_on_input": True, "routing": Renormalize()},
            "output, and the layer says",
        ),
        ({"e_score_correction_bias": torch.zeros(8)}, "without routing="),
        (
            {"e_score_correction_bias": torch.zeros(8), "routing": Renormalize()},
            "reads no e_score_correction_bias and was given one",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_layer_that_is_not_served(
    arguments: dict[str, object], said: str, typed_moe: Plugin
) -> None:
    with pytest.raises(ValueError, match=said):
        make_layer(**arguments)


def test_a_server_with_lora_is_not_served(typed_moe: Plugin) -> None:
    from sglang.srt.runtime_context import get_lora

    with (
        get_lora().override(enable_lora=True),
        pytest.raises(UnsupportedRouting, match="do not serve --enable-lora"),
    ):
        make_layer()


@pytest.mark.parametrize(
    ("setting", "value", "said"),
    [
        ("ep_join_mode", "recover", "--ep-join-mode recover"),
        ("enable_paged_experts", True, "--enable-paged-experts"),
    ],
)
def test_a_server_that_is_not_served(
    setting: str, value: object, said: str, typed_moe: Plugin
) -> None:
    from sglang.srt.runtime_context import get_exec

    with (
        get_exec().moe.override(**{setting: value}),
        # SGLang's own wrapper for those experts is not made here.
        mock.patch("sglang.srt.layers.moe.paged_experts.make_for_layer", _as_it_is),
        pytest.raises(UnsupportedRouting, match=f"do not serve {said}"),
    ):
        make_layer()


def _as_it_is(*, layer: object, base_method: object) -> object:
    del layer
    return base_method


def test_an_all_to_all_is_not_served(typed_moe: Plugin) -> None:
    import sglang.srt.layers.moe.utils as utils
    from sglang.srt.layers.moe.utils import MoeA2ABackend

    with (
        mock.patch.object(utils, "get_moe_a2a_backend", return_value=MoeA2ABackend.DEEPEP),
        pytest.raises(UnsupportedRouting, match="--moe-a2a-backend deepep"),
    ):
        make_layer()


@pytest.mark.parametrize("routing", [None, Renormalize()], ids=["backend", "routing="])
def test_deepeps_layer_is_not_served(routing: RoutingStrategy | None, typed_moe: Plugin) -> None:
    """It runs its experts itself, on what DeepEP has dispatched: refused when it is made."""
    from sglang.srt.layers.moe.ep_moe.layer import DeepEPMoE

    arguments: dict[str, object] = {} if routing is None else {"routing": routing}
    with pytest.raises(UnsupportedRouting, match=r"DeepEPMoE runs its experts itself.*FusedMoE"):
        DeepEPMoE(
            num_experts=EXPERTS,
            top_k=TOP_K,
            hidden_size=HIDDEN,
            intermediate_size=WIDTH,
            layer_id=0,
            **arguments,
        )


# --- one of several ranks ---


@pytest.fixture
def rank_1_of_2(typed_moe: Plugin) -> Iterator[None]:
    """This process as the second of two expert-parallel ranks, as SGLang counts them."""
    import sglang.srt.layers.moe.token_dispatcher.standard as standard
    from sglang.srt.runtime_context import get_parallel

    ranks = dict.fromkeys(("tp_size", "attn_tp_size", "moe_ep_size"), 2)
    ranks |= dict.fromkeys(("tp_rank", "attn_tp_rank", "moe_ep_rank"), 1)
    groups = dict.fromkeys(("tp_group", "attn_tp_group", "moe_ep_group"))
    with (
        get_parallel().override(**ranks, moe_tp_size=1, moe_tp_rank=0, **groups),
        mock.patch.object(standard, "get_device", return_value="cpu", create=True),
    ):
        yield


@pytest.mark.parametrize("method", ["RenormalizeNaive", None], ids=["from logits", "from ids"])
def test_an_expert_parallel_rank(method: str | None, rank_1_of_2: None) -> None:
    """Its half of the experts' part of every token; ids stay global."""
    layer, (x, logits) = make_layer(), draw()
    found = run(layer, x, make_topk(layer, method)(x, logits))
    half, experts = EXPERTS // 2, stack_of(layer)
    assert experts.gate is not None
    assert experts.count == half
    gate, up, down = (
        torch.cat((torch.zeros_like(part), part))
        for part in (experts.gate, experts.up, experts.down)
    )
    routing = oracle.route(SOFTMAX, logits, None, TOP_K)
    whole = oracle.Experts(gate=gate, up=up, down=down)
    mine = range(half, EXPERTS)
    assert (routing.ids >= half).any()
    assert (routing.ids < half).any()
    equal(found, oracle.moe(whole, x, routing.ids, routing.weights, Act(), local=mine))
