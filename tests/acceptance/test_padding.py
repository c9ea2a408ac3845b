"""Acceptance tests 44 to 46, 49 and 50: padded slots, expert parallelism, shared experts.

Through whole layers; `tests/kernels` has the same for the bare kernel and every record.
"""

from __future__ import annotations

from dataclasses import replace
from typing import final

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests import oracle
from tests.layer.build import Build, random_experts, relative_error
from typed_moe import (
    DeepSeekV3,
    Fp8BlockScale,
    FusedMoE,
    Placement,
    Renormalize,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
)

EXACT = 2e-6
ACT = oracle.Act()
forms = pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
ranked = pytest.mark.parametrize("ranks", [1, 2, 4, 8])


@final
@attrs.frozen(kw_only=True)
class Padded(RoutingStrategy):
    """Renormalize, with the rows from `real` on marked as padding: ids of -1."""

    real: int
    weight: float = 0.0

    @property
    @override
    def name(self) -> str:
        """The name in plans."""
        return "Padded"

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        """The real rows' experts, and -1 for the others."""
        routed = Renormalize().select_experts(router_logits, e_score_correction_bias, shape=shape)
        padding = (torch.arange(router_logits.shape[0]) >= self.real).unsqueeze(1)
        return Routed(
            topk_ids=routed.topk_ids.masked_fill(padding, -1),
            topk_weights=routed.topk_weights.masked_fill(padding, self.weight),
        )


def _poisoned(layer: FusedMoE, x: Tensor, logits: Tensor) -> Tensor:
    """A call whose every fresh tensor is filled with NaN first."""
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(7).isnan().all(), "the allocator is not poisoned"
        return layer(x, logits)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("weight", [0.0, 1.0, 1e30])
@ranked
def test_acceptance_44_minus_one_adds_nothing(ranks: int, weight: float) -> None:
    """vllm#34673, flashinfer's -1 in turn on four backends: on every rank, poisoned memory."""
    experts = random_experts(8, 16, 12)
    x, logits = torch.randn(9, 16), torch.randn(9, 8)
    chosen = oracle.route(oracle.RULES["Renormalize"], logits, None, 2)
    expected = oracle.moe(experts, x, chosen.ids, chosen.weights, ACT)
    total = torch.zeros(9, 16)
    for rank in range(ranks):
        place = Placement(ep_size=ranks, ep_rank=rank)
        build = Build(routing=Padded(real=5, weight=weight), placement=place)
        part = _poisoned(build.loaded(experts), x, logits)
        assert bool((part[5:] == 0).all())
        total += part

    assert relative_error(total[:5], expected[:5]) < EXACT


def test_acceptance_45_padding_changes_nothing() -> None:
    """A padded batch, garbage in its last rows, gives the real rows what they get alone."""
    experts = random_experts(8, 16, 12)
    x, logits = torch.randn(8, 16), torch.randn(8, 8)
    x[5:], logits[5:] = torch.nan, torch.nan
    layer = Build(routing=Padded(real=5)).loaded(experts)
    alone = layer(x[:5], logits[:5])
    among = layer(x, logits)

    assert torch.equal(among[:5], alone)
    assert bool((among[5:] == 0).all())


@forms
def test_acceptance_45_an_idle_rank(form: RoutingForm) -> None:
    """Every token goes to rank 0's experts: rank 1 gives zeros, and no fault."""
    experts = random_experts(8, 16, 12)
    x, logits = torch.randn(6, 16), torch.randn(6, 8)
    logits[:, 4:] = -50.0
    parts = [
        Build(
            routing=Renormalize(),
            placement=Placement(ep_size=2, ep_rank=rank),
            routing_form=form,
        ).loaded(experts)(x, logits)
        for rank in range(2)
    ]
    expected = oracle.layer(oracle.RULES["Renormalize"], experts, x, logits, None, top_k=2, act=ACT)

    assert torch.equal(parts[1], torch.zeros(6, 16))
    assert relative_error(parts[0], expected) < EXACT


@forms
@ranked
def test_acceptance_46_shards_add_up_with_groups_and_bias(ranks: int, form: RoutingForm) -> None:
    """flashinfer#3547, aiter#3995: groups span ranks, so each rank routes over all experts."""
    experts, bias = random_experts(16, 16, 12), torch.randn(16) * 0.05
    x, logits = torch.randn(40, 16), torch.randn(40, 16)
    routing = DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)
    rule = replace(oracle.RULES["DeepSeekV3"], num_expert_group=4, topk_group=2, scale=2.5)
    chosen = oracle.route(rule, logits, bias, 4)
    total = torch.zeros(40, 16)
    for rank in range(ranks):
        build = Build(
            routing=routing,
            num_experts=16,
            top_k=4,
            placement=Placement(ep_size=ranks, ep_rank=rank),
            routing_form=form,
        )
        part = build.loaded(experts, bias)(x, logits)
        mine = range(rank * 16 // ranks, (rank + 1) * 16 // ranks)
        own = oracle.moe(experts, x, chosen.ids, chosen.weights, ACT, local=mine)
        assert relative_error(part, own) < EXACT
        assert float(part.norm()) > 0
        total += part

    whole = oracle.moe(experts, x, chosen.ids, chosen.weights, ACT)
    assert relative_error(total, whole) < EXACT


@forms
def test_acceptance_46_block_scaled_shards_add_up(form: RoutingForm) -> None:
    """The same for FP8 blocks: two ranks by experts and by width against one rank."""
    experts = random_experts(4, 128, 256)
    x, logits = torch.randn(12, 128), torch.randn(12, 4)
    build = Build(
        routing=Renormalize(),
        num_experts=4,
        hidden_size=128,
        intermediate_size=256,
        quant=Fp8BlockScale(),
        routing_form=form,
    )
    whole = build.loaded(experts)(x, logits).double()
    for places in (
        [Placement(ep_size=2, ep_rank=rank) for rank in range(2)],
        [Placement(tp_size=2, tp_rank=rank) for rank in range(2)],
    ):
        parts = [
            attrs.evolve(build, placement=place).loaded(experts)(x, logits) for place in places
        ]
        assert relative_error(torch.stack(parts).sum(0), whole) < EXACT


@forms
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_acceptance_49_50_shared_experts_under_tensor_parallelism(
    ranks: int, form: RoutingForm
) -> None:
    """sglang#8511 and its kin: E to E + s - 1 once each, weight 1 after scaling, on every shard."""
    experts, bias = random_experts(10, 16, 12), torch.randn(8) * 0.3
    x, logits = torch.randn(20, 16), torch.randn(20, 8)
    rule = replace(oracle.RULES["DeepSeekV3"], scale=2.5)
    total = torch.zeros(20, 16)
    for rank in range(ranks):
        build = Build(
            routing=DeepSeekV3(routed_scaling_factor=2.5),
            num_fused_shared_experts=2,
            placement=Placement(tp_size=ranks, tp_rank=rank),
            routing_form=form,
        )
        total += build.loaded(experts, bias)(x, logits)
    fused = oracle.layer(rule, experts, x, logits, bias, top_k=2, act=ACT, num_shared=2)
    routed = oracle.layer(rule, experts, x, logits, bias, top_k=2, act=ACT)
    shared = oracle.expert(experts, 8, x, ACT) + oracle.expert(experts, 9, x, ACT)

    assert relative_error(total, fused) < EXACT
    assert relative_error(total, routed + shared) < EXACT
