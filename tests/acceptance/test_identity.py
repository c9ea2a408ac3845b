"""Acceptance tests on identity and API, empty batches, Llama 4, and packed weights."""

from __future__ import annotations

import inspect

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

import typed_moe
from tests import oracle
from tests.acceptance import checks
from tests.acceptance.cases import CASES, Case
from tests.acceptance.routes import Route, direct, layer_of, routes
from typed_moe import (
    FusedMoE,
    Llama4,
    LocalExpertIds,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    Swiglu,
    UnsupportedRouting,
)
from typed_moe.config import FORMATS, FormatName
from typed_moe.kernels.reference import to_local
from typed_moe.routing import as_global_ids

STRATEGIES = sorted({type(case.strategy) for case in CASES}, key=lambda cls: cls.__name__)
DUTIES = ("name", "select_experts", "bias", "router_logits_dtype", "scale", "check", "in_kernel")


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda cls: cls.__name__)
def test_acceptance_37_final_and_complete(strategy: type) -> None:
    """TRT-LLM#17918: a subclass inherited its parent's kernel label. Nothing is inherited here."""
    assert getattr(strategy, "__final__", False)
    assert strategy.__bases__ == (object,)
    fields = {field.name for field in attrs.fields(strategy)}
    for duty in (*DUTIES, "apply_router_weight_on_input"):
        assert duty in vars(strategy) or duty in fields, duty


def test_acceptance_37_every_exported_strategy_is_looked_at() -> None:
    """The list above is the public door's, and no strategy carries another's name."""
    exported = {
        cls
        for _, cls in inspect.getmembers(typed_moe, inspect.isclass)
        if cls.__module__.startswith("typed_moe.routing._") and hasattr(cls, "select_experts")
    } - {RoutingStrategy}

    assert exported == set(STRATEGIES)
    assert all(case.strategy.name == type(case.strategy).__name__ for case in CASES)


class Counting(RoutingStrategy):
    """A custom routing function that counts its calls."""

    name = "Counting"

    def __init__(self) -> None:
        self.calls = 0

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        del e_score_correction_bias
        self.calls += 1
        tokens = router_logits.shape[0]
        ids = torch.arange(shape.top_k, dtype=torch.int32).expand(tokens, -1)
        return Routed(topk_ids=ids, topk_weights=torch.ones(tokens, shape.top_k))


def test_acceptance_38_custom_routing_is_never_bypassed() -> None:
    """vllm#24109, sglang#31838: refused by a kernel that routes, called once where it is taken."""
    with pytest.raises(UnsupportedRouting, match="no routing method for Counting"):
        layer_of(Counting(), 8, 2, RoutingForm.IN_KERNEL)
    strategy = Counting()
    layer = layer_of(strategy, 8, 2)
    for calls in (1, 2, 3):
        layer(torch.randn(5, 8), torch.randn(5, 8))
        assert strategy.calls == calls


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
def test_acceptance_42_no_tokens(name: FormatName, form: RoutingForm) -> None:
    """sglang#38773: T = 0 gives an empty result and no launch."""

    class Forbidden:
        """A kernel that must not run."""

        name = "forbidden"

        def rules(self, request: object) -> object:
            del request
            from typed_moe.kernels.reference import REFERENCE_RULES

            return REFERENCE_RULES

        def prepare(self, weights: object, request: object) -> object:
            del request
            return weights

        def __call__(self, args: object, /) -> Tensor:
            raise AssertionError("launched for no tokens")

    layer = FusedMoE(
        num_experts=8,
        top_k=2,
        hidden_size=128,
        intermediate_size=128,
        routing=typed_moe.RenormalizeNaive(),
        quant=FORMATS[name],
        kernel=Forbidden(),  # type: ignore[arg-type]  # loosely typed on purpose
        routing_form=form,
    )
    for parameter in layer.parameters():
        parameter.data.view(torch.uint8).zero_() if parameter.dim() else parameter.data.fill_(1.0)
    output = layer(torch.empty(0, 128, dtype=torch.bfloat16), torch.empty(0, 8))

    assert output.shape == (0, 128)
    assert output.dtype is torch.bfloat16


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_42_no_rows_to_route(case: Case) -> None:
    """T = 0 routes to (0, k)."""
    chosen = direct(case, torch.empty(0, case.num_experts), case.bias())

    assert chosen.ids is not None
    assert chosen.ids.shape == (0, case.top_k)


