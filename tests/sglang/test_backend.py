"""`--moe-runner-backend typed_moe` and `FusedMoE(..., routing=...)`: SGLang's layer on our runners."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Protocol, cast
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from tests import oracle
from tests.oracle import RULES, Act
from tests.sglang import host
from typed_moe import (
    DeepSeekV3,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    RoutingStrategy,
    UnsupportedRouting,
)
from typed_moe.config import Fp8BlockScale
from typed_moe.sglang import Plugin
from typed_moe.sglang._backend import is_ours, plans_of
from typed_moe.sglang._protocols import LayerLike

pytestmark = pytest.mark.sglang

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 6, 256, 128, 8, 2


@pytest.fixture
def typed(trtllm: Plugin) -> Plugin:
    host.publish("typed_moe")
    return trtllm


@pytest.fixture
def auto(trtllm: Plugin) -> Plugin:
    host.publish()
    return trtllm


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


def _layer(quant: object = None, **arguments: object) -> nn.Module:
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    layer: nn.Module = FusedMoE(
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        layer_id=0,
        top_k=TOP_K,
        params_dtype=torch.float32,
        quant_config=quant,
        prefix="model.layers.0.mlp.experts",
        **arguments,
    )
    for parameter in layer.parameters():
        if parameter.element_size() == 1:
            parameter.data = (torch.randn(parameter.shape) * 2).to(parameter.dtype)
        else:
            parameter.data.uniform_(0.01, 0.02)
    return layer


def _call(layer: nn.Module, x: Tensor, logits: Tensor, **topk: object) -> Tensor:
    from sglang.srt.layers.moe.topk import TopK

    router = TopK(TOP_K, layer_id=0, **topk)
    router.bind_runner_backend(layer.runner_backend)
    with torch.no_grad():
        output: Tensor = layer(x, router(x, logits))
    return output


def _plain(layer: nn.Module) -> oracle.Experts:
    w13, w2 = layer.get_parameter("w13_weight"), layer.get_parameter("w2_weight")
    if w13.element_size() == 1:
        return _halves(
            _blocks(w13, layer.get_parameter("w13_weight_scale_inv")),
            _blocks(w2, layer.get_parameter("w2_weight_scale_inv")),
        )
    return _halves(w13, w2)


def _blocks(weight: Tensor, scale: Tensor) -> Tensor:
    """Each value times the scale of its 128 x 128 block."""
    return weight.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)


def _halves(w13: Tensor, w2: Tensor) -> oracle.Experts:
    return oracle.Experts(gate=w13[:, :WIDTH], up=w13[:, WIDTH:], down=w2)


class _Method(Protocol):
    def process_weights_after_loading(self, layer: nn.Module) -> None: ...


def _method(layer: nn.Module) -> _Method:
    """SGLang's quantisation method, which is a module where it is a fused operator."""
    return cast("_Method", layer.quant_method)


def _draw() -> tuple[Tensor, Tensor]:
    return torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)


def _ours(layer: nn.Module) -> LayerLike:
    return cast("LayerLike", layer)


def test_the_backend_is_on_sglangs_command_line(typed: Plugin) -> None:
    from sglang.srt.server_args import ServerArgs

    assert ServerArgs(model_path="dummy", moe_runner_backend="typed_moe").moe_runner_backend


def test_a_strategy_of_a_users_own(auto: Plugin) -> None:
    """With any backend asked for, and a TopK that says nothing about routing."""
    layer, (x, logits) = _layer(routing=Ends()), _draw()
    got = _call(layer, x, logits)
    ids = torch.tensor([[0, EXPERTS - 1]]).repeat(TOKENS, 1)
    want = oracle.moe(_plain(layer), x, ids, torch.full(ids.shape, 0.5), Act())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    assert plans_of(_ours(layer))[0].strategy.name == "Ends"


def test_without_routing_the_layer_is_sglangs(auto: Plugin) -> None:
    layer = _layer()
    assert not is_ours(_ours(layer))


def test_routing_beside_a_topk_that_says_the_same(auto: Plugin) -> None:
    layer, (x, logits) = _layer(routing=RenormalizeNaive()), _draw()
    _call(layer, x, logits, renormalize=True, scoring_func="softmax")


def test_routing_beside_a_topk_that_says_otherwise(auto: Plugin) -> None:
    layer, (x, logits) = _layer(routing=RenormalizeNaive()), _draw()
    with pytest.raises(ValueError, match=r"routing= is RenormalizeNaive\(\).*computes Default"):
        _call(layer, x, logits, renormalize=False)


