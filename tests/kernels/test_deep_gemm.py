"""What stands around DeepGEMM's products, in Triton's interpreter. No GPU, and no DeepGEMM.

The products are `ContractProducts`, which asserts what DeepGEMM asserts of its operands and computes
what its scheduler walks over. `tests/gpu/test_deep_gemm.py` has the library itself.
"""

from __future__ import annotations

import importlib.util
import math
import os
from dataclasses import replace

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.kernels.build import EXPERTS, TOKENS, Sizes, precomputed, record
from tests.kernels.grouped_products import ROUNDING, ContractProducts, product_bound
from tests.layer.build import ACTIVATIONS, Build, random_experts, relative_error
from typed_moe import (
    Bf16,
    DeepSeekV3,
    Fp8BlockScale,
    Llama4,
    Placement,
    RenormalizeNaive,
    RoutingForm,
    RoutingStrategy,
)
from typed_moe.kernels import DeepGemmKernel

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not on"
    ),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
KERNEL = DeepGemmKernel(library=ContractProducts())
HIDDEN, WIDTH = 128, 64


BF16, FP8 = product_bound(Bf16()), product_bound(Fp8BlockScale())


def chosen(tokens: int = TOKENS) -> tuple[Tensor, Tensor]:
    """Distinct ids, some of them -1, and weights."""
    ids = torch.stack([torch.randperm(EXPERTS)[:2] for _ in range(tokens)])
    ids[torch.rand(ids.shape) < 0.2] = -1
    return ids, torch.rand(tokens, 2)


@pytest.mark.parametrize(
    ("name", "block"), [*((name, 16) for name in sorted(ACTIVATIONS)), ("swiglu", 128)]
)
def test_bf16_with_every_activation(name: str, block: int) -> None:
    """Against float64; slots without an expert, and a block of the library's height."""
    made = record("bf16", ACTIVATIONS[name][1])
    ids, weights = chosen()
    expected = oracle.moe(made.experts, made.x, ids, weights, made.act)
    kernel = DeepGemmKernel(library=ContractProducts(block=block))

    assert relative_error(kernel(made.make(precomputed(ids, weights))), expected) < BF16


@pytest.mark.parametrize(
    ("kind", "tokens"), [("swiglu", 1), ("swiglu", 200), ("relu2", 1), ("relu2", TOKENS)]
)
def test_fp8_blocks(kind: oracle.Kind, tokens: int) -> None:
    """Stored bits against what they are worth; at 200 tokens an expert has more than half a block."""
    made = record("fp8_block", oracle.Act(kind=kind), Sizes(tokens=tokens))
    ids, weights = chosen(tokens)
    expected = oracle.moe(made.experts, made.x, ids, weights, made.act, rounding=made.rounding)

    assert relative_error(KERNEL(made.make(precomputed(ids, weights))), expected) < FP8


def build(routing: RoutingStrategy, form: RoutingForm) -> Build:
    """A bfloat16 layer on it."""
    return Build(
        routing=routing,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        routing_form=form,
        kernel=KERNEL,
        dtype=torch.bfloat16,
    )


def rounded(experts: oracle.Experts) -> oracle.Experts:
    """The experts with bfloat16 matrices."""
    assert experts.gate is not None
    return replace(
        experts,
        up=experts.up.bfloat16().double(),
        down=experts.down.bfloat16().double(),
        gate=experts.gate.bfloat16().double(),
    )


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("name", ["DeepSeekV3", "Llama4"])
def test_routing_in_both_forms(name: str, form: RoutingForm) -> None:
    """Groups, a bias, a factor and shared experts; and the weight on the expert's input."""
    strategies: dict[str, tuple[RoutingStrategy, oracle.Rule, int]] = {
        "DeepSeekV3": (
            DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5),
            replace(oracle.RULES["DeepSeekV3"], num_expert_group=4, topk_group=2, scale=2.5),
            2,
        ),
        "Llama4": (Llama4(), oracle.RULES["Llama4"], 0),
    }
    strategy, rule, shared = strategies[name]
    top_k = 1 if name == "Llama4" else 2
    bias = torch.randn(8) * 0.1 if rule.biased else None
    experts = random_experts(8 + shared, HIDDEN, WIDTH)
    made = attrs.evolve(build(strategy, form), top_k=top_k, num_fused_shared_experts=shared)
    layer = made.loaded(experts, bias)
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    expected = oracle.layer(
        rule,
        rounded(experts),
        x,
        logits,
        bias,
        top_k=top_k,
        act=oracle.Act(),
        num_shared=shared,
    )

    assert layer.plan.kernel == "deep_gemm"
    assert relative_error(layer(x, logits), expected) < BF16


def test_acceptance_46_shards_add_up() -> None:
    """A rank leaves the slots of others out."""
    experts = random_experts(8, HIDDEN, WIDTH)
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    rule = oracle.RULES["RenormalizeNaive"]
    expected = oracle.layer(rule, rounded(experts), x, logits, None, top_k=2, act=oracle.Act())
    total = torch.zeros(9, HIDDEN)
    for rank in range(4):
        place = Placement(ep_size=4, ep_rank=rank)
        made = attrs.evolve(build(RenormalizeNaive(), RoutingForm.IN_KERNEL), placement=place)
        total += made.loaded(experts)(x, logits).float()

    # Four partial sums, each rounded to bfloat16.
    assert relative_error(total, expected) < math.sqrt(BF16**2 + 4 * ROUNDING)


def test_rows_before_the_sum() -> None:
    """Weighed and added up by the caller they are what the layer gives."""
    experts = random_experts(8, HIDDEN, WIDTH)
    place = Placement(ep_size=2, ep_rank=1)
    made = attrs.evolve(build(RenormalizeNaive(), RoutingForm.IN_KERNEL), placement=place)
    layer = made.loaded(experts)
    x, logits = torch.randn(9, HIDDEN).bfloat16(), torch.randn(9, 8)
    parts = layer.forward_unfinalized(x, logits)
    index = parts.expanded_idx_to_permuted_idx
    rows = parts.gemm2_output[index.clamp(min=0).long()].double()
    weights = torch.where(index >= 0, parts.expert_weights, 0.0).double()
    mine = torch.where((index >= 0)[..., None], rows, 0.0) * weights[..., None]

    assert bool((index < 0).any())
    assert relative_error(layer(x, logits), mine.sum(dim=1)) < math.sqrt(ROUNDING)


def test_output_is_written_where_it_is_asked_for() -> None:
    """The record's `output`, and nothing of a token whose experts are all elsewhere."""
    made = record("bf16", oracle.Act(kind="swiglu"))
    ids, weights = chosen()
    ids[3] = -1
    output = torch.full((TOKENS, made.x.shape[1]), float("nan"), dtype=torch.bfloat16)
    args = replace(made.make(precomputed(ids, weights)), output=output)

    assert KERNEL(args) is output
    assert not bool(output[3].any())
    assert bool(output.isfinite().all())
