"""Ten FlashInfer releases: what is planned for each, and that every call binds there.

The signatures, defaults and enum numbers are the wheels' (`extract_signatures.py`). A layer is made
for every format, strategy and form, and called once; a keyword that the release's function lacks,
or one that is missing, raises.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import final

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests.acceptance.cases import CASES, Case, find, sized
from tests.kernels.recorded_flashinfer import RecordedLibrary, fill
from tests.kernels.signatures import VERSIONS, table
from tests.layer.build import Build, random_experts
from typed_moe import (
    Bf16,
    DeepSeekV3,
    FlashInferKernel,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    FusedMoE,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Placement,
    Refused,
    Relu2,
    Renormalize,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    Swiglu,
    SwigluStep,
    UnsupportedRouting,
)
from typed_moe.config import Activation
from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.kernels import installed_flashinfer
from typed_moe.kernels.flashinfer_versions import parse_version

FORMATS: tuple[Format, ...] = (
    Bf16(),
    Fp8PerTensor(),
    Fp8PerChannel(),
    Fp8BlockScale(),
    MxFp8(),
    Nvfp4(),
    MxFp4(),
    MxFp4(activation="mxfp8"),
    MxInt4(),
)
ACTIVATIONS: tuple[Activation, ...] = (
    Swiglu(),
    Swiglu(alpha=1.702, beta=1.0, limit=7.0),
    SwigluStep(limit=7.0),
    Relu2(),
)
NEWEST = VERSIONS[-1]


def build(case: Case, quant: Format, library: RecordedLibrary) -> Build:
    """A layer of 32 experts on a recorded release."""
    width = 256 if isinstance(quant, MxInt4) else 128
    return Build(
        routing=case.strategy,
        num_experts=32,
        top_k=min(case.top_k, 4),
        hidden_size=width,
        intermediate_size=width,
        quant=quant,
        kernel=FlashInferKernel(library),
        dtype=torch.bfloat16,
    )


def release(version: str) -> tuple[int, int, int]:
    """To compare."""
    parsed = parse_version(version)
    assert isinstance(parsed, tuple)
    return parsed


def run(made: Build, bias: Tensor | None) -> FusedMoE:
    """Fill it and call it once."""
    layer = made.empty()
    fill(layer)
    if bias is not None:
        layer.load_weights([("e_score_correction_bias", bias)])
    layer(torch.randn(3, made.hidden_size).bfloat16(), torch.randn(3, made.num_experts))
    return layer


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: repr(quant)[:-2])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_call_binds(version: str, quant: Format, form: RoutingForm) -> None:
    """Every strategy: called as the release takes it, or refused when the layer is made."""
    called = set()
    for published in CASES:
        case = sized(published, 32, min(published.top_k, 4))
        library = RecordedLibrary(version)
        try:
            run(attrs.evolve(build(case, quant, library), routing_form=form), case.bias())
        except UnsupportedRouting:
            assert not library.calls
            continue
        (call,) = library.calls
        called.add(case.strategy.name)
        _numbers_are_the_releases(version, *call)
    complete = (0, 7, 0) if isinstance(quant, Fp8PerChannel) else (0, 6, 18)
    if form is RoutingForm.PRECOMPUTED and release(version) >= complete:
        assert len(called) == 14
    if form is RoutingForm.IN_KERNEL and release(version) >= complete:
        assert called >= {"Default", "Renormalize", "RenormalizeNaive", "MiniMax2", "TopKSigmoid"}


def _numbers_are_the_releases(version: str, entry: str, arguments: dict[str, object]) -> None:
    numbers = table(version).enums
    methods = numbers["RoutingMethodType"]
    assert arguments["routing_method_type"] in methods.values()
    assert arguments["routing_method_type"] != methods.get("Unspecified")
    if "activation_type" in arguments:
        assert arguments["activation_type"] == numbers["ActivationType"]["Swiglu"]
    if entry.endswith("_routed_moe"):
        assert arguments["routing_method_type"] == methods["TopK"]
        for name in ("n_group", "topk_group", "routed_scaling_factor", "routing_bias"):
            assert arguments.get(name) is None


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: repr(quant)[:-2])
@pytest.mark.parametrize("version", VERSIONS)
def test_every_activation_binds(version: str, quant: Format, activation: Activation) -> None:
    """Told to the kernel by the release's own number, or refused; never dropped."""
    library = RecordedLibrary(version)
    made = attrs.evolve(build(find("Renormalize"), quant, library), activation=activation, top_k=4)
    try:
        run(made, None)
    except UnsupportedRouting:
        # Plain Swiglu is every format's in the newest releases; the others are docstrings' word.
        assert activation != Swiglu() or release(version) < (0, 7, 0)
        return
    ((_, arguments),) = library.calls
    name = type(activation).__name__
    if name != "Swiglu" or "activation_type" in arguments:
        assert arguments["activation_type"] == table(version).enums["ActivationType"][name]
    if isinstance(activation, Swiglu) and activation.limit is not None:
        for name, value in (("gemm1_alpha", 1.702), ("gemm1_beta", 1.0), ("gemm1_clamp_limit", 7)):
            tensor = arguments[name]
            assert isinstance(tensor, Tensor)
            assert tensor.tolist() == pytest.approx([value] * 32)


