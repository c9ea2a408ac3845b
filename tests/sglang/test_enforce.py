"""`enforce`: what our runners give FlashInfer for SGLang's layers, beside what SGLang would."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from unittest import mock

import attrs
import pytest
import torch
from torch import Tensor

from tests.sglang import host
from tests.sglang.layers import HIDDEN, Block, SglangBlock
from tests.sglang.test_observe import CASES, DEEPSEEK, FAULTS, LLAMA4, QWEN3, TOKENS, Case, Fault
from typed_moe import UnsupportedRouting
from typed_moe.kernels._flashinfer_library import EnumName, FlashInferLibrary
from typed_moe.routing import Refused
from typed_moe.sglang import Mode, Plugin
from typed_moe.sglang._differences import Call, differences
from typed_moe.sglang._enforce import Enforcer
from typed_moe.sglang._plugin import installed_flashinfer
from typed_moe.sglang._watch import watch

pytestmark = pytest.mark.sglang


class OnAnyDevice:
    """The installed release, with the functions that are in its place now, on a CPU too."""

    def __init__(self) -> None:
        self._installed: FlashInferLibrary = installed_flashinfer()

    @property
    def version(self) -> str:
        return self._installed.version

    def parameters(self, entry_point: str) -> frozenset[str]:
        return self._installed.parameters(entry_point)

    def number(self, enum: EnumName, member: str) -> int | None:
        return self._installed.number(enum, member)

    def refuses(self, device: torch.device) -> Refused | None:
        del device
        return None

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        result = vars(sys.modules["flashinfer.fused_moe"])[entry_point](**arguments)
        output: Tensor = result[0] if isinstance(result, list) else result
        return output

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError(entry_point)


@pytest.fixture
def enforced(trtllm: Plugin) -> Iterator[Plugin]:
    trtllm.enforcer = Enforcer(OnAnyDevice)
    trtllm.mode = Mode.ENFORCE
    yield trtllm
    trtllm.mode = Mode.OBSERVE


def calls_of(block: Block, tokens: int = TOKENS) -> list[Call]:
    made = SglangBlock(block)
    torch.manual_seed(1)
    with watch() as calls:
        output = made(
            torch.randn(tokens, HIDDEN).bfloat16(), torch.randn(tokens, block.num_experts)
        )
    assert (tuple(output.shape), output.dtype) == ((tokens, HIDDEN), torch.bfloat16)
    return calls


def both(block: Block, plugin: Plugin) -> tuple[Call, Call]:
    """One layer's call, by SGLang and by us."""
    made = SglangBlock(block)
    x, logits = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, block.num_experts)
    with watch() as calls:
        for mode in (Mode.OBSERVE, Mode.ENFORCE):
            plugin.mode = mode
            made(x, logits)
    theirs, ours = calls
    return theirs, ours


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.id}-{case.block.quant}")
def test_argument_by_argument(case: Case, enforced: Plugin) -> None:
    """The kernel that SGLang calls, once, with what observe says we would tell it."""
    theirs, ours = both(case.block, enforced)
    assert theirs.entry_point == ours.entry_point == f"trtllm_{case.entry}"
    found = differences(theirs, ours)
    assert {one.argument for one in found if one.reason is None} == set(), found
    no_buffer = theirs.arguments.get("output") is None
    assert {one.argument for one in found} == case.differs | ({"output"} if no_buffer else set())


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.id)
def test_a_fault_of_sglangs_is_not_made(fault: Fault, enforced: Plugin) -> None:
    """Before and after, for one layer: exactly the arguments that observe reports are others."""
    theirs, ours = both(fault.block, enforced)
    found = differences(theirs, ours)
    assert {one.argument for one in found if one.reason is None} == fault.findings


