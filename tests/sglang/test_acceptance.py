"""Acceptance tests at SGLang's seam: its own TopK, layer and dispatcher on the other side, on a CPU.

43 is a CUDA graph's, with equal bits (tests/gpu): here it is a buffer with other garbage in the rows
that pad it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.oracle import RULES, Act
from tests.sglang.blocks import HIDDEN, SHARED, WIDTH, BlockCase
from tests.sglang.layers import SglangBlock
from tests.sglang.test_backend import (
    DEEPSEEK_RULE,
    DEEPSEEK_TOPK,
    EXPERTS,
    SOFTMAX,
    TOKENS,
    TOP_K,
    draw,
    equal,
    make_layer,
    make_topk,
    run,
    stack_of,
)
from tests.sglang.test_backend import HIDDEN as LAYER_HIDDEN
from tests.sglang.test_enforce import OnAnyDevice
from tests.sglang.test_observe import QWEN3
from typed_moe.models import load_config, strategy_for
from typed_moe.routing import RoutingShape, ScaleOwner
from typed_moe.sglang import Mode, Plugin, plans_of
from typed_moe.sglang._enforce import Enforcer
from typed_moe.sglang._function import PackedExperts
from typed_moe.sglang._method import TypedMoeMethod
from typed_moe.sglang._plugin import KERNEL_FUNCTIONS
from typed_moe.sglang._watch import watch

pytestmark = pytest.mark.sglang

Sglang = Any  # type: ignore[explicit-any]  # SGLang's objects are not typed here

# --- 36: a released config and SGLang's model class mean one rule ---

_CLASSES = {
    "qwen3-30b-a3b": ("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    "qwen2-57b-a14b": ("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    "qwen3-next-80b-a3b": ("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
    "deepseek-v2": ("deepseek_v2", "DeepseekV2MoE"),
    "deepseek-v2-lite": ("deepseek_v2", "DeepseekV2MoE"),
    "deepseek-v3": ("deepseek_v2", "DeepseekV2MoE"),
    "kimi-k2": ("deepseek_v2", "DeepseekV2MoE"),
    "glm-4.5": ("glm4_moe", "Glm4MoeSparseMoeBlock"),
    "glm-4.5-air": ("glm4_moe", "Glm4MoeSparseMoeBlock"),
    "gpt-oss-20b": ("gpt_oss", "GptOssSparseMoeBlock"),
    "gpt-oss-120b": ("gpt_oss", "GptOssSparseMoeBlock"),
    "llama4-scout": ("llama4", "Llama4MoE"),
}
"""The config of a release, and the class that SGLang serves it with."""

_NARROW = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": WIDTH,
    "intermediate_size_mlp": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "dtype": torch.float32,
}


def _published(name: str) -> dict[str, object]:
    config = load_config(name)
    text = config.get("text_config", config)
    assert isinstance(text, dict)
    # What configs leave to the classes' defaults, and are read all the same.
    defaults = {"hidden_act": SHARED["hidden_act"], "routed_scaling_factor": 1.0}
    return {**defaults, **text, **_NARROW}


@pytest.mark.parametrize("name", _CLASSES)
def test_acceptance_36_config_and_class_mean_one_rule(name: str, typed_moe: Plugin) -> None:
    """SGLang's block, built from the config with narrow experts, routes as the config's strategy."""
    module, block_name = _CLASSES[name]
    case = BlockCase(id=name, module=module, name=block_name, rule=SOFTMAX, config=_published(name))
    block: Sglang = case.build().block
    topk, experts = block.topk, block.experts
    config = topk.topk_config
    routed = config.top_k - config.num_shared_topk_slots
    torch.manual_seed(3)
    logits = torch.randn(64, experts.num_experts) * 2
    theirs = topk.forward_native(torch.empty(64, HIDDEN), logits)
    (owned,) = experts.quant_method.experts.owners
    # What the TopK has not multiplied by, the block or the layer does.
    outside = owned.scale.factor if owned.scale.owner is not ScaleOwner.STRATEGY else 1.0
    shape = RoutingShape(num_experts=experts.num_experts, top_k=routed)
    ours = strategy_for(load_config(name), _first(name)).select_experts(
        logits, config.correction_bias, shape=shape
    )
    torch.testing.assert_close(
        oracle.dense(theirs.topk_ids.long(), theirs.topk_weights * outside, shape.num_experts),
        oracle.dense(ours.topk_ids.long(), ours.topk_weights, shape.num_experts),
        rtol=1e-5,
        atol=1e-6,
    )


def _first(name: str) -> int:
    """A layer with experts, by the model cards."""
    return {"deepseek-v3": 3, "glm-4.5": 3}.get(name, 1)


# --- 38: a custom function is asked once, and its answer is what runs ---


class _Counting:
    """SGLang's form of a routing function: the last experts, with weights that add up to one."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(
        self, hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
    ) -> tuple[Tensor, Tensor]:
        self.calls += 1
        tokens, experts = gating_output.shape
        ids = torch.arange(experts - topk, experts).expand(tokens, topk).int()
        return torch.full((tokens, topk), 1.0 / topk), ids.clone()