def test_the_step_limit_is_in_raw_units_where_the_epilogue_scales() -> None:
    """`core.py`: the limit divided by the gate's output scale; FP8 blocks take it as it is."""
    for quant in (Fp8PerTensor(), Nvfp4(), MxFp8()):
        library = RecordedLibrary(NEWEST)
        run(
            attrs.evolve(
                build(find("Renormalize"), quant, library), activation=SwigluStep(limit=7.0)
            ),
            None,
        )
        ((_, arguments),) = library.calls
        limit = arguments["gemm1_clamp_limit"]
        assert isinstance(limit, Tensor)
        scale = arguments.get(
            "output1_scales_gate_scalar", arguments.get("output1_scale_gate_scalar")
        )
        physical = limit * scale if isinstance(scale, Tensor) else limit
        torch.testing.assert_close(physical, torch.full((32,), 7.0))


@pytest.mark.parametrize("quant", [Fp8BlockScale(), Nvfp4()], ids=lambda quant: quant.name)
def test_fused_shared_experts_are_experts_to_a_kernel_that_is_given_ids(quant: Format) -> None:
    """S more experts, S more slots of weight 1, and no method that knows of them."""
    library = RecordedLibrary(NEWEST)
    made = attrs.evolve(build(find("Renormalize"), quant, library), num_fused_shared_experts=4)
    layer = run(made, None)

    assert layer.plan.form is RoutingForm.PRECOMPUTED
    ((_, arguments),) = library.calls
    assert arguments["num_experts"] == 36
    assert arguments["local_num_experts"] == 36
    assert arguments["top_k"] == 8
    given = arguments["topk_ids"]
    assert isinstance(given, tuple)
    assert given[0][:, 4:].tolist() == [[32, 33, 34, 35]] * 3
    assert given[1][:, 4:].tolist() == [[1.0] * 4] * 3


def test_expert_parallel_ranks_tell_their_range() -> None:
    """Global ids, and which of them are here."""
    library = RecordedLibrary(NEWEST)
    made = attrs.evolve(
        build(find("Renormalize"), Fp8BlockScale(), library),
        placement=Placement(ep_size=4, ep_rank=3),
    )
    run(made, None)
    ((_, arguments),) = library.calls
    names = ("num_experts", "local_expert_offset", "local_num_experts")
    assert [arguments[name] for name in names] == [32, 24, 8]


@pytest.mark.parametrize("version", VERSIONS)
def test_packed_weights_are_said_to_be_rounded(version: str) -> None:
    """Where a release takes id and weight in one word, the plan is degraded, and strict refuses."""
    library = RecordedLibrary(version)
    made = attrs.evolve(
        build(find("SqrtSoftplus"), Nvfp4(), library), routing_form=RoutingForm.PRECOMPUTED
    )
    layer = run(made, torch.zeros(32))
    ((_, arguments),) = library.calls
    given = arguments["topk_ids"]
    packed = isinstance(given, Tensor)
    assert packed == (release(version) < facts.TUPLE_IDS["fp4_block_scale"])
    assert packed == any("packed" in reason for reason in layer.plan.degraded)
    if packed:
        assert isinstance(given, Tensor)
        assert given.dtype is torch.int32
        assert ((given >> 16) >= 0).all()
        assert ((given >> 16) < 32).all()


@pytest.mark.parametrize(
    ("quant", "since"),
    [(MxInt4(), (0, 6, 13)), (Fp8PerChannel(), (0, 7, 0))],
    ids=["mxint4", "fp8_per_channel"],
)
def test_packed_words_in_every_release(quant: Format, since: tuple[int, int, int]) -> None:
    """The routed entry point has no tuple form."""
    for version in VERSIONS:
        library = RecordedLibrary(version)
        made = attrs.evolve(
            build(find("TopK"), quant, library), routing_form=RoutingForm.PRECOMPUTED
        )
        if release(version) < since:
            with pytest.raises(UnsupportedRouting, match=r"has no trtllm_\w+_routed_moe"):
                made.empty()
            continue
        layer = run(made, None)
        ((_, arguments),) = library.calls
        assert isinstance(arguments["topk_ids"], Tensor)
        assert any("packed" in reason for reason in layer.plan.degraded)


