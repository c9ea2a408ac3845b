"""Acceptance tests of the FlashInfer call: bias, limits, labels, arguments, skipped slots, sizes.

The kernels need SM100 GPUs. Here a call goes to FlashInfer's own PyTorch references where its value
is looked at, and to the newest release's signature where its arguments are.
"""

from __future__ import annotations

import importlib
import inspect
from typing import final

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests import oracle
from tests.acceptance.cases import CASES, Case, find
from tests.kernels.recorded_flashinfer import RecordedLibrary, fill
from tests.kernels.signatures import VERSIONS, table
from tests.layer.build import Build, random_experts, relative_error
from typed_moe import (
    Bf16,
    BiasRule,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    FusedMoE,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Refused,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    SwigluStep,
    UnsupportedRouting,
)
from typed_moe.kernels import FlashInferKernel
from typed_moe.kernels import flashinfer_facts as facts

NEWEST = VERSIONS[-1]
FORMATS: tuple[Format, ...] = (
    Bf16(),
    Fp8PerTensor(),
    Fp8BlockScale(),
    MxFp8(),
    Nvfp4(),
    MxFp4(),
    Fp8PerChannel(),
    MxInt4(),
)


def layer_of(
    case: Case, quant: Format, library: RecordedLibrary, form: RoutingForm | None = None
) -> FusedMoE:
    """Of the case's own size, with filled weights and no bias."""
    layer = Build(
        routing=case.strategy,
        num_experts=case.num_experts,
        top_k=case.top_k,
        hidden_size=128,
        intermediate_size=128,
        quant=quant,
        kernel=FlashInferKernel(library),
        routing_form=form,
        dtype=torch.bfloat16,
    ).empty()
    fill(layer)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, None], ids=str)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_18_bias_dtypes(case: Case, quant: Format, dtype: torch.dtype | None) -> None:
    """sglang#37133, vllm#38989: as stored, rounded by leave, or refused; None never reaches a kernel."""
    library = RecordedLibrary(NEWEST)
    layer = layer_of(case, quant, library)
    x, logits = torch.randn(3, 128).bfloat16(), torch.randn(3, case.num_experts)
    wanted = case.strategy.bias is BiasRule.REQUIRED
    if dtype is None:
        if wanted:
            with pytest.raises(ValueError, match="e_score_correction_bias"):
                layer(x, logits)
            assert not library.calls
            return
    elif not wanted:
        with pytest.raises(ValueError, match="reads none"):
            layer.load_weights([("e_score_correction_bias", torch.zeros(case.num_experts))])
        return
    else:
        bias = torch.randn(case.num_experts).to(dtype)
        layer.load_weights([("e_score_correction_bias", bias)])
    layer(x, logits)
    ((entry, arguments),) = library.calls
    if entry.endswith("_routed_moe") or not wanted:
        assert arguments.get("routing_bias") is None
        return
    sent = arguments["routing_bias"]
    assert isinstance(sent, Tensor)
    assert sent.dtype is (
        layer.plan.in_kernel.bias_dtype or dtype if layer.plan.in_kernel else None
    )


BORDERS = (
    *((8, 1), (128, 1), (129, 1), (128, 8), (256, 8), (256, 9), (257, 8), (384, 8), (385, 8)),
    *((384, 9), (400, 9), (512, 22), (512, 23), (1024, 22), (1024, 32), (1025, 8), (2048, 32)),
    *((2048, 33), (2049, 8)),
)


