"""The table of FlashInfer's limits against what its kernels did on an H100, 2026-11-23.

Which sizes each method of 0.7.2.post1 refused; `python -m tests.conformance` asks the kernels again.
"""

from __future__ import annotations

import attrs
import pytest
import torch

from typed_moe import (
    Bf16,
    DeepSeekV3,
    Default,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    InKernel,
    KernelRules,
    Llama4,
    MiniMax2,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Refused,
    Renormalize,
    RenormalizeNaive,
    RoutingShape,
    RoutingStrategy,
    Sigmoid,
    SigmoidRenorm,
    TopK,
    TopKSigmoid,
    Unquantized,
)
from typed_moe.kernels import flashinfer_facts as facts

RULES = KernelRules(
    kernel="trtllm_fp8_per_tensor_scale_moe",
    methods=facts.methods((0, 7, 2), "fp8_per_tensor_scale")[0],
    weight_on_input=True,
    source="this test",
)
TRIED = (
    *((128, 1), (128, 8), (129, 1), (132, 1), (160, 8), (256, 8), (256, 10), (256, 16), (257, 8)),
    *((384, 8), (512, 8), (512, 10), (512, 22), (576, 8), (768, 32), (896, 16), (1024, 32)),
    (2048, 32),
)
SMALL = {(e, k) for e, k in TRIED if e > 256 or k > 8}
REFUSED: tuple[tuple[RoutingStrategy, set[tuple[int, int]]], ...] = (
    *((method, SMALL) for method in (Default(), TopK(), Sigmoid(), SigmoidRenorm(), TopKSigmoid())),
    (Llama4(), {(e, k) for e, k in TRIED if e > 128 and k == 1}),
    (DeepSeekV3(), {(e, k) for e, k in TRIED if k > (8 if e <= 384 else 22)} | {(2048, 32)}),
    (MiniMax2(), {(2048, 32)}),
    (Renormalize(), set()),
    (RenormalizeNaive(), set()),
)


@pytest.mark.parametrize(
    ("strategy", "refused", "size"),
    [
        pytest.param(strategy, refused, size, id=f"{strategy.name}-{size[0]}-{size[1]}")
        for strategy, refused in REFUSED
        for size in TRIED
        if size[1] == 1 or not isinstance(strategy, Llama4)
    ],
)
def test_sizes_that_the_kernels_refused(
    strategy: RoutingStrategy, refused: set[tuple[int, int]], size: tuple[int, int]
) -> None:
    """Accepted where the kernel ran and equalled the reference, refused where it threw."""
    told = strategy.in_kernel(RoutingShape(num_experts=size[0], top_k=size[1]), RULES)

    assert isinstance(told, Refused if size in refused else InKernel)


@pytest.mark.parametrize(
    ("groups", "kept", "num_experts", "top_k", "reason"),
    [
        (8, 4, 256, 8, None),
        (8, 3, 160, 6, None),
        (4, 2, 128, 8, None),
        (16, 4, 256, 8, "num_expert_group up to 8; here it is 16"),
        (8, 5, 256, 8, "topk_group up to 4; here it is 5"),
        (2, 1, 128, 8, "experts per group up to 32; here it is 64"),
        (8, 1, 64, 8, "top_k below topk_group . experts per group = 8; here it is 8"),
    ],
)
def test_groups_that_the_kernel_takes(
    groups: int, kept: int, num_experts: int, top_k: int, reason: str | None
) -> None:
    """The grouped DeepSeek kernel: 8 groups of up to 32, 4 kept, k below the kept experts."""
    strategy = DeepSeekV3(
        num_expert_group=groups, topk_group=kept, correction_bias_dtype=torch.bfloat16
    )
    told = strategy.in_kernel(RoutingShape(num_experts=num_experts, top_k=top_k), RULES)
    if reason is None:
        assert isinstance(told, InKernel)
        assert (told.n_group, told.topk_group) == (groups, kept)
    else:
        assert isinstance(told, Refused)
        assert reason.replace(" . ", " * ") in told.reason


