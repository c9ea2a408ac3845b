"""`observe`: what SGLang passes to each kernel, beside what typed-moe would, argument by argument."""

from __future__ import annotations

from unittest import mock

import attrs
import pytest
import torch

from tests.sglang.layers import HIDDEN, Block, Quant, SglangBlock
from typed_moe.sglang import Plugin

pytestmark = pytest.mark.sglang

TOKENS = 5
DEEPSEEK = Block(
    num_experts=64,
    top_k=4,
    method="DeepSeekV3",
    scoring_func="sigmoid",
    groups=4,
    kept=2,
    biased=True,
    factor=2.5,
)
QWEN3 = Block(num_experts=64, top_k=4, method="RenormalizeNaive")
TUNE, PDL, BIAS = "tune_max_num_tokens", "enable_pdl", "routing_bias"
FACTOR, METHOD, IDS = "routed_scaling_factor", "routing_method_type", "topk_ids"
LOGITS, GROUPS = "routing_logits", ("n_group", "topk_group")


@attrs.frozen(kw_only=True)
class Case:
    """A block, the kernel that SGLang calls, and what differs in our call for a known reason."""

    id: str
    block: Block
    entry: str
    differs: frozenset[str]


def _case(name: str, block: Block, entry: str, *differs: str) -> Case:
    return Case(id=name, block=block, entry=entry, differs=frozenset(differs))


def _of(block: Block, quant: Quant) -> Block:
    return attrs.evolve(block, quant=quant)


# The number says Renormalize, and the TopK does not renormalise: SGLang routes by itself.
UNNORMALISED = attrs.evolve(QWEN3, renormalize=False)
# A wrong number: exaone_moe's.
WRONG = attrs.evolve(DEEPSEEK, method="RenormalizeNaive")
GPT_OSS = Block(num_experts=64, top_k=4, method="Renormalize")
LLAMA4 = Block(num_experts=16, top_k=1, method="Llama4", renormalize=False, custom="llama4")

FP4 = (TUNE, PDL, "hidden_states_scale_layout")
CASES = [
    _case("qwen3", QWEN3, "fp8_block_scale_moe", TUNE, FACTOR),
    _case("deepseek", DEEPSEEK, "fp8_block_scale_moe", TUNE, BIAS),
    _case("unnormalised", UNNORMALISED, "fp8_block_scale_routed_moe", TUNE, FACTOR, IDS),
    _case("wrong", WRONG, "fp8_block_scale_routed_moe", TUNE, FACTOR),
    _case("qwen3", _of(QWEN3, "bf16"), "bf16_moe", TUNE),
    _case("deepseek", _of(DEEPSEEK, "bf16"), "bf16_moe", TUNE, BIAS),
    _case("wrong", _of(WRONG, "bf16"), "bf16_routed_moe", TUNE, FACTOR),
    _case("qwen3", _of(QWEN3, "fp8_per_tensor"), "fp8_per_tensor_scale_moe", TUNE, FACTOR, LOGITS),
    _case(
        "deepseek", _of(DEEPSEEK, "fp8_per_tensor"), "fp8_per_tensor_scale_moe", TUNE, BIAS, LOGITS
    ),
    _case("qwen3", _of(QWEN3, "nvfp4"), "fp4_block_scale_moe", *FP4),
    _case("deepseek", _of(DEEPSEEK, "nvfp4"), "fp4_block_scale_moe", *FP4, BIAS),
    _case("wrong", _of(WRONG, "nvfp4"), "fp4_block_scale_routed_moe", *FP4, METHOD, *GROUPS),
    _case("gpt_oss", _of(GPT_OSS, "mxfp4"), "fp4_block_scale_moe", TUNE, PDL, LOGITS),
]


def run(block: Block, layer_id: int = 0) -> None:
    made = SglangBlock(block, layer_id)
    made(torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, block.num_experts))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id}-{case.block.quant}")
def test_argument_by_argument(case: Case, trtllm: Plugin) -> None:
    """Equal, or different for a reason that docs/sglang.md gives."""
    run(case.block)
    ((theirs, found),) = trtllm.observer.compared
    assert theirs.entry_point == f"trtllm_{case.entry}"
    assert {one.argument for one in found if one.reason is None} == set(), found
    assert {one.argument for one in found} == case.differs