def test_per_channel_scales_go_with_their_rows() -> None:
    """(T, 1) and (L, rows) float32, and ones for the scales of whole experts."""
    library = RecordedLibrary(NEWEST)
    run(build(find("Renormalize"), Fp8PerChannel(), library), None)
    ((_, arguments),) = library.calls
    shapes = {
        "hidden_states_scale": (3, 1),
        "gemm1_per_channel_weight_scale": (32, 256),
        "gemm2_per_channel_weight_scale": (32, 128),
    }
    for name, shape in shapes.items():
        tensor = arguments[name]
        assert isinstance(tensor, Tensor)
        assert tensor.shape == shape
        assert tensor.dtype is torch.float32
        assert tensor.is_contiguous()
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        tensor = arguments[name]
        assert isinstance(tensor, Tensor)
        assert tensor.tolist() == [1.0] * 32


def test_llama4_per_channel_casts_the_logits_in_the_kernel_form() -> None:
    """float32 logits go as bfloat16, which is what the launcher checks for."""
    library = RecordedLibrary(NEWEST)
    (case,) = (one for one in CASES if one.strategy.name == "Llama4")
    run(build(sized(case, 32, 1), Fp8PerChannel(), library), None)
    ((entry, arguments),) = library.calls
    logits = arguments["routing_logits"]
    assert entry == "trtllm_fp8_per_channel_scale_moe"
    assert arguments["use_routing_scales_on_input"] is True
    assert isinstance(logits, Tensor)
    assert logits.dtype is torch.bfloat16


def test_int4_reads_no_float32_bias_where_that_would_be_wrong() -> None:
    """flashinfer#3898: bfloat16 biases alone before 0.6.18, where no biased method is routed."""
    for name, method in facts.METHODS.items():
        if method.rules.bias_dtypes:
            assert method.since >= (0, 6, 18), name


def test_packed_words_hold_ids_and_weights() -> None:
    """(id << 16) | bfloat16 bits, as FlashInfer's own decoder reads them."""
    templates = pytest.importorskip("flashinfer.trace.templates.moe")
    library = RecordedLibrary("0.6.12")
    made = attrs.evolve(build(find("TopK"), Fp8BlockScale(), library), top_k=4)
    layer = made.loaded(random_experts(32, 128, 128))
    logits = torch.randn(3, 32)
    layer(torch.randn(3, 128).bfloat16(), logits)
    ((_, arguments),) = library.calls
    ids, weights = templates._step_decode_precomputed_routing(arguments["topk_ids"])
    expected = logits.topk(4)
    assert torch.equal(ids, expected.indices)
    assert torch.equal(weights, expected.values.bfloat16().float())


@pytest.mark.parametrize(
    ("case", "since"), [(name, method.since) for name, method in facts.METHODS.items()]
)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_method_is_routed_in_the_kernel_from_its_release_on(
    version: str, case: str, since: tuple[int, int, int]
) -> None:
    """Before that it is routed precomputed, with the reason in the plan."""
    found = next(one for one in CASES if one.strategy.name == case)
    if isinstance(found.strategy, DeepSeekV3):
        found = find("DeepSeekV3-Kimi")
    quant = Fp8PerTensor() if case == "Llama4" else Nvfp4()
    library = RecordedLibrary(version)
    in_kernel = release(version) >= since
    if case == "Llama4" and not in_kernel:
        with pytest.raises(UnsupportedRouting, match="has no trtllm_fp8_per_tensor_scale_routed"):
            build(found, quant, library).empty()
        return
    plan = build(found, quant, library).empty().plan
    assert (plan.form is RoutingForm.IN_KERNEL) == in_kernel
    if not in_kernel:
        assert any("FlashInfer below" in reason for reason in plan.degraded)


def test_an_old_release() -> None:
    """Older than the table: a sentence that says which and what to do."""
    library = RecordedLibrary(NEWEST)
    old = attrs.evolve(library._table, version="0.4.1")
    library._table = old
    with pytest.raises(UnsupportedRouting, match=r"0\.4\.1 is older than 0\.5\.0; upgrade it"):
        build(find("Renormalize"), Nvfp4(), library).empty()


