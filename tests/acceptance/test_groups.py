"""Acceptance tests on groups and limits."""

from __future__ import annotations

import pytest
import torch

from tests.acceptance import checks
from tests.acceptance.cases import CASES, GROUPED, Case, sized
from tests.acceptance.routes import Route, direct, layer_of, routes
from typed_moe import (
    BiasedSigmoid,
    DeepSeekV3,
    GroupedSoftmax,
    InKernel,
    KernelRules,
    MiniMax2,
    Refused,
    RenormalizeNaive,
    RoutingShape,
    RoutingStrategy,
    SigmoidRenorm,
    strategy_for,
)
from typed_moe.kernels import flashinfer_facts

FLASHINFER = KernelRules(
    kernel="trtllm_bf16_moe",
    methods=flashinfer_facts.methods((0, 7, 2), "bf16")[0],
    weight_on_input=False,
    source=flashinfer_facts.NEWEST,
)


@pytest.mark.parametrize("groups", [None, 0, 1])
@pytest.mark.parametrize("kept", [None, 0, 1])
def test_acceptance_27_no_groups_has_one_form(groups: int, kept: int) -> None:
    """vllm#34673, #20645, flashinfer#2502: None, 0 and 1 groups are the same thing."""
    made = DeepSeekV3(num_expert_group=groups, topk_group=kept)

    assert made == DeepSeekV3()
    assert hash(made) == hash(DeepSeekV3())
    told = made.in_kernel(RoutingShape(num_experts=64, top_k=4), FLASHINFER)
    assert isinstance(told, InKernel)
    assert (told.n_group, told.topk_group) == (1, 1)
    assert BiasedSigmoid(num_expert_group=groups, topk_group=kept) == BiasedSigmoid()


@pytest.mark.parametrize("strategy", [RenormalizeNaive(), MiniMax2(), SigmoidRenorm()], ids=repr)
def test_acceptance_27_methods_without_groups_pass_none(strategy: RoutingStrategy) -> None:
    """The one form that every FlashInfer entry point takes for the other methods is None."""
    told = strategy.in_kernel(RoutingShape(num_experts=64, top_k=4), FLASHINFER)

    assert isinstance(told, InKernel)
    assert (told.n_group, told.topk_group) == (None, None)


@pytest.mark.parametrize(
    ("groups", "kept", "num_experts", "top_k", "numbers"),
    [
        (8, 4, 8, 2, ["8", "1 per group"]),
        (7, 4, 256, 8, ["256", "7"]),
        (8, 2, 64, 17, ["17", "16"]),
    ],
)
def test_acceptance_28_groups_that_do_not_fit(
    groups: int, kept: int, num_experts: int, top_k: int, numbers: list[str]
) -> None:
    """vllm#29439, flashinfer#4867, sglang#35479: refused when the layer is made, with numbers."""
    strategy = DeepSeekV3(num_expert_group=groups, topk_group=kept)
    with pytest.raises(ValueError, match=r"allowed|multiple") as refused:
        layer_of(strategy, num_experts, top_k)

    assert all(number in str(refused.value) for number in numbers)


def test_acceptance_28_more_groups_kept_than_there_are() -> None:
    """topk_group above num_expert_group is refused where it is written."""
    with pytest.raises(ValueError, match="topk_group is 5; allowed: 1 to num_expert_group = 4"):
        DeepSeekV3(num_expert_group=4, topk_group=5)
    with pytest.raises(ValueError, match="topk_group is 2; allowed: 1 to num_expert_group = 1"):
        DeepSeekV3(topk_group=2)


LIMITS = (
    ("DeepSeekV3-8of4", 256, 128),
    ("DeepSeekV3-Kimi", 256, 8),
    ("DeepSeekV3-Kimi", 384, 8),
    ("DeepSeekV3-8of4", 256, 8),
    ("DeepSeekV3-Kimi", 512, 22),
    ("MiniMax2", 512, 22),
    ("RenormalizeNaive", 512, 10),
    ("BiasedSigmoid-8of4", 64, 32),
)


@pytest.mark.parametrize(("case_id", "num_experts", "top_k"), LIMITS)
def test_acceptance_29_shapes_at_the_limit(case_id: str, num_experts: int, top_k: int) -> None:
    """flashinfer#4867, #1723, #2575: GLM-5, Kimi, DeepSeek-V3, Nemotron, Qwen3-Next, k = all kept."""
    for name, case, route in routes(tuple(c for c in CASES if c.id == case_id)):
        if "layer" not in name:
            at_limit = sized(case, num_experts, top_k)
            checks.check_selection(
                at_limit, route, torch.randn(16, num_experts), at_limit.bias(), least_decided=0.0
            )