@pytest.mark.parametrize("method", ["RenormalizeNaive", "DeepSeekV3", None])
def test_acceptance_38_a_custom_function_is_called_once(
    method: str | None, typed_moe: Plugin
) -> None:
    """Whatever the model's number says of it, nothing is routed in its place."""
    function = _Counting()
    layer, (x, logits) = make_layer(), draw()
    topk = make_topk(layer, method, custom_routing_function=function)
    ids = torch.arange(EXPERTS - TOP_K, EXPERTS).expand(TOKENS, TOP_K)
    wanted = oracle.moe(stack_of(layer), x, ids, torch.full(ids.shape, 1.0 / TOP_K), Act())
    for calls in (1, 2):
        equal(run(layer, x, topk(x, logits)), wanted)
        assert function.calls == calls
    (plan,) = plans_of(layer)
    assert plan.strategy.name == "RoutedBySglang"


@pytest.fixture
def enforced(trtllm: Plugin) -> Iterator[Plugin]:
    trtllm.enforcer, trtllm.mode = Enforcer(OnAnyDevice), Mode.ENFORCE
    yield trtllm
    trtllm.mode = Mode.OBSERVE


def test_acceptance_38_a_custom_function_that_is_left_to_the_kernel(enforced: Plugin) -> None:
    """`enforce`, and a TopK whose format leaves the routing to a kernel that has no such method."""
    from sglang.srt.layers.moe.topk import BypassedTopKOutput

    function = _Counting()
    made = SglangBlock(QWEN3, 70)
    config = dataclasses.replace(made.topk.topk_config, custom_routing_function=function)
    x, logits = torch.randn(TOKENS, 256).bfloat16(), torch.randn(TOKENS, QWEN3.num_experts)
    enforced._configs[70] = [config]
    with watch() as calls:
        made.experts(x, BypassedTopKOutput(x, logits, config))
    assert function.calls == 1
    (call,) = calls
    assert call.entry_point == "trtllm_fp8_block_scale_routed_moe"
    given = call.arguments["topk_ids"]
    assert isinstance(given, tuple)
    last = torch.arange(QWEN3.num_experts - QWEN3.top_k, QWEN3.num_experts)
    assert torch.equal(given[0].long(), last.expand(TOKENS, -1))


# --- 39: the ids that a server returns are those that ran ---


def test_acceptance_39_ids_that_a_server_returns(typed_moe: Plugin) -> None:
    """`--enable-return-routed-experts`: SGLang's capturer is given each token's experts, once."""
    from sglang.srt.layers.moe import topk as module
    from sglang.srt.runtime_context import get_exec

    layer, (x, logits) = make_layer(), draw()
    with get_exec().features.override(enable_return_routed_experts=True):
        topk = make_topk(layer)
    capturer = mock.Mock()
    with mock.patch.object(module, "get_global_experts_capturer", return_value=capturer):
        found = run(layer, x, topk(x, logits))
    capturer.capture.assert_called_once()
    ids = capturer.capture.call_args.kwargs["topk_indices"]
    routing = oracle.route(SOFTMAX, logits, None, TOP_K)
    assert torch.equal(ids.long(), routing.ids)
    equal(found, oracle.moe(stack_of(layer), x, ids.long(), routing.weights, Act()))


# --- 40: what we are called with is what SGLang calls with ---


def _names(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]  # a callable


def test_acceptance_40_our_functions_take_what_sglangs_take(trtllm: Plugin) -> None:
    """By name and in order, in the installed release: nothing dropped, nothing swapped."""
    from sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe import fused_moe
    from sglang.srt.layers.moe.topk import TopK
    from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase

    for target in KERNEL_FUNCTIONS:
        module, name = target.rsplit(".", 1)
        theirs = inspect.unwrap(getattr(importlib.import_module(module), name))
        assert _names(theirs)[:3] == ["dispatch_output", "quant_info", "runner_config"]
        # What it says, the TopK's output says too: ids, or logits.
        assert _names(theirs)[3:] in ([], ["use_routed_topk"])
    bind = _names(inspect.unwrap(TopK.bind_runner_backend))
    assert bind == ["self", "runner_backend", "routing_method_type"]
    for name in (
        "apply",
        "get_moe_runner_backend",
        "get_moe_routing_method_type",
        "process_weights_after_loading",
        "restore_weights_before_loading",
    ):
        theirs, ours = (
            _names(getattr(FusedMoEMethodBase, name)),
            _names(getattr(TypedMoeMethod, name)),
        )
        assert len(theirs) == len(ours), name
    packed = _names(PackedExperts.__call__)[1:]
    kept = [name for name in _names(inspect.unwrap(fused_moe)) if name in packed]
    assert kept == packed[: len(kept)] == packed[:-1]