@pytest.mark.parametrize(
    ("quant", "change", "message"),
    [
        (
            Fp8BlockScale(),
            lambda made: attrs.evolve(made, intermediate_size=192),
            "hidden_size is 128 and intermediate_size per tensor-parallel rank 192",
        ),
        (
            Fp8PerChannel(),
            lambda made: attrs.evolve(made, activation=Swiglu(limit=7.0)),
            "has no gemm1_alpha, and the activation is",
        ),
        (
            Fp8PerChannel(),
            lambda made: attrs.evolve(made, has_bias=True),
            "has no gemm1_bias, and the experts have biases",
        ),
        (
            MxInt4(),
            lambda made: attrs.evolve(made, activation=Swiglu(limit=7.0)),
            "alpha, beta and the limit are left out by some of its tactics",
        ),
        (
            MxInt4(),
            lambda made: attrs.evolve(made, has_bias=True),
            "has no gemm1_bias, and the experts have biases",
        ),
        (
            Fp8BlockScale(),
            lambda made: attrs.evolve(made, num_experts=30),
            "a multiple of 4 experts, more than top_k",
        ),
        (
            Fp8BlockScale(),
            lambda made: attrs.evolve(made, activation=Relu2()),
            "runs Swiglu with fp8_block",
        ),
        (
            Nvfp4(),
            lambda made: attrs.evolve(made, activation=Swiglu(limit=7.0)),
            "in which units",
        ),
        (Fp8PerTensor(), lambda made: attrs.evolve(made, has_bias=True), "in which units"),
        (
            Bf16(),
            lambda made: attrs.evolve(made, has_bias=True),
            "has no gemm1_bias, and the experts have biases",
        ),
        (
            Nvfp4(),
            lambda made: attrs.evolve(made, num_experts=4096),
            "takes ids for up to 2048 experts",
        ),
    ],
)
def test_layers_that_no_entry_point_takes(
    quant: Format, change: Callable[[Build], Build], message: str
) -> None:
    """Refused when the layer is made, with the numbers; no C++ assertion is the first to notice."""
    made = change(build(find("Renormalize"), quant, RecordedLibrary(NEWEST)))
    with pytest.raises(UnsupportedRouting, match=message):
        made.empty("meta")


def test_a_release_that_lacks_a_methods_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name is looked up, never the number: without it the method is routed precomputed."""
    library = RecordedLibrary(NEWEST)
    number = library.number
    monkeypatch.setattr(
        library,
        "number",
        lambda enum, member: None if member == "Renormalize" else number(enum, member),
    )
    plan = build(find("Renormalize"), Nvfp4(), library).empty().plan
    assert plan.form is RoutingForm.PRECOMPUTED
    assert any("has no RoutingMethodType.Renormalize" in reason for reason in plan.degraded)


def test_a_release_that_lacks_every_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither form can name a method, so the layer is refused when it is made."""
    library = RecordedLibrary(NEWEST)
    monkeypatch.setattr(library, "number", lambda enum, member: None)
    with pytest.raises(UnsupportedRouting, match=r"has no RoutingMethodType\.TopK"):
        build(find("Renormalize"), Nvfp4(), library).empty()


@final
@attrs.frozen(kw_only=True)
class Views(RoutingStrategy):
    """int64 ids and float64 weights, both expanded."""

    @property
    @override
    def name(self) -> str:
        return "Views"

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        del e_score_correction_bias
        rows = router_logits.shape[0]
        ids = torch.arange(shape.top_k).expand(rows, -1)
        return Routed(topk_ids=ids, topk_weights=torch.ones(shape.top_k).double().expand(rows, -1))


@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: repr(quant)[:-2])
def test_kernels_are_given_contiguous_tensors_of_their_dtypes(quant: Format) -> None:
    """Strided logits and activations, and what a stranger's strategy may give."""
    for strategy in (Renormalize(), Views()):
        library = RecordedLibrary(NEWEST)
        made = attrs.evolve(build(find("Renormalize"), quant, library), routing=strategy)
        layer = run(made, None)
        library.calls.clear()
        wide, tall = torch.randn(3, 400).bfloat16(), torch.randn(32, 3)
        layer(wide[:, 8 : 8 + made.hidden_size], tall.T)
        ((_, arguments),) = library.calls
        for name, value in arguments.items():
            for tensor in value if isinstance(value, tuple) else (value,):
                assert not isinstance(tensor, Tensor) or tensor.is_contiguous(), name
        given = arguments.get("topk_ids")
        if isinstance(given, tuple):
            assert [tensor.dtype for tensor in given] == [torch.int32, torch.float32]


def test_an_environment_without_flashinfer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sentence with the command; nothing is imported until it is asked for."""
    monkeypatch.setitem(sys.modules, "typed_moe.kernels._flashinfer", None)
    with pytest.raises(UnsupportedRouting, match=r"pip install typed-moe\[flashinfer\]"):
        FlashInferKernel()
    absent = installed_flashinfer(torch.device("cuda"))
    assert isinstance(absent, Refused)
    assert "pip install" in absent.reason