def test_mxfp4_keeps_a_deepseek_router(enforced: Plugin) -> None:
    """SGLang hard-codes Renormalize there, and drops bias, groups and factor."""
    block = attrs.evolve(DEEPSEEK, quant="mxfp4")
    enforced.mode = Mode.OBSERVE
    (before,) = calls_of(block)
    names = (
        "routing_method_type",
        "routing_bias",
        "n_group",
        "topk_group",
        "routed_scaling_factor",
    )
    assert [before.arguments[name] for name in names] == [1, None, None, None, None]
    enforced.mode = Mode.ENFORCE
    (after,) = calls_of(block)
    assert (after.arguments["n_group"], after.arguments["topk_group"]) == (4, 2)
    assert after.arguments["routed_scaling_factor"] == 2.5
    number = OnAnyDevice().number("RoutingMethodType", "DeepSeekV3")
    assert after.arguments["routing_method_type"] == number
    bias = after.arguments["routing_bias"]
    assert isinstance(bias, Tensor)
    assert tuple(bias.shape) == (block.num_experts,)


def test_llama4s_weight_goes_on_the_input(enforced: Plugin) -> None:
    (call,) = calls_of(attrs.evolve(LLAMA4, quant="fp8_per_tensor"))
    assert call.arguments["use_routing_scales_on_input"] is True


def test_mxfp4_that_no_kernel_routes_goes_precomputed(enforced: Plugin) -> None:
    """A softmax without renormalisation in groups: routed by its strategy, before the kernel."""
    block = Block(
        num_experts=64,
        top_k=4,
        method="DeepSeekV3",
        groups=4,
        kept=2,
        renormalize=False,
        factor=16.0,
        quant="mxfp4",
    )
    (call,) = calls_of(block)
    assert call.entry_point == "trtllm_fp4_block_scale_routed_moe"
    given = call.arguments["topk_ids"]
    assert isinstance(given, tuple)
    ids, weights = given
    logits = _logits(block)
    scores = logits.softmax(-1)
    # Two of four groups by their best expert, then the four best of those: by hand.
    best = scores.reshape(TOKENS, 4, 16).max(-1).values.topk(2).indices
    allowed = torch.zeros(TOKENS, 4).scatter_(1, best, 1.0).repeat_interleave(16, dim=1)
    expected = (scores * allowed).topk(4)
    assert torch.equal(ids.sort().values, expected.indices.sort().values.int())
    torch.testing.assert_close(weights.sum(-1), expected.values.sum(-1) * 16.0)


def _logits(block: Block) -> Tensor:
    torch.manual_seed(1)
    torch.randn(TOKENS, HIDDEN)
    return torch.randn(TOKENS, block.num_experts)


def test_no_tokens_no_call(enforced: Plugin) -> None:
    assert calls_of(QWEN3, tokens=0) == []


def test_weights_that_are_replaced_are_used(enforced: Plugin) -> None:
    """`update_weights_from_disk` puts others in their place."""
    made = SglangBlock(QWEN3)
    x, logits = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, QWEN3.num_experts)
    made(x, logits)
    fresh = torch.nn.Parameter(made.experts.w13_weight.data.clone(), requires_grad=False)
    made.experts.w13_weight = fresh
    with watch() as calls:
        made(x, logits)
        made(x, logits)
    for call in calls:
        weights = call.arguments["gemm1_weights"]
        assert isinstance(weights, Tensor)
        assert weights.data_ptr() == fresh.data_ptr()


# --- refused before a call ---


def test_a_device_that_flashinfer_does_not_serve_is_an_error_when_the_layer_is_made(
    enforced: Plugin,
) -> None:
    """The sentence names the layer, the reason and the way out."""
    enforced.enforcer = Enforcer(installed_flashinfer)
    with pytest.raises(UnsupportedRouting, match=r"layers\.60.*SM100.*TYPED_MOE_SGLANG=observe"):
        make_experts()


def make_experts(**settings: object) -> torch.nn.Module:
    """SGLang's layer in bfloat16, without a TopK."""
    from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE

    known: dict[str, object] = {
        "num_experts": 8,
        "hidden_size": HIDDEN,
        "intermediate_size": 128,
        "layer_id": 60,
        "top_k": 2,
        "params_dtype": torch.bfloat16,
        "prefix": "model.layers.60.mlp.experts",
    }
    made: torch.nn.Module = FusedMoE(**{**known, **settings})
    return made


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"num_experts": 9, "num_fused_shared_experts": 1}, "1 shared experts are fused"),
        ({"activation": "situ"}, "activation 'situ' with a gate"),
    ],
    ids=["fused shared experts", "activation"],
)
def test_a_layer_that_is_not_served_is_not_made(
    settings: dict[str, object], said: str, enforced: Plugin
) -> None:
    with pytest.raises(UnsupportedRouting, match=rf"layers\.60\.mlp\.experts: {said}"):
        make_experts(**settings)


