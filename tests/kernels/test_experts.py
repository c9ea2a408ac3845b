"""The reference kernel's experts: activations, biases, row order, shared experts, local ranges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import oracle
from tests.kernels.build import KINDS, from_logits, precomputed
from tests.layer.build import ACTIVATIONS, random_experts, relative_error
from typed_moe.kernels import (
    Bf16MoeArgs,
    ExpertArgs,
    FromLogits,
    ReferenceKernel,
    Routing,
    append_shared,
)
from typed_moe.kernels.reference import to_local
from typed_moe.routing import as_global_ids

EXACT = 2e-6
HIDDEN, WIDTH = 16, 12


def constant(act: oracle.Act, experts: oracle.Experts, *, gate_first: bool = True) -> ExpertArgs:
    """The constant half of a float32 record."""

    def vector(value: float | None) -> Tensor | None:
        return None if value is None else torch.full((experts.count,), value)

    bias = None
    if experts.up_bias is not None:
        bias = join(experts.gate_bias, experts.up_bias, gate_first=gate_first)
    return ExpertArgs(
        num_experts=experts.count,
        top_k=2,
        intermediate_size=WIDTH,
        local_expert_offset=0,
        local_num_experts=experts.count,
        activation_type=KINDS[act.kind],
        gemm1_alpha=vector(act.alpha),
        gemm1_beta=vector(act.beta),
        gemm1_clamp_limit=vector(act.limit),
        gemm1_bias=bias,
        gemm2_bias=experts.down_bias,
    )


def join(gate: Tensor | None, up: Tensor, *, gate_first: bool = True) -> Tensor:
    """The first matrix (or bias) of every expert from its halves."""
    if gate is None:
        return up
    return torch.cat((gate, up) if gate_first else (up, gate), dim=1)


def args(
    experts: oracle.Experts, x: Tensor, routing: Routing, constant_half: ExpertArgs
) -> Bf16MoeArgs:
    """A float32 record with gate rows first."""
    return Bf16MoeArgs(
        routing=routing,
        experts=constant_half,
        hidden_states=x,
        gemm1_weights=join(experts.gate, experts.up),
        gemm2_weights=experts.down,
    )


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_every_activation(name: str, biases: bool) -> None:
    """silu, GELU in both forms, relu squared, and the clamped ones, far into their limits."""
    act = ACTIVATIONS[name][1]
    experts = random_experts(6, HIDDEN, WIDTH, gated=act.gated, biases=biases)
    x = torch.randn(40, HIDDEN) * torch.tensor([1e-3, 1.0, 30.0, 300.0]).repeat(10).unsqueeze(1)
    ids = torch.stack([torch.randperm(6)[:2] for _ in range(40)])
    weights = torch.rand(40, 2)
    expected = oracle.moe(experts, x, ids, weights, act)
    output = ReferenceKernel()(args(experts, x, precomputed(ids, weights), constant(act, experts)))

    for row in range(4):
        assert relative_error(output[row::4], expected[row::4]) < EXACT


@pytest.mark.parametrize("biases", [False, True], ids=["plain", "biases"])
def test_either_order_of_the_first_matrix(biases: bool) -> None:
    """`gate_first=False` reads up rows, then gate rows, and biases in the same order."""
    act = oracle.Act(alpha=1.702, beta=1.0, limit=7.0)
    experts = random_experts(6, HIDDEN, WIDTH, biases=biases)
    x, ids, weights = torch.randn(9, HIDDEN), torch.randint(0, 6, (9, 2)), torch.rand(9, 2)
    routing = precomputed(ids, weights)
    turned = replace(
        args(experts, x, routing, constant(act, experts, gate_first=False)),
        gemm1_weights=join(experts.gate, experts.up, gate_first=False),
    )
    expected = oracle.moe(experts, x, ids, weights, act)

    assert relative_error(ReferenceKernel(gate_first=False)(turned), expected) < EXACT
    assert relative_error(ReferenceKernel()(turned), expected) > 0.1


@pytest.mark.parametrize("on_input", [False, True], ids=["output", "input"])
def test_side_of_the_weight(on_input: bool) -> None:
    """expert(w * x) with biases is not w * expert(x); the flag alone decides."""
    act = oracle.Act()
    experts = random_experts(6, HIDDEN, WIDTH, biases=True)
    x, logits = torch.randn(30, HIDDEN), torch.randn(30, 6)
    chosen = oracle.route(oracle.RULES["TopKSigmoid"], logits, None, 2)
    routing = from_logits(logits, "TopKSigmoid", on_input=on_input)
    expected = oracle.moe(experts, x, chosen.ids, chosen.weights, act, on_input=on_input)
    other = oracle.moe(experts, x, chosen.ids, chosen.weights, act, on_input=not on_input)
    output = ReferenceKernel()(args(experts, x, routing, constant(act, experts)))

    assert relative_error(output, expected) < EXACT
    assert relative_error(output, other) > 0.1


@pytest.mark.parametrize("mode", ["from-logits", "precomputed"])
def test_fused_shared_experts(mode: str) -> None:
    """Acceptance 49, 50: experts E and E + 1 once per token, weight 1 after all scaling."""
    act = oracle.Act()
    experts = random_experts(8, HIDDEN, WIDTH)
    x, logits, bias = torch.randn(20, HIDDEN), torch.randn(20, 6), torch.randn(6) * 0.1
    rule = replace(oracle.RULES["MiniMax2"], scale=2.5)
    chosen = oracle.route(rule, logits, bias, 2)
    both = oracle.with_shared(chosen, 6, 2)
    routing: Routing = FromLogits(
        routing_logits=logits,
        routing_bias=bias,
        n_group=None,
        topk_group=None,
        routed_scaling_factor=2.5,
        routing_method_type="MiniMax2",
    )
    if mode == "precomputed":
        routing = append_shared(precomputed(chosen.ids, chosen.weights), 6, 2)
        assert torch.equal(routing.topk_ids.long(), both.ids)
    half = replace(
        constant(act, experts), num_experts=6, local_num_experts=6, num_fused_shared_experts=2
    )
    output = ReferenceKernel()(args(experts, x, routing, half))
    expected = oracle.moe(experts, x, both.ids, both.weights, act)
    separate = oracle.moe(experts, x, chosen.ids, chosen.weights, act)
    separate = separate + oracle.expert(experts, 6, x, act) + oracle.expert(experts, 7, x, act)

    assert relative_error(output, expected) < EXACT
    assert relative_error(output, separate) < EXACT


@pytest.mark.parametrize("mode", ["from-logits", "precomputed"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_local_ranges_add_up(ranks: int, mode: str) -> None:
    """Acceptance 46: each rank computes its own experts, and none of them nothing."""
    act = oracle.Act()
    experts = random_experts(8, HIDDEN, WIDTH, biases=True)
    x, logits = torch.randn(40, HIDDEN), torch.randn(40, 8)
    chosen = oracle.route(oracle.RULES["Renormalize"], logits, None, 2)
    routing: Routing = from_logits(logits)
    if mode == "precomputed":
        routing = precomputed(chosen.ids, chosen.weights)
    size = 8 // ranks
    total = torch.zeros(40, HIDDEN)
    for rank in range(ranks):
        mine = slice(rank * size, (rank + 1) * size)
        local = oracle.Experts(
            up=experts.up[mine],
            down=experts.down[mine],
            gate=None if experts.gate is None else experts.gate[mine],
            up_bias=None if experts.up_bias is None else experts.up_bias[mine],
            gate_bias=None if experts.gate_bias is None else experts.gate_bias[mine],
            down_bias=None if experts.down_bias is None else experts.down_bias[mine],
        )
        half = replace(
            constant(act, local),
            num_experts=8,
            local_expert_offset=rank * size,
            local_num_experts=size,
        )
        part = ReferenceKernel()(args(local, x, routing, half))
        expected = oracle.moe(
            experts, x, chosen.ids, chosen.weights, act, local=range(mine.start, mine.stop)
        )
        assert relative_error(part, expected) < EXACT
        assert float(part.norm()) > 0
        total += part
    whole = oracle.moe(experts, x, chosen.ids, chosen.weights, act)

    assert relative_error(total, whole) < EXACT


def test_a_rank_without_work() -> None:
    """Acceptance 45: no slot is this rank's, and the result is zeros of the right shape."""
    experts = random_experts(4, HIDDEN, WIDTH)
    half = replace(constant(oracle.Act(), experts), num_experts=8, local_expert_offset=4)
    routing = precomputed(torch.randint(0, 4, (5, 2)), torch.rand(5, 2))
    output = ReferenceKernel()(args(experts, torch.randn(5, HIDDEN), routing, half))

    assert torch.equal(output, torch.zeros(5, HIDDEN))


@given(
    ids=st.lists(st.lists(st.integers(-1, 11), min_size=3, max_size=3), min_size=1, max_size=6),
    offset=st.integers(0, 7),
    count=st.integers(1, 8),
    shared=st.integers(0, 2),
)
def test_local_ids_are_in_range_and_go_back(
    ids: list[list[int]], offset: int, count: int, shared: int
) -> None:
    """Acceptance 47: every local id is -1 or of this rank, and means the same expert."""
    whole = torch.tensor(ids, dtype=torch.int32)
    local = to_local(
        as_global_ids(whole),
        local_expert_offset=offset,
        local_num_experts=min(count, 8 - offset),
        num_experts=8,
        num_fused_shared_experts=shared,
    )
    count = min(count, 8 - offset)
    assert local.num_local_experts == count + shared
    for expert, number in zip(whole.flatten().tolist(), local.ids.flatten().tolist(), strict=True):
        if offset <= expert < offset + count:
            assert number == expert - offset
        elif 8 <= expert < 8 + shared:
            assert number == count + expert - 8
        else:
            assert number == -1
