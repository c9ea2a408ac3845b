"""Bad input: each mistake is a sentence that says what, got, allowed, what to do."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
import torch

from tests.layer.build import Build, random_experts
from typed_moe import (
    DeepSeekV3,
    FusedMoE,
    Llama4,
    MxFp4,
    Placement,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    UnsupportedRouting,
)
from typed_moe.config import Fp8BlockScale, Fp8PerTensor, Nvfp4, Swiglu
from typed_moe.routing import RoutingForm

GOOD = Build(routing=RenormalizeNaive(), prefix="model.layers.3.mlp.experts")


def _loaded() -> FusedMoE:
    return GOOD.loaded(random_experts(8, 16, 12))


Call = Callable[[], object]


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (attrs.evolve(GOOD, top_k=9), ValueError, "top_k is 9; allowed: 1 to num_experts = 8"),
        (attrs.evolve(GOOD, top_k=0), ValueError, "top_k is 0; allowed"),
        (attrs.evolve(GOOD, num_experts=0), ValueError, "num_experts is 0; allowed: 1 or more"),
        (attrs.evolve(GOOD, hidden_size=0), ValueError, "hidden_size is 0; allowed"),
        (attrs.evolve(GOOD, num_fused_shared_experts=-1), ValueError, "is -1; allowed: 0 or more"),
        (attrs.evolve(GOOD, dtype=torch.int32), TypeError, "dtype is torch.int32; allowed"),
        (
            attrs.evolve(GOOD, routing=DeepSeekV3(num_expert_group=3)),
            ValueError,
            "num_experts is 8, not a multiple of num_expert_group = 3",
        ),
        (attrs.evolve(GOOD, quant=MxFp4()), ValueError, "hidden_size is 16, not a multiple of 32"),
        (
            attrs.evolve(GOOD, placement=Placement(ep_size=3)),
            ValueError,
            "num_experts is 8, not a multiple of ep_size = 3",
        ),
        (
            attrs.evolve(GOOD, placement=Placement(tp_size=5)),
            ValueError,
            "intermediate_size is 12, not a multiple of tp_size = 5",
        ),
        (
            attrs.evolve(GOOD, quant=Fp8BlockScale(), placement=Placement(tp_size=2)),
            ValueError,
            "not a multiple of 128, the block of fp8_block",
        ),
        (
            attrs.evolve(GOOD, routing=Llama4(), top_k=1, num_fused_shared_experts=1),
            ValueError,
            "Llama4 weights the experts' input",
        ),
    ],
)
def test_layers_that_cannot_be(build: Build, error: type[Exception], message: str) -> None:
    """Numbers that do not fit are refused when the layer is made."""
    with pytest.raises(error, match=message):
        build.empty()


@pytest.mark.parametrize("routing", [2, None, "DeepSeekV3", RenormalizeNaive])
def test_routing_has_to_be_a_strategy(routing: object) -> None:
    """vllm#27492: an int, a name or a class is refused at run time too, with the reason."""
    with pytest.raises(TypeError, match="allowed: a RoutingStrategy object"):
        FusedMoE(
            num_experts=8,
            top_k=2,
            hidden_size=16,
            intermediate_size=12,
            routing=routing,  # type: ignore[arg-type]  # wrong on purpose
        )


@pytest.mark.parametrize(
    ("placement", "message"),
    [
        ({"tp_size": 0}, "tp_size is 0; allowed: 1 or more"),
        ({"ep_size": 2, "ep_rank": 2}, "ep_rank is 2; allowed: 0 to ep_size - 1 = 1"),
    ],
)
def test_placements_that_cannot_be(placement: dict[str, int], message: str) -> None:
    """A rank outside its group is refused where it is written."""
    with pytest.raises(ValueError, match=message):
        Placement(**placement)