# --- 43, 45: rows that pad a batch ---


def _softmax_topk(layer: Sglang) -> Sglang:
    return make_topk(layer)


def _by_ids(layer: Sglang) -> Sglang:
    return make_topk(layer, None)


def _by_function(layer: Sglang) -> Sglang:
    return make_topk(layer, custom_routing_function=_Counting())


WAYS = pytest.mark.parametrize(
    "bind", [_softmax_topk, _by_ids, _by_function], ids=["logits", "ids", "custom"]
)
Bind = Callable[[Sglang], Sglang]
REAL, PADDED = 5, 8


@WAYS
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
def test_acceptance_43_garbage_in_the_padding_changes_no_real_row(
    bind: Bind, garbage: float, typed_moe: Plugin
) -> None:
    layer = make_layer()
    topk = bind(layer)
    x, logits = torch.randn(PADDED, LAYER_HIDDEN), torch.randn(PADDED, EXPERTS)
    clean = run(layer, x, topk(x, logits))
    x[REAL:], logits[REAL:] = garbage, garbage
    found = run(layer, x, topk(x, logits))
    close(found[:REAL], clean[:REAL])


def close(found: Tensor, wanted: Tensor) -> None:
    """Up to a product's rounding, which depends on how many rows an expert has on a CPU."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@WAYS
def test_acceptance_45_a_padded_batch_equals_an_unpadded_one(bind: Bind, typed_moe: Plugin) -> None:
    """SGLang's count of real tokens, given to its TopK; rows behind it are not SGLang's to read."""
    layer = make_layer()
    topk = bind(layer)
    x, logits = torch.randn(PADDED, LAYER_HIDDEN), torch.randn(PADDED, EXPERTS)
    count = torch.tensor(REAL)
    padded = run(layer, x, topk(x, logits, num_token_non_padded=count))
    alone = run(layer, x[:REAL], topk(x[:REAL], logits[:REAL]))
    close(padded[:REAL], alone)


def test_acceptance_45_an_idle_rank(typed_moe: Plugin) -> None:
    """SGLang's TopK without tokens, on a rank that has none this step."""
    layer = make_layer()
    topk = make_topk(layer)
    layer.quant_method.process_weights_after_loading(layer)
    x = torch.empty(0, LAYER_HIDDEN)
    output = layer(x, topk.empty_topk_output(x.device))
    assert output.shape == (0, LAYER_HIDDEN)


# --- 46, 47, 48: ranks ---


@contextlib.contextmanager
def _rank(rank: int, ranks: int) -> Iterator[None]:
    """This process as one of several expert-parallel ranks, as SGLang counts them."""
    import sglang.srt.layers.moe.token_dispatcher.standard as standard
    from sglang.srt.runtime_context import get_parallel

    sizes = dict.fromkeys(("tp_size", "attn_tp_size", "moe_ep_size"), ranks)
    numbers = dict.fromkeys(("tp_rank", "attn_tp_rank", "moe_ep_rank"), rank)
    groups = dict.fromkeys(("tp_group", "attn_tp_group", "moe_ep_group"))
    with (
        get_parallel().override(**sizes, **numbers, moe_tp_size=1, moe_tp_rank=0, **groups),
        mock.patch.object(standard, "get_device", return_value="cpu", create=True),
    ):
        yield