def test_the_grouped_kernel_rounds_the_bias() -> None:
    """Measured: up to 18 rows of 2,048 changed their experts, so it needs the strategy's leave."""
    shape = RoutingShape(num_experts=256, top_k=8)
    strategy = DeepSeekV3(num_expert_group=8, topk_group=4)
    refused = strategy.in_kernel(shape, RULES)
    assert isinstance(refused, Refused)
    assert "torch.bfloat16" in refused.reason
    told = attrs.evolve(strategy, correction_bias_dtype=torch.bfloat16).in_kernel(shape, RULES)
    assert isinstance(told, InKernel)
    assert told.bias_dtype is torch.bfloat16
    for ungrouped in (DeepSeekV3(), MiniMax2()):
        told = ungrouped.in_kernel(shape, RULES)
        assert isinstance(told, InKernel)
        assert told.bias_dtype is None


def test_biased_methods_require_a_bias() -> None:
    """Measured: a null bias faults in the ungrouped kernels, so None is never passed."""
    for strategy in (DeepSeekV3(), MiniMax2()):
        shape = RoutingShape(num_experts=16, top_k=2)
        with pytest.raises(ValueError, match="was given None"):
            strategy.select_experts(torch.randn(1, 16), None, shape=shape)


@pytest.mark.parametrize(
    ("fmt", "family", "flag"),
    [
        (Unquantized(), None, False),
        (Bf16(), "bf16", False),
        (Fp8PerTensor(), "fp8_per_tensor_scale", True),
        (Fp8PerChannel(), "fp8_per_channel_scale", True),
        (Fp8BlockScale(), "fp8_block_scale", False),
        (MxFp8(), "fp8_block_scale", False),
        (Nvfp4(), "fp4_block_scale", False),
        (MxFp4(), "fp4_block_scale", False),
        (MxInt4(), "mxint4_block_scale", False),
    ],
    ids=repr,
)
def test_entry_points_by_format(fmt: Format, family: str | None, flag: bool) -> None:
    """Which entry points take a format; two of them can put the weight on the input."""
    assert facts.family_of(fmt) == family
    assert (facts.family_of(fmt) in facts.WEIGHT_ON_INPUT) == flag


def test_llama4_without_the_flag_is_refused() -> None:
    """The other entry points multiply the output: a different function, silently."""
    rules = attrs.evolve(RULES, weight_on_input=False)
    refused = Llama4().in_kernel(RoutingShape(num_experts=16, top_k=1), rules)
    assert isinstance(refused, Refused)
    assert "input" in refused.reason
    told = Llama4().in_kernel(RoutingShape(num_experts=16, top_k=1), RULES)
    assert isinstance(told, InKernel)
    assert told.use_routing_scales_on_input


def test_a_weight_on_the_input_asks_for_bfloat16_logits_per_channel() -> None:
    """`Fp8PerChannelLauncher::check_routing`; no other entry point and no other method does."""
    served = facts.methods((0, 7, 2), "fp8_per_channel_scale")[0]
    assert served["Llama4"].logits_dtypes == (torch.bfloat16,)
    others = {name: rules for name, rules in served.items() if name != "Llama4"}
    per_tensor = facts.methods((0, 7, 2), "fp8_per_tensor_scale")[0]
    assert others == {name: rules for name, rules in per_tensor.items() if name != "Llama4"}


@pytest.mark.parametrize(
    "name", ["SqrtSoftplus", "BiasedSigmoid", "ScaledSoftmax", "GroupedSoftmax", "Unspecified"]
)
def test_no_kernel_for_our_own_rules(name: str) -> None:
    """What FlashInfer has no method for is not in its table, and Unspecified is no method."""
    assert name not in facts.METHODS


def test_the_ten_methods_are_in_the_table() -> None:
    """Every method of FlashInfer's enum, by name, reads float32 and bfloat16 logits."""
    assert set(facts.METHODS) == {strategy.name for strategy, _ in REFUSED}
    assert all(
        set(rules.logits_dtypes) == {torch.float32, torch.bfloat16}
        for rules in facts.methods((0, 7, 2), "fp8_per_tensor_scale")[0].values()
    )
