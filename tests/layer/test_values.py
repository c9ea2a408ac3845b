"""What a layer computes, against float64: activations, biases, shared experts, ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests import oracle
from tests.layer.build import ACTIVATIONS, Build, random_experts, relative_error
from typed_moe import (
    DeepSeekV3,
    Placement,
    RenormalizeNaive,
    RoutingForm,
    UnsupportedRouting,
)

RULE = oracle.RULES["RenormalizeNaive"]
FORMS = pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
EXACT = 2e-6  # float32 sums of a few dozen products


@FORMS
@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation(name: str, biases: bool, form: RoutingForm) -> None:
    """Each activation, with and without expert biases, in both routing forms."""
    activation, act = ACTIVATIONS[name]
    experts = random_experts(8, 16, 12, gated=act.gated, biases=biases)
    build = Build(
        routing=RenormalizeNaive(), activation=activation, has_bias=biases, routing_form=form
    )
    x, logits = torch.randn(20, 16), torch.randn(20, 8)
    expected = oracle.layer(RULE, experts, x, logits, None, top_k=2, act=act)

    assert relative_error(build.loaded(experts)(x, logits), expected) < EXACT


@FORMS
def test_fused_shared_experts_equal_separate_ones(form: RoutingForm) -> None:
    """Acceptance 49, 50: every token goes to each shared expert once, with weight 1, unscaled."""
    experts, bias = random_experts(10, 16, 12), torch.randn(8) * 0.1
    routing = DeepSeekV3(routed_scaling_factor=2.5)
    build = Build(routing=routing, num_fused_shared_experts=2, routing_form=form)
    x, logits = torch.randn(20, 16), torch.randn(20, 8)
    rule = replace(oracle.RULES["DeepSeekV3"], scale=2.5)
    act = oracle.Act()
    expected = oracle.layer(rule, experts, x, logits, bias, top_k=2, act=act, num_shared=2)
    routed = oracle.layer(rule, experts, x, logits, bias, top_k=2, act=act)
    shared = oracle.expert(experts, 8, x, act) + oracle.expert(experts, 9, x, act)
    output = build.loaded(experts, bias)(x, logits)

    assert relative_error(output, expected) < EXACT
    assert relative_error(output, routed + shared) < EXACT


@FORMS
@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("parallel", ["ep", "tp", "both"])
def test_shards_add_up(parallel: str, size: int, form: RoutingForm) -> None:
    """Acceptance 46: the ranks' partial sums are the whole layer, expert biases added once."""
    if parallel == "both" and size > 4:
        size = 4
    ep = size if parallel != "tp" else 1
    tp = {"ep": 1, "tp": min(size, 4), "both": 2}[parallel]
    experts = random_experts(8, 16, 12, biases=True)
    x, logits = torch.randn(20, 16), torch.randn(20, 8)
    expected = oracle.layer(RULE, experts, x, logits, None, top_k=2, act=oracle.Act())
    total = torch.zeros(20, 16)
    for ep_rank in range(ep):
        for tp_rank in range(tp):
            place = Placement(ep_size=ep, ep_rank=ep_rank, tp_size=tp, tp_rank=tp_rank)
            build = Build(
                routing=RenormalizeNaive(), has_bias=True, placement=place, routing_form=form
            )
            part = build.loaded(experts)(x, logits)
            assert float(part.norm()) > 0
            total += part

    assert relative_error(total, expected) < EXACT


def test_shared_experts_are_refused_under_expert_parallelism() -> None:
    """Every rank would add them: refused, with the way out."""
    build = Build(
        routing=RenormalizeNaive(),
        num_fused_shared_experts=1,
        placement=Placement(ep_size=2),
    )
    with pytest.raises(UnsupportedRouting, match="added once per rank; run them unfused"):
        build.empty()


def test_moving_a_layer_keeps_quantised_values_and_the_bias() -> None:
    """`.to(bfloat16)` casts unquantised weights alone; the plan follows."""
    experts, bias = random_experts(8, 16, 12), torch.randn(8) * 0.1
    layer = Build(routing=DeepSeekV3()).loaded(experts, bias)
    layer.to(torch.bfloat16)

    assert layer.get_parameter("w13_weight").dtype is torch.bfloat16
    assert layer.e_score_correction_bias is not None
    assert torch.equal(layer.e_score_correction_bias, bias)
    assert layer.plan.request.dtype is torch.bfloat16
    layer.to("meta")
    assert layer.plan.request.device.type == "meta"


def test_plan_reads_as_a_page() -> None:
    """The plan names strategy, sizes, owner of the scale and every refused kernel's reason."""
    text = str(
        Build(
            routing=DeepSeekV3(num_expert_group=2, topk_group=1, routed_scaling_factor=2.5),
            num_fused_shared_experts=1,
        )
        .empty()
        .plan
    )

    for part in (
        "DeepSeekV3(num_expert_group=2, topk_group=1, routed_scaling_factor=2.5",
        "8 + 1 fused shared, top_k 2, hidden 16, intermediate 12",
        "2.5 by the kernel",
        "n_group 2, topk_group 1",
        "no entry point takes unquantised torch.float32 weights",
    ):
        assert part in text