def test_a_layer_is_served_elsewhere(enforced: Plugin) -> None:
    """What enforce refuses, observe leaves to SGLang; and other backends are nobody's business."""
    settings = {"num_experts": 9, "num_fused_shared_experts": 1}
    enforced.mode = Mode.OBSERVE
    make_experts(**settings)
    enforced.mode = Mode.ENFORCE
    host.publish("triton")
    make_experts(**settings)


def test_a_topk_that_is_not_served_is_not_bound(enforced: Plugin) -> None:
    """More experts per token than FlashInfer takes, from logits or as ids."""
    block = Block(num_experts=64, top_k=40, method="RenormalizeNaive", quant="bf16")
    with pytest.raises(
        UnsupportedRouting, match=r"(?s)layers\.0\.mlp\.experts: .*with top_k up to 32"
    ):
        SglangBlock(block)
    enforced.mode = Mode.OBSERVE
    SglangBlock(block)


def test_a_topk_that_is_no_rule_is_not_bound(enforced: Plugin) -> None:
    """More groups kept than there are, which SGLang makes and says nothing of."""
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts: .*topk_group"):
        SglangBlock(attrs.evolve(DEEPSEEK, groups=2, kept=4, method=None))


def test_a_topk_of_another_layer_is_not_asked_for(enforced: Plugin) -> None:
    """A TopK in front of SGLang's own kernels, in the same process, may compute anything."""
    from sglang.srt.layers.moe.topk import TopK

    topk = TopK(40, layer_id=61)
    topk.bind_runner_backend(None)


def test_no_model_takes_unfinished_sums(enforced: Plugin) -> None:
    with mock.patch.dict("os.environ", {"SGLANG_ENABLE_MOE_DEFERRED_FINALIZE": "1"}):
        assert SglangBlock(QWEN3).experts.supports_deferred_finalize is False


@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.ENFORCE])
def test_settings_that_a_piecewise_graph_drops(mode: Mode, enforced: Plugin) -> None:
    """SGLang rebuilds the TopKConfig without its score function; the layer's own is used."""
    from sglang.srt.layers.moe.topk import BypassedTopKOutput, TopKConfig

    enforced.mode = mode
    layer_id = 40 if mode is Mode.OBSERVE else 41
    block = attrs.evolve(QWEN3, method="SigmoidRenorm", scoring_func="sigmoid")
    made = SglangBlock(block, layer_id)
    x, logits = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, QWEN3.num_experts)
    rebuilt = TopKConfig(top_k=QWEN3.top_k, renormalize=True, layer_id=layer_id)
    given = BypassedTopKOutput(hidden_states=x, raw_router_logits=logits, topk_config=rebuilt)
    with watch() as calls:
        made.experts(x, given)
    (call,) = calls
    number = OnAnyDevice().number("RoutingMethodType", "SigmoidRenorm")
    assert call.arguments["routing_method_type"] == number
    assert {one.about for one in enforced.observer.findings.values()} <= {
        "tune_max_num_tokens",
        "routed_scaling_factor",
    }


def test_two_topks_of_one_layer_are_not_guessed_between(enforced: Plugin) -> None:
    from sglang.srt.layers.moe.topk import BypassedTopKOutput, TopKConfig

    made = SglangBlock(QWEN3, 42)
    SglangBlock(QWEN3, 42)
    x, logits = torch.randn(TOKENS, HIDDEN).bfloat16(), torch.randn(TOKENS, QWEN3.num_experts)
    rebuilt = TopKConfig(top_k=QWEN3.top_k, renormalize=True, layer_id=42)
    given = BypassedTopKOutput(hidden_states=x, raw_router_logits=logits, topk_config=rebuilt)
    with pytest.raises(UnsupportedRouting, match="layer 42 has 2 TopKs"):
        made.experts(x, given)
    enforced.mode = Mode.OBSERVE  # which only watches: SGLang's call is made
    with watch() as calls:
        made.experts(x, given)
    assert len(calls) == 1
