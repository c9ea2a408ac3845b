"""DeepSeek V1 against its published modelling rule, which transformers does not have."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.hf._deepseek_v1 import DeepseekMoE, published_rule
from typed_moe import (
    Default,
    FusedMoE,
    RenormalizeNaive,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    load_config,
    moe_spec,
    strategy_for,
)

HIDDEN, WIDTH, EXPERTS, TOP_K, SHARED = 32, 16, 16, 4, 2


def _config(*, norm: bool, top_k: int = TOP_K) -> dict[str, object]:
    """The released config at a tiny size."""
    return {
        **load_config("deepseek-moe-16b"),
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "n_routed_experts": EXPERTS,
        "num_experts_per_tok": top_k,
        "n_shared_experts": SHARED,
        "norm_topk_prob": norm,
    }


@torch.no_grad()
def _block(*, norm: bool, top_k: int = TOP_K) -> DeepseekMoE:
    block = DeepseekMoE(
        hidden=HIDDEN, width=WIDTH, experts=EXPERTS, top_k=top_k, shared=SHARED, norm=norm
    )
    block.gate.weight.normal_(0.0, 2.0 / HIDDEN**0.5)
    return block


@torch.no_grad()
def _ours(
    block: DeepseekMoE,
    config: dict[str, object],
    x: Tensor,
    *,
    routing: RoutingStrategy | None = None,
    form: RoutingForm | None = None,
) -> Tensor:
    """The block's output with our experts and routing: all from the config, layer 1 on."""
    spec = moe_spec(config, 1)
    experts = FusedMoE(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        routing=spec.routing if routing is None else routing,
        activation=spec.activation,
        routing_form=form,
    )
    experts.load_weights(block.experts.state_dict().items(), layout=spec.layout)
    shared: Tensor = block.shared_experts(x)
    return experts(x, block.gate(x)) + shared


@pytest.mark.parametrize("form", RoutingForm, ids=lambda form: form.value)
@pytest.mark.parametrize(("norm", "top_k"), [(False, TOP_K), (True, TOP_K), (True, 1)])
@torch.no_grad()
def test_block(norm: bool, top_k: int, form: RoutingForm) -> None:
    block, config = _block(norm=norm, top_k=top_k), _config(norm=norm, top_k=top_k)
    x = torch.randn(32, HIDDEN)
    assert (_ours(block, config, x, form=form) - block(x)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("norm", "other"), [(False, RenormalizeNaive()), (True, Default())], ids=["added", "dropped"]
)
@torch.no_grad()
def test_renormalisation_shows(norm: bool, other: RoutingStrategy) -> None:
    block, config = _block(norm=norm), _config(norm=norm)
    x = torch.randn(32, HIDDEN)
    assert (_ours(block, config, x, routing=other) - block(x)).abs().max() > 1e-2


@pytest.mark.parametrize("norm", [False, True])
def test_acceptance_59_deepseek_v1_equals_its_published_rule_on_1e5_rows(norm: bool) -> None:
    strategy = strategy_for({**load_config("deepseek-moe-16b"), "norm_topk_prob": norm}, 1)
    shape, rule = RoutingShape(num_experts=64, top_k=6), oracle.RULES[strategy.name]
    differ = 0
    for spread in torch.linspace(0.1, 6.0, 10).tolist():
        logits = spread * torch.randn(10_000, 64)
        ids, weights = published_rule(logits, 6, norm_topk_prob=norm)
        ours = strategy.select_experts(logits, None, shape=shape)
        same = (ids.sort(dim=1).values == ours.topk_ids.long().sort(dim=1).values).all(dim=1)
        assert not oracle.route(rule, logits[~same], None, 6).decided.any()
        dense = torch.zeros_like(logits).scatter(1, ids, weights)
        dense = dense.scatter_add(1, ours.topk_ids.long(), -ours.topk_weights)
        assert dense[same].abs().max() <= 1e-6
        differ += int((~same).sum())
    assert differ < 100