def _shard(whole: oracle.Experts, rank: int, ranks: int) -> Sglang:
    """One rank's layer, with its share of the experts."""
    layer = make_layer(routed_scaling_factor=2.5)
    assert whole.gate is not None
    held = slice(rank * EXPERTS // ranks, (rank + 1) * EXPERTS // ranks)
    layer.w13_weight.data.copy_(torch.cat((whole.gate[held], whole.up[held]), dim=1))
    layer.w2_weight.data.copy_(whole.down[held])
    return layer


@pytest.mark.parametrize("method", ["DeepSeekV3", None], ids=["logits", "ids"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_acceptance_46_shards_add_up(ranks: int, method: str | None, typed_moe: Plugin) -> None:
    """Groups, bias and a factor of 2.5; every rank that owns a chosen expert adds something."""
    torch.manual_seed(4)
    whole = stack_of(make_layer())
    bias, (x, logits) = torch.randn(EXPERTS) * 0.1, draw()
    routing = oracle.route(DEEPSEEK_RULE, logits, bias, TOP_K)
    assert len(set(routing.ids.flatten().tolist())) > EXPERTS // 2, (
        "every rank of a few has something to do"
    )
    total = torch.zeros(TOKENS, LAYER_HIDDEN, dtype=torch.float64)
    for rank in range(ranks):
        with _rank(rank, ranks):
            layer = _shard(whole, rank, ranks)
            topk = make_topk(layer, method, correction_bias=bias, **DEEPSEEK_TOPK)
            part = run(layer, x, topk(x, logits)).double()
        mine = (routing.ids // (EXPERTS // ranks) == rank).any(dim=1)
        assert torch.equal(part.abs().amax(dim=1) > 0, mine)
        total += part
    equal(total, oracle.layer(DEEPSEEK_RULE, whole, x, logits, bias, top_k=TOP_K, act=Act()))


def test_acceptance_47_ids_stay_global(typed_moe: Plugin) -> None:
    """SGLang's dispatcher would make them local for another runner: ours is given the router's."""
    layer_experts = stack_of(make_layer())
    x, logits = draw()
    routing = oracle.route(SOFTMAX, logits, None, TOP_K)
    seen: list[Tensor] = []
    with _rank(1, 2):
        layer = _shard(layer_experts, 1, 2)
        topk = make_topk(layer, None)
        layer.quant_method.process_weights_after_loading(layer)
        apply = type(layer.quant_method).apply

        def watched(self: Sglang, layer: Sglang, dispatch_output: Sglang) -> Sglang:
            seen.append(dispatch_output.topk_output.topk_ids)
            return apply(self, layer, dispatch_output)

        with mock.patch.object(type(layer.quant_method), "apply", watched):
            right = layer(x, topk(x, logits))
        # And local ids where global ones are meant give another result: the check can fail.
        layer.dispatcher.skip_local_expert_mapping = False
        wrong = layer(x, topk(x, logits))
    assert torch.equal(seen[0].long(), routing.ids)
    assert not torch.allclose(right, wrong, atol=1e-3)


def test_acceptance_48_sglangs_map_is_our_placement(typed_moe: Plugin) -> None:
    """An index map, -1 or the number on this rank, not a mask of 0 and 1."""
    experts = stack_of(make_layer())
    x, logits = draw()
    for rank in range(4):
        with _rank(rank, 4):
            layer = _shard(experts, rank, 4)
            make_topk(layer)
            # SGLang's own, as it makes it for a runner with local ids.
            layer.dispatcher.skip_local_expert_mapping = False
            layer.dispatcher.dispatch(x, make_topk(layer, None)(x, logits))
            theirs = layer.dispatcher.local_expert_mapping
        placement = plans_of(layer)[0].request.placement
        first, held = placement.local_expert_offset(EXPERTS), placement.num_local_experts(EXPERTS)
        ours = [
            number - first if first <= number < first + held else -1 for number in range(EXPERTS)
        ]
        assert theirs.tolist() == ours


# --- 50: fused against separate ---


@pytest.mark.parametrize("factor", [1.0, 2.5])
def test_acceptance_50_fused_equals_separate(factor: float, typed_moe: Plugin) -> None:
    """A shared expert in a slot of its own, beside the same one added by the model."""
    bias, (x, logits) = torch.randn(EXPERTS), draw()
    rule = dataclasses.replace(RULES["DeepSeekV3"], scale=factor)
    fused = make_layer(num_experts=EXPERTS + 1, num_fused_shared_experts=1, top_k=TOP_K + 1)
    routing = oracle.with_shared(oracle.route(rule, logits, bias, TOP_K), EXPERTS, 1)
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    given = StandardTopKOutput(routing.weights.float(), routing.ids.int(), torch.empty(0))
    together = run(fused, x, given)
    separate = make_layer()
    separate.w13_weight.data.copy_(fused.w13_weight.data[:EXPERTS])
    separate.w2_weight.data.copy_(fused.w2_weight.data[:EXPERTS])
    settings = {"scoring_func": "sigmoid", "routed_scaling_factor": factor}
    topk = make_topk(
        separate,
        None,
        correction_bias=bias,
        apply_routed_scaling_factor_on_output=True,
        **settings,
    )
    shared = oracle.expert(stack_of(fused), EXPERTS, x, Act())
    routed = run(separate, x, topk(x, logits)).double()
    equal(together, routed + shared)