@attrs.frozen(kw_only=True)
class Fault:
    """A block that SGLang calls wrongly, and the arguments that show it."""

    id: str
    block: Block
    findings: frozenset[str]


FAULTS = [
    Fault(
        id="llama4's weight is put on the output",
        block=_of(LLAMA4, "fp8_per_tensor"),
        findings=frozenset({"use_routing_scales_on_input"}),
    ),
    Fault(
        id="mxfp4 routes every model as gpt-oss",
        block=_of(DEEPSEEK, "mxfp4"),
        findings=frozenset(
            {"routing_method_type", "routing_bias", "n_group", "topk_group", FACTOR}
        ),
    ),
    Fault(
        id="a factor that the model applies too",
        block=attrs.evolve(DEEPSEEK, scale_in_topk=False),
        findings=frozenset({FACTOR}),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_of_sglangs_is_found(
    fault: Fault, trtllm: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    """Each argument once for the model, with number, TopK config, strategy and both values."""
    with caplog.at_level("WARNING", logger="typed_moe.sglang"):
        run(fault.block, layer_id=0)
        run(fault.block, layer_id=1)
    for _, found in trtllm.observer.compared:
        assert {one.argument for one in found if one.reason is None} == fault.findings
    assert len(trtllm.observer.compared) == 2
    told = [one.message for one in caplog.records if one.name == "typed_moe.sglang"]
    assert len(told) == len(fault.findings)
    for message in told:
        assert "TinyForCausalLM" in message
        assert f"routing_method_type {fault.block.method}" in message
        assert "TopKSettings(" in message
        assert "strategy " in message


def test_a_wrong_number_is_found_when_the_model_is_built(
    trtllm: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="typed_moe.sglang"):
        SglangBlock(WRONG, 0)
        SglangBlock(WRONG, 1)
    (message,) = (record.message for record in caplog.records)
    assert "routing_method_type is RenormalizeNaive" in message
    assert "computes DeepSeekV3(num_expert_group=4, topk_group=2" in message


@pytest.mark.parametrize("block", [QWEN3, attrs.evolve(QWEN3, method="Renormalize"), DEEPSEEK])
def test_a_right_number_is_no_finding(block: Block, trtllm: Plugin) -> None:
    SglangBlock(block)
    assert trtllm.observer.findings == {}


def test_a_layer_is_compared_once(trtllm: Plugin) -> None:
    made = SglangBlock(QWEN3)
    for _ in range(3):
        made(torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, QWEN3.num_experts))
    assert len(trtllm.observer.compared) == 1


def test_no_tokens_are_not_the_first_call(trtllm: Plugin) -> None:
    made = SglangBlock(QWEN3)
    for tokens in (0, TOKENS):
        made(torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, QWEN3.num_experts))
    ((theirs, _),) = trtllm.observer.compared
    hidden = theirs.arguments["hidden_states"]
    assert isinstance(hidden, torch.Tensor)
    assert hidden.shape[0] == TOKENS


def test_a_mistake_of_ours_does_not_end_the_server(
    trtllm: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    """The default mode only watches: SGLang's result is handed on, and the log says what failed."""
    made = SglangBlock(QWEN3)
    x, logits = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, QWEN3.num_experts)
    with mock.patch("typed_moe.sglang._observe.differences", side_effect=RuntimeError("ours")):
        output = made(x, logits)
    assert tuple(output.shape) == (TOKENS, HIDDEN)
    assert "could not compare the call of model.layers.0.mlp.experts" in caplog.text


def test_settings_that_no_strategy_takes_are_reported(
    trtllm: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    """More groups kept than there are: SGLang makes the TopK, and says nothing."""
    SglangBlock(attrs.evolve(DEEPSEEK, groups=2, kept=4, method=None))
    (finding,) = trtllm.observer.findings.values()
    assert finding.about == "no strategy"
    assert "topk_group" in finding.message


def test_binding_twice_is_one_topk(trtllm: Plugin) -> None:
    made = SglangBlock(QWEN3, 51)
    made.topk.bind_runner_backend(
        made.experts.runner_backend, routing_method_type=made.experts.routing_method_type
    )
    assert len(trtllm._configs[51]) == 1