@pytest.mark.parametrize("size", BORDERS, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_31_every_declared_size(case: Case, size: tuple[int, int]) -> None:
    """flashinfer#3840: both sides of every tier are called, or refused before anything is loaded.

    The plan is held to the table here; the table to an H100's kernels in test_flashinfer_facts.py.
    """
    shape = RoutingShape(num_experts=size[0], top_k=size[1])
    try:
        case.strategy.check(shape)
    except ValueError:
        return
    case = attrs.evolve(case, num_experts=size[0], top_k=size[1])
    tier = facts.METHODS.get(case.strategy.name)
    library = RecordedLibrary(NEWEST)
    build = Build(
        routing=case.strategy,
        num_experts=size[0],
        top_k=size[1],
        hidden_size=128,
        intermediate_size=128,
        quant=Nvfp4(),
        kernel=FlashInferKernel(library),
        dtype=torch.bfloat16,
    )
    if size[0] > 2048 or size[1] > 32:
        with pytest.raises(UnsupportedRouting, match="up to 2048 experts with top_k up to 32"):
            build.empty("meta")
        return
    plan = build.empty("meta").plan
    grouped = case.rule.num_expert_group > 1
    tiers = () if tier is None else tier.rules.grouped_tiers if grouped else tier.rules.tiers
    held = any(one.holds(shape) for one in tiers)
    in_kernel = plan.form is RoutingForm.IN_KERNEL
    assert in_kernel <= held
    if held and not grouped and not case.rule.on_input:
        assert in_kernel


@pytest.mark.parametrize("name", sorted(facts.METHODS))
def test_acceptance_33_errors_name_the_limit_that_is_enforced(name: str) -> None:
    """flashinfer's own text said 10 where 32 was enforced: ours are made from the table."""
    tiers = facts.METHODS[name].rules.tiers
    case = next(one for one in CASES if one.strategy.name == name)
    strategy = DeepSeekV3() if name == "DeepSeekV3" else case.strategy
    top_k = 1 if name == "Llama4" else max(tier.max_top_k for tier in tiers) + 1
    rules = FlashInferKernel(RecordedLibrary(NEWEST)).rules(
        Build(
            routing=strategy,
            num_experts=4096,
            top_k=top_k,
            hidden_size=128,
            intermediate_size=128,
            quant=Fp8PerTensor(),
        )
        .empty("meta")
        .plan.request
    )
    assert not isinstance(rules, Refused)
    refused = strategy.in_kernel(RoutingShape(num_experts=4096, top_k=top_k), rules)
    assert isinstance(refused, Refused)
    for tier in tiers:
        assert str(tier) in refused.reason
    assert f"4096 experts with top_k {top_k}" in refused.reason


@pytest.mark.parametrize("version", VERSIONS)
def test_acceptance_35_labels_are_names_of_the_releases_enum(version: str) -> None:
    """TRT-LLM's 5 is MiniMax2, FlashInfer's is TopK: only names are compared, release by release."""
    numbers = table(version).enums["RoutingMethodType"]
    release = tuple(int(part) for part in version.split(".")[:3])
    for name, method in facts.METHODS.items():
        if release >= method.since:
            assert name in numbers
    assert "Unspecified" not in facts.METHODS


NOT_PASSED = {
    "enable_pdl": "None leaves it to FlashInfer; FlashInferKernel(enable_pdl=...) passes it",
    "output": "passed where the caller gives one",
    "routing_replay_out": "passed where the caller gives one",
    "gemm1_lora_delta": "no LoRA here",
    "per_token_scale": "NVFP4 activations have one static scale",
    "valid_hidden_size": "zeros are multiplied like any value",
    "valid_intermediate_size": "as valid_hidden_size",
    "hidden_states_scale_layout": "MXFP4 with bfloat16 activations has no scales there",
    "num_fused_shared_experts": "precomputed: a shared expert is one more expert",
}
"""Parameters of the newest release that no call uses, and why."""


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
def test_acceptance_40_no_argument_is_dropped(quant: Format, form: RoutingForm) -> None:
    """Every parameter of the entry point is passed, or listed with a reason."""
    library = RecordedLibrary(NEWEST)
    case = attrs.evolve(find("RenormalizeNaive"), num_experts=16, top_k=2)
    layer = layer_of(case, quant, library, form)
    layer(torch.randn(3, 128).bfloat16(), torch.randn(3, 16))
    ((entry, arguments),) = library.calls
    signature = table(NEWEST).functions[entry]

    assert signature.parameters.keys() - arguments.keys() <= NOT_PASSED.keys()
    for name, parameter in signature.parameters.items():
        if parameter.default is inspect.Parameter.empty:
            assert name in arguments


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_41_one_normal_form_for_every_entry_point(case: Case) -> None:
    """Groups, scale, method and flag are the strategy's, whatever the format."""
    told = []
    names = ("n_group", "topk_group", "routed_scaling_factor", "routing_method_type")
    for quant in FORMATS:
        library = RecordedLibrary(NEWEST)
        layer = layer_of(case, quant, library)
        if case.biased:
            bias = torch.zeros(case.num_experts)
            layer.load_weights([("e_score_correction_bias", bias)])
        layer(torch.randn(3, 128).bfloat16(), torch.randn(3, case.num_experts))
        ((entry, arguments),) = library.calls
        if entry.endswith("_routed_moe"):
            continue
        told.append(tuple(arguments[name] for name in (*names, "norm_topk_prob")))
    assert len(set(told)) <= 1


@final
@attrs.frozen(kw_only=True)
class Padded(RoutingStrategy):
    """Renormalize, with the second half of the tokens padding: id -1."""

    @property
    @override
    def name(self) -> str:
        return "Padded"

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        routed = Renormalize().select_experts(router_logits, e_score_correction_bias, shape=shape)
        ids = routed.topk_ids.clone()
        ids[ids.shape[0] // 2 :] = -1
        return Routed(topk_ids=ids, topk_weights=routed.topk_weights)


def through_references(
    strategy: RoutingStrategy, quant: Format, *, num_experts: int = 16, shared: int = 0
) -> Build:
    """A layer whose kernel is FlashInfer's reference with SwiGLUStep, which follows weights."""
    pytest.importorskip("flashinfer", reason="FlashInfer's references are the kernel here")
    references = importlib.import_module("typed_moe.testing._flashinfer_references")
    return Build(
        routing=strategy,
        num_experts=num_experts,
        top_k=2,
        hidden_size=128,
        intermediate_size=128,
        quant=quant,
        activation=SwigluStep(limit=1.5),
        num_fused_shared_experts=shared,
        kernel=FlashInferKernel(references.ReferenceLibrary()),
        routing_form=RoutingForm.PRECOMPUTED,
        dtype=torch.bfloat16,
    )


def static_scales(layer: FusedMoE) -> FusedMoE:
    """The layer with activation scales, where its format has them."""
    for name, parameter in layer.named_parameters():
        if name.endswith("input_scale"):
            parameter.data.fill_(0.03)
    return layer


STEP_FORMATS = (Bf16(), Fp8PerTensor(), MxFp8(), Nvfp4())


@pytest.mark.parametrize("quant", STEP_FORMATS, ids=lambda quant: quant.name)
def test_acceptance_44_skipped_slots_add_nothing(quant: Format) -> None:
    """vllm#47158, sglang#38773: -1 gives exactly 0, the real tokens their unpadded result."""
    experts = random_experts(16, 128, 128)
    x, logits = torch.randn(8, 128).bfloat16(), torch.randn(8, 16)
    padded = static_scales(through_references(Padded(), quant).loaded(experts))(x, logits)
    plain = static_scales(through_references(Renormalize(), quant).loaded(experts))
    assert torch.equal(padded[4:], torch.zeros_like(padded[4:]))
    assert torch.equal(padded[:4], plain(x[:4], logits[:4]))


@pytest.mark.parametrize("quant", STEP_FORMATS, ids=lambda quant: quant.name)
def test_acceptance_49_and_50_fused_shared_experts(quant: Format) -> None:
    """Ids E to E + s - 1 once per token with weight 1; equal to the experts run by themselves."""
    experts = random_experts(18, 128, 128)
    x, logits = torch.randn(8, 128).bfloat16(), torch.randn(8, 16)
    build = through_references(RenormalizeNaive(), quant, shared=2)
    fused = static_scales(build.loaded(experts))(x, logits)
    routed = _part(experts, range(16))
    shared = _part(experts, range(16, 18))
    alone = static_scales(through_references(RenormalizeNaive(), quant).loaded(routed))(x, logits)
    every = through_references(Everyone(), quant, num_experts=4)
    twice = oracle.Experts(
        up=torch.cat((shared.up, shared.up)),
        down=torch.cat((shared.down, shared.down)),
        gate=None if shared.gate is None else torch.cat((shared.gate, shared.gate)),
    )
    beside = static_scales(every.loaded(twice))(x, torch.zeros(8, 4))
    assert relative_error(fused.float(), (alone.double() + beside.double())) < 3 * 2**-9


def _part(experts: oracle.Experts, numbers: range) -> oracle.Experts:
    chosen = list(numbers)
    assert experts.gate is not None
    return oracle.Experts(
        up=experts.up[chosen], down=experts.down[chosen], gate=experts.gate[chosen]
    )


@final
@attrs.frozen(kw_only=True)
class Everyone(RoutingStrategy):
    """Experts 0 and 1 with weight 1 for every token, as shared experts are."""

    @property
    @override
    def name(self) -> str:
        return "Everyone"

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        del e_score_correction_bias
        ids = torch.arange(shape.top_k).expand(router_logits.shape[0], -1).int()
        return Routed(topk_ids=ids, topk_weights=torch.ones(ids.shape))


@pytest.mark.parametrize("tokens", [1, 4, 5, 8, 16, 17, 256, 257])
@pytest.mark.parametrize("quant", STEP_FORMATS, ids=lambda quant: quant.name)
def test_acceptance_57_token_counts(quant: Format, tokens: int) -> None:
    """vllm#43223: no T changes what a token gets; each row is the row of a larger batch."""
    layer = static_scales(
        through_references(RenormalizeNaive(), quant).loaded(random_experts(16, 128, 128))
    )
    x, logits = torch.randn(1025, 128).bfloat16(), torch.randn(1025, 16)
    whole, part = layer(x, logits), layer(x[:tokens], logits[:tokens])
    # The sums of a matrix product are ordered by its size: one bfloat16 step.
    assert relative_error(part, whole[:tokens].double()) < 2**-8