def test_calls_that_do_not_fit() -> None:
    """Shapes, dtypes and devices of a call; the layer's name is in the message."""
    layer = _loaded()
    x, logits = torch.randn(4, 16), torch.randn(4, 8)
    name = "model.layers.3.mlp.experts"
    wrong: list[tuple[Call, type[Exception], str]] = [
        (lambda: layer(torch.randn(4, 17), logits), ValueError, rf"{name}: .*\(4, 17\); allowed"),
        (lambda: layer(x, torch.randn(3, 8)), ValueError, r"\(3, 8\) for 4 tokens; allowed"),
        (
            lambda: layer(x, torch.randn(4, 9)),
            ValueError,
            r"\(4, 9\) for 4 tokens; allowed: .* = \(4, 8\)",
        ),
        (lambda: layer(x.long(), logits), TypeError, "hidden_states is torch.int64; allowed"),
        (lambda: layer(x, logits.long()), TypeError, "router_logits is torch.int64; allowed"),
        (lambda: layer(x.to("meta"), logits), ValueError, "hidden_states is on meta.* move them"),
        (lambda: layer(x, logits.to("meta")), ValueError, "router_logits on meta.* move them"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()


def test_weights_that_were_never_loaded() -> None:
    """A layer whose weights are the fill is refused before its first call, by name."""
    layer = GOOD.empty()
    with pytest.raises(ValueError, match=r"mlp\.experts: w13_weight, w2_weight hold NaN"):
        layer(torch.randn(4, 16), torch.randn(4, 8))


@pytest.mark.parametrize("quant", [Fp8PerTensor(), Nvfp4()], ids=lambda quant: quant.name)
def test_static_scales_that_were_never_set(quant: Fp8PerTensor | Nvfp4) -> None:
    """Without input scales from a checkpoint or calibrate() the first call is refused."""
    layer = attrs.evolve(GOOD, quant=quant, intermediate_size=16).loaded(random_experts(8, 16, 16))
    with pytest.raises(ValueError, match="input_scale comes from the checkpoint or from calibrate"):
        layer(torch.randn(4, 16), torch.randn(4, 8))
    with pytest.raises(ValueError, match="calibrate was given no tokens"):
        layer.calibrate(torch.empty(0, 16), torch.empty(0, 8))
    layer.calibrate(torch.zeros(2, 16), torch.zeros(2, 8))
    assert bool((layer(torch.zeros(2, 16), torch.zeros(2, 8)) == 0).all())


def test_results_that_are_no_routing() -> None:
    """Swapped or misshapen results of a strategy are refused where they are made."""
    ids, weights = torch.zeros(3, 2, dtype=torch.int32), torch.ones(3, 2)
    with pytest.raises(ValueError, match="Are the two swapped"):
        Routed(topk_ids=weights, topk_weights=ids)
    with pytest.raises(ValueError, match=r"\(3, 2\) and topk_weights \(3, 1\)"):
        Routed(topk_ids=ids, topk_weights=weights[:, :1])


def test_settings_that_cannot_be() -> None:
    """Settings are looked at where they are written."""
    wrong: list[tuple[Call, type[Exception], str]] = [
        (lambda: DeepSeekV3(routed_scaling_factor=0.0), ValueError, "positive finite number"),
        (
            lambda: DeepSeekV3(routed_scaling_factor=None),  # type: ignore[arg-type]  # on purpose
            TypeError,
            "1.0 for no scaling",
        ),
        (lambda: DeepSeekV3(num_expert_group=-1), ValueError, "num_expert_group is -1; allowed"),
        (
            lambda: DeepSeekV3(num_expert_group=2.5),  # type: ignore[arg-type]  # on purpose
            TypeError,
            "allowed: an int, or None",
        ),
        (lambda: DeepSeekV3(router_logits_dtype=torch.int8), ValueError, "None for any"),
        (lambda: DeepSeekV3(correction_bias_dtype=torch.float16), ValueError, "never rounded"),
        (lambda: Swiglu(limit=-1.0), ValueError, "limit is -1.0; allowed: a positive number"),
    ]
    for call, error, message in wrong:
        with pytest.raises(error, match=message):
            call()


def test_strict_refuses_routing_outside_a_kernel_that_was_asked_to_route() -> None:
    """A form that the kernel cannot serve is an error that names the reason."""
    from typed_moe import SqrtSoftplus

    with pytest.raises(UnsupportedRouting, match="no routing method for SqrtSoftplus"):
        attrs.evolve(GOOD, routing=SqrtSoftplus(), routing_form=RoutingForm.IN_KERNEL).empty()


def test_bias_that_is_missing_or_unwanted() -> None:
    """Acceptance 18: None for a method with a bias, and a bias for one without, raise."""
    shape = RoutingShape(num_experts=8, top_k=2)
    logits = torch.randn(3, 8)
    with pytest.raises(ValueError, match="or zeros if the model has none"):
        DeepSeekV3().select_experts(logits, None, shape=shape)
    with pytest.raises(ValueError, match="RenormalizeNaive has no e_score_correction_bias"):
        RenormalizeNaive().select_experts(logits, torch.zeros(8), shape=shape)
    with pytest.raises(ValueError, match=r"shape \(7,\); allowed: \(num_experts,\) = \(8,\)"):
        DeepSeekV3().select_experts(logits, torch.zeros(7), shape=shape)