def test_acceptance_47_local_ids_are_another_type() -> None:
    """flashinfer#3547, aiter#3995: local ids are no tensor, so they index nothing by mistake."""
    local = to_local(
        as_global_ids(torch.tensor([[0, 5], [4, -1]], dtype=torch.int32)),
        local_expert_offset=4,
        local_num_experts=4,
        num_experts=8,
    )

    assert not issubclass(LocalExpertIds, Tensor)
    assert local.ids.tolist() == [[-1, 1], [0, -1]]
    with pytest.raises((TypeError, AttributeError)):
        Routed(topk_ids=local, topk_weights=torch.ones(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("name", sorted(FORMATS))
def test_acceptance_51_weight_on_the_input(name: FormatName, form: RoutingForm) -> None:
    """vllm#16744, sglang#6274: expert(w * x), not w * expert(x), in every format and form."""
    generator = torch.Generator().manual_seed(5)
    experts = oracle.Experts(
        up=torch.randn(4, 128, 256, generator=generator) / 16,
        gate=torch.randn(4, 128, 256, generator=generator) / 16,
        down=torch.randn(4, 256, 128, generator=generator) / 11,
    )
    assert experts.gate is not None
    layer = FusedMoE(
        num_experts=4,
        top_k=1,
        hidden_size=256,
        intermediate_size=128,
        routing=Llama4(),
        quant=FORMATS[name],
        routing_form=form,
    )
    layer.load_weights(
        (f"{e}.{p}.weight", matrix[e])
        for e in range(4)
        for p, matrix in (
            ("gate_proj", experts.gate),
            ("up_proj", experts.up),
            ("down_proj", experts.down),
        )
    )
    x = 2.0 * torch.randn(64, 256, generator=generator)
    logits = torch.randn(64, 4, generator=generator)
    layer.calibrate(x, logits)
    routing = oracle.route(oracle.RULES["Llama4"], logits, None, 1)
    act = oracle.Act(kind="swiglu")
    right = oracle.moe(experts, x, routing.ids, routing.weights, act, on_input=True)
    wrong = oracle.moe(experts, x, routing.ids, routing.weights, act, on_input=False)
    output = layer(x, logits).double()

    bound = typed_moe.quantization.relative_error_bound(FORMATS[name], Swiglu())
    assert float((output - right).norm() / right.norm()) <= bound
    assert float((output - right).norm()) < 0.8 * float((output - wrong).norm())


def test_acceptance_51_more_than_one_expert_is_refused() -> None:
    """Llama 4's maths is top-1; k = 2 is refused when the layer is made."""
    with pytest.raises(ValueError, match="Llama4 routes to one expert and top_k is 2"):
        layer_of(Llama4(), 16, 2)


@pytest.mark.parametrize(
    ("case", "route"), [pytest.param(c, r, id=name) for name, c, r in routes()]
)
def test_acceptance_52_identical_rows(case: Case, route: Route) -> None:
    """vllm#16337: identical prompts in one batch must agree."""
    checks.check_52_identical_rows(case, route)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_56_packing_loses_at_most_a_bfloat16_step(case: Case) -> None:
    """sglang#33631: FlashInfer's packed word is (id << 16) | bfloat16(weight), and is lossy."""
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    routed = case.strategy.select_experts(
        torch.randn(32, case.num_experts), case.bias(), shape=shape
    )
    bits = routed.topk_weights.bfloat16().view(torch.int16).int() & 0xFFFF
    packed = (routed.topk_ids << 16) | bits
    ids = packed >> 16
    weights = (packed & 0xFFFF).to(torch.int16).view(torch.bfloat16).float()

    assert torch.equal(ids, routed.topk_ids)
    step = routed.topk_weights.abs() * 2.0**-8 + 1e-30
    assert bool(((weights - routed.topk_weights).abs() <= step).all())