def test_the_bias_is_the_topks(auto: Plugin) -> None:
    bias = torch.randn(EXPERTS)
    strategy = DeepSeekV3(num_expert_group=2, topk_group=1, routed_scaling_factor=2.5)
    layer, (x, logits) = _layer(routing=strategy), _draw()
    got = _call(
        layer,
        x,
        logits,
        use_grouped_topk=True,
        num_expert_group=2,
        topk_group=1,
        scoring_func="sigmoid",
        correction_bias=bias,
        routed_scaling_factor=2.5,
        apply_routed_scaling_factor_on_output=True,
    )
    rule = dataclasses.replace(RULES["DeepSeekV3"], num_expert_group=2, topk_group=1, scale=2.5)
    want = oracle.layer(rule, _plain(layer), x, logits, bias, top_k=TOP_K, act=Act())
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_fp8_blocks_as_sglang_loads_them(typed: Plugin) -> None:
    """Weights and scales under SGLang's names; its FP8 method makes them, ours runs them."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    quant = Fp8Config(
        is_checkpoint_fp8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
    )
    layer, (x, logits) = _layer(quant), _draw()
    _method(layer).process_weights_after_loading(layer)
    got = _call(layer, x, logits)
    want = oracle.layer(
        RULES["RenormalizeNaive"], _plain(layer), x, logits, None, top_k=TOP_K, act=Act()
    )
    # FP8 activations: 3 bits of mantissa before each of two matrices.
    assert (got.double() - want).norm() / want.norm() < 0.05
    (plan,) = plans_of(_ours(layer))
    assert plan.request.quant == Fp8BlockScale()


def test_a_format_that_is_not_run_is_an_error_at_construction(typed: Plugin) -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    with pytest.raises(UnsupportedRouting, match=r"FP8 with block scales.*one scale per tensor"):
        _layer(Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static"))


def test_fused_shared_experts_are_an_error_at_construction(typed: Plugin) -> None:
    with pytest.raises(UnsupportedRouting, match="num_fused_shared_experts=1"):
        _layer(num_fused_shared_experts=1)


def test_another_dispatcher_is_an_error_at_construction(typed: Plugin) -> None:
    from sglang.srt.layers.moe import utils

    with (
        mock.patch.object(utils, "get_moe_a2a_backend", return_value=utils.MoeA2ABackend.DEEPEP),
        pytest.raises(UnsupportedRouting, match="--moe-a2a-backend is deepep"),
    ):
        _layer()


def test_a_layer_that_no_kernel_serves_is_an_error_when_its_weights_are_loaded(
    typed: Plugin,
) -> None:
    """As on a GPU without FlashInfer's kernels, where the reference is not taken by itself."""
    from sglang.srt.layers.moe.topk import TopK

    layer = _layer()
    TopK(TOP_K, layer_id=0).bind_runner_backend(layer.runner_backend)
    refused = UnsupportedRouting("no kernel serves this layer")
    with (
        mock.patch("typed_moe.sglang._backend.decide", side_effect=refused),
        pytest.raises(UnsupportedRouting, match="no kernel serves"),
    ):
        _method(layer).process_weights_after_loading(layer)


def test_no_tokens(typed: Plugin) -> None:
    layer = _layer()
    assert _call(layer, torch.empty(0, HIDDEN), torch.empty(0, EXPERTS)).shape == (0, HIDDEN)


@pytest.fixture
def rank_1_of_2(typed: Plugin) -> Iterator[None]:
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


@pytest.mark.parametrize("routed", [False, True], ids=["from logits", "from ids"])
def test_an_expert_parallel_rank(routed: bool, rank_1_of_2: None) -> None:
    """Its half of the experts' part of every token; SGLang's dispatcher makes ids local, with -1."""
    layer, (x, logits) = _layer(), _draw()
    # A TopK whose settings we do not translate is left to SGLang.
    custom = {"custom_routing_function": _renormalized} if routed else {}
    got = _call(layer, x, logits, **custom)
    experts, half = _plain(layer), EXPERTS // 2
    assert experts.gate is not None
    assert experts.count == half
    gate, up, down = (
        torch.cat((torch.zeros_like(stack), stack))
        for stack in (experts.gate, experts.up, experts.down)
    )
    routing = oracle.route(RULES["RenormalizeNaive"], logits, None, TOP_K)
    want = oracle.moe(
        oracle.Experts(gate=gate, up=up, down=down),
        x,
        routing.ids,
        routing.weights,
        Act(),
        local=range(half, EXPERTS),
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    (plan,) = plans_of(_ours(layer))
    assert plan.strategy.name == ("RoutedBySglang" if routed else "RenormalizeNaive")


def _renormalized(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
) -> tuple[Tensor, Tensor]:
    del hidden_states, renormalize
    weights, ids = gating_output.softmax(-1).topk(topk)
    return weights / weights.sum(-1, keepdim=True), ids.int()