@pytest.mark.parametrize(("groups", "kept"), [(2, 1), (4, 2)])
def test_acceptance_29_two_and_four_groups(groups: int, kept: int) -> None:
    """aiter#2153: a group reduction written only for some group counts."""
    strategy = DeepSeekV3(num_expert_group=groups, topk_group=kept)
    logits, bias = torch.randn(64, 64), torch.randn(64) * 0.2
    shape = RoutingShape(num_experts=64, top_k=8)
    ids = strategy.select_experts(logits, bias, shape=shape).topk_ids
    scores = torch.sigmoid(logits.double()) + bias.double()
    best = scores.view(64, groups, -1).topk(2, dim=-1).values.sum(-1).topk(kept, dim=-1).indices
    for row in range(64):
        chosen = set((ids[row] // (64 // groups)).tolist())
        assert chosen <= set(best[row].tolist())


@pytest.mark.parametrize(
    ("case", "route"), [pytest.param(c, r, id=name) for name, c, r in routes(GROUPED)]
)
def test_acceptance_30_the_declared_group_rule(case: Case, route: Route) -> None:
    """vllm#13474: max against top-2 sum; each model's own rule decides."""
    checks.check_30_group_rule(case, route)


@pytest.mark.parametrize("case_id", ["DeepSeekV3-Kimi", "DeepSeekV3-8of4", "RenormalizeNaive"])
def test_acceptance_32_seventy_thousand_tokens(case_id: str) -> None:
    """aiter#2369: no hidden switch with other limits at large T; equal to small batches."""
    case = sized(next(c for c in CASES if c.id == case_id), 256, 8)
    logits, bias = torch.randn(70_000, 256), case.bias()
    whole = direct(case, logits, bias)
    for start in (0, 34_997, 69_968):
        part = direct(case, logits[start : start + 32], bias)
        assert whole.ids is not None
        assert part.ids is not None
        assert torch.equal(whole.ids[start : start + 32], part.ids)
        checks.check_selection(case, direct, logits[start : start + 32], bias, least_decided=0.4)


@pytest.mark.parametrize(
    ("strategy", "num_experts", "top_k", "limit"),
    [
        (SigmoidRenorm(), 257, 8, "256 experts with top_k up to 8"),
        (SigmoidRenorm(), 128, 9, "256 experts with top_k up to 8"),
        (RenormalizeNaive(), 2049, 8, "2048 experts with top_k up to 32"),
        (DeepSeekV3(), 384, 9, "384 experts with top_k up to 8"),
        (DeepSeekV3(), 600, 23, "1024 experts with top_k up to 22"),
        (MiniMax2(), 2048, 32, "1024 experts with top_k up to 32"),
    ],
)
def test_acceptance_33_limit_texts_come_from_the_table(
    strategy: RoutingStrategy, num_experts: int, top_k: int, limit: str
) -> None:
    """TRT-LLM#9792: the limit in the text is the limit that is enforced."""
    shape = RoutingShape(num_experts=num_experts, top_k=top_k)
    refused = strategy.in_kernel(shape, FLASHINFER)

    assert isinstance(refused, Refused)
    assert limit in refused.reason
    assert f"{num_experts} experts with top_k {top_k}" in refused.reason


def test_acceptance_30_models_declare_their_rule() -> None:
    """DeepSeek-V2 ranks groups by their maximum, which its config says and its flags do not."""
    v2 = {
        "model_type": "deepseek_v2",
        "n_routed_experts": 160,
        "num_experts_per_tok": 6,
        "topk_method": "group_limited_greedy",
        "n_group": 8,
        "topk_group": 3,
        "routed_scaling_factor": 16.0,
        "norm_topk_prob": False,
        "scoring_func": "softmax",
        "num_hidden_layers": 60,
        "first_k_dense_replace": 1,
        "hidden_size": 5120,
        "moe_intermediate_size": 1536,
        "n_shared_experts": 2,
        "hidden_act": "silu",
    }

    assert strategy_for(v2) == GroupedSoftmax(
        num_expert_group=8,
        topk_group=3,
        group_score="max",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    )
