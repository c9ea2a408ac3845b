"""Kernels of installed libraries in the plan: what they take, and the choice by what was measured.

No GPU, no Triton, no library: `tests/kernels/test_deep_gemm.py` runs what stands around the library's
products in Triton's interpreter, `tests/gpu/test_deep_gemm.py` all of it on a card.
"""

from __future__ import annotations

import math

import attrs
import pytest
import torch
from torch import Tensor

from tests.kernels.build import from_logits
from tests.kernels.grouped_products import ContractProducts
from tests.layer.build import Build, random_experts
from typed_moe import (
    Bf16,
    BySizeKernel,
    DeepGemmKernel,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    MxFp4,
    Placement,
    Refused,
    RenormalizeNaive,
    RoutingForm,
    RoutingShape,
    Swiglu,
    Unfinalized,
    UnfinalizedRules,
    Unquantized,
    UnsupportedRouting,
)
from typed_moe.kernels import (
    Bf16MoeArgs,
    ExpertArgs,
    ExpertWeights,
    FromLogits,
    KernelRequest,
    MoeArgs,
    Precomputed,
    Routing,
    deep_gemm,
    rows_per_expert,
    triton_experts,
)
from typed_moe.kernels._measured import Choice, MeasuredLayer, choose
from typed_moe.kernels.deep_gemm import DEEP_GEMM_RULES
from typed_moe.quantization import Quantized
from typed_moe.routing import KernelRules, as_global_ids
from typed_moe.runners import _planning, _providers
from typed_moe.runners._planning import decide

CARD = "NVIDIA H100 80GB HBM3"
REQUEST = KernelRequest(
    shape=RoutingShape(num_experts=32, top_k=4),
    quant=Fp8BlockScale(),
    activation=Swiglu(),
    placement=Placement(),
    hidden_size=1024,
    intermediate_size=512,
    num_fused_shared_experts=0,
    has_bias=False,
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
)


def measured(times: dict[int, tuple[float, float]]) -> MeasuredLayer:
    """Microseconds by T: of the Triton kernels, and of DeepGEMM's."""
    return MeasuredLayer(
        card=CARD,
        format="fp8_block",
        model="a-model",
        num_experts=32,
        top_k=4,
        hidden_size=1024,
        intermediate_size=512,
        microseconds={
            tokens: {"triton": ours, "deep_gemm": theirs}
            for tokens, (ours, theirs) in times.items()
        },
        source="sgl-deep-gemm 0.1.5, 2026-11-23",
    )


FASTER_FROM_512 = measured({64: (50, 90), 512: (100, 90), 4096: (800, 600)})


# --- the choice -----------------------------------------------------------------------------------


def test_it_is_taken_from_the_least_size_on_that_was_faster() -> None:
    """Rows per expert stand for T; and the sentence has the numbers of that size, card and date."""
    choice = choose("deep_gemm", REQUEST, (FASTER_FROM_512,), CARD)
    assert isinstance(choice, Choice)
    assert choice.least_rows == 512 * 4 / 32
    assert choice.why == (
        "deep_gemm is faster from T * k / E = 64 rows per expert on: 90 us against 100 with triton at "
        "T = 512 of a-model (NVIDIA H100 80GB HBM3, sgl-deep-gemm 0.1.5, 2026-11-23)"
    )


def test_at_every_size() -> None:
    """No number of rows is too few where one token was measured."""
    choice = choose("deep_gemm", REQUEST, (measured({1: (50, 40), 512: (100, 90)}),), CARD)
    assert isinstance(choice, Choice)
    assert choice.least_rows == 0
    assert "at every size: 40 us against 50" in choice.why


@pytest.mark.parametrize(
    ("times", "least"),
    [
        ({4096: (800, 600)}, 4096),
        ({64: (50, math.inf), 512: (100, 90), 4096: (800, 600)}, 512),
        ({64: (50, 40), 512: (100, math.inf), 4096: (800, 600)}, 4096),
    ],
    ids=["one size alone", "wrong at the least", "wrong between"],
)
def test_nothing_below_what_was_right(times: dict[int, tuple[float, float]], least: int) -> None:
    """Sizes that were not measured, or where it was wrong or failed, are the Triton kernels'."""
    choice = choose("deep_gemm", REQUEST, (measured(times),), CARD)
    assert isinstance(choice, Choice)
    assert choice.least_rows == least * 4 / 32


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({512: (100, 90), 4096: (800, math.inf)}, "it was wrong or failed at T = 4096"),
        ({512: (100, 110), 4096: (800, 900)}, "900 us against 800 with triton at T = 4096"),
        ({512: (100, 50), 4096: (800, 900)}, "900 us against 800 with triton at T = 4096"),
        ({512: (100, 98)}, "98 us against 100"),
    ],
    ids=[
        "wrong at the largest",
        "slower",
        "slower at the largest",
        "no more than the clock's noise",
    ],
)
def test_where_it_is_not_faster(times: dict[int, tuple[float, float]], said: str) -> None:
    """What is slower at the largest size is not taken at a smaller one."""
    refused = choose("deep_gemm", REQUEST, (measured(times),), CARD)
    assert isinstance(refused, Refused)
    assert said in refused.reason


@pytest.mark.parametrize(
    "layer",
    [
        attrs.evolve(FASTER_FROM_512, card="NVIDIA H200"),
        attrs.evolve(FASTER_FROM_512, format="bf16"),
        attrs.evolve(FASTER_FROM_512, hidden_size=2048),
        attrs.evolve(FASTER_FROM_512, intermediate_size=1024),
        attrs.evolve(
            FASTER_FROM_512, microseconds={512: {"triton": 100.0}, 4096: {"deep_gemm": 1.0}}
        ),
    ],
    ids=["card", "format", "hidden_size", "intermediate_size", "one kernel alone"],
)
def test_where_nothing_was_measured(layer: MeasuredLayer) -> None:
    """Another card, format or width; or no size with both kernels."""
    assert choose("deep_gemm", REQUEST, (layer,), CARD) is None


def test_widths_are_this_ranks() -> None:
    """A shard over the intermediate size has half of its width, and another number of experts is the same."""
    request = attrs.evolve(
        REQUEST,
        intermediate_size=1024,
        placement=Placement(tp_size=2),
        shape=RoutingShape(num_experts=256, top_k=8),
    )
    choice = choose("deep_gemm", request, (FASTER_FROM_512,), CARD)
    assert isinstance(choice, Choice)
    assert choice.least_rows == 64


def test_the_first_layer_that_says_something_counts() -> None:
    """A user's own times stand before the built-in ones."""
    own = measured({64: (50, 90), 4096: (800, 600)})
    choice = choose("deep_gemm", REQUEST, (own, FASTER_FROM_512), CARD)
    assert isinstance(choice, Choice)
    assert choice.least_rows == 4096 * 4 / 32


# --- the plan -------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hopper card with the library: Triton runs there, FlashInfer's kernels do not."""
    monkeypatch.setattr(triton_experts, "fused_routing_refusal", lambda _device: None)
    monkeypatch.setattr(
        _planning, "installed_flashinfer", lambda _device: Refused("Blackwell only")
    )
    monkeypatch.setattr(deep_gemm, "installed_deep_gemm", ContractProducts)
    monkeypatch.setattr(_providers, "card_of", lambda _device: CARD)
    monkeypatch.setattr(_providers, "measured_layers", lambda _card: (FASTER_FROM_512,))
    monkeypatch.setattr(_providers, "find_spec", lambda _name: object())


@pytest.mark.usefixtures("card")
def test_the_plan_says_which_kernel_and_why() -> None:
    """Ours for few rows, the library's for many, in one plan with the measured numbers."""
    decision = decide(REQUEST, RenormalizeNaive())
    kernel = decision.kernel
    assert isinstance(kernel, BySizeKernel)
    assert (kernel.few.name, kernel.many.name) == ("triton", "deep_gemm")
    assert decision.plan.kernel == "triton, deep_gemm from 64 rows per expert on"
    assert decision.plan.form is RoutingForm.IN_KERNEL
    assert not decision.plan.degraded
    (taken,) = [one for one in decision.plan.candidates if one.taken]
    assert taken.kernel == decision.plan.kernel
    assert "90 us against 100 with triton at T = 512 of a-model" in taken.reason


@pytest.mark.usefixtures("card")
def test_in_both_forms() -> None:
    """Precomputed routing takes the same kernel, with the same reason."""
    plan = decide(REQUEST, RenormalizeNaive(), form=RoutingForm.PRECOMPUTED).plan
    assert plan.kernel == "triton, deep_gemm from 64 rows per expert on"
    (taken,) = [one for one in plan.candidates if one.taken]
    assert taken.form is RoutingForm.PRECOMPUTED
    assert "it was asked for; deep_gemm is faster from" in taken.reason


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Refused("is not installed; pip install sgl-deep-gemm"), "deep_gemm is not installed; pip"),
        (ContractProducts(refused="there is no nvcc"), "deep_gemm there is no nvcc"),
    ],
    ids=["not installed", "cannot run"],
)
def test_it_falls_back_with_the_reason(
    library: object, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Triton kernels run, and the plan says what would be faster."""
    monkeypatch.setattr(deep_gemm, "installed_deep_gemm", lambda: library)
    plan = decide(REQUEST, RenormalizeNaive()).plan
    assert plan.kernel == "triton"
    (refused,) = [one for one in plan.candidates if "deep_gemm" in one.kernel]
    assert not refused.taken
    assert refused.reason.startswith(said)
    assert "90 us against 100" in refused.reason


@pytest.mark.usefixtures("card")
def test_where_it_was_measured_to_be_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan has the numbers against it."""
    slower = (measured({512: (100, 110)}),)
    monkeypatch.setattr(_providers, "measured_layers", lambda _card: slower)
    plan = decide(REQUEST, RenormalizeNaive()).plan
    assert plan.kernel == "triton"
    assert "is not faster: 110 us against 100 with triton at T = 512" in str(plan)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("there", [True, False])
def test_where_nothing_was_measured_ours_is_taken(
    monkeypatch: pytest.MonkeyPatch, *, there: bool
) -> None:
    """Where the library is installed the plan says how to find out."""
    monkeypatch.setattr(_providers, "measured_layers", lambda _card: ())
    monkeypatch.setattr(_providers, "find_spec", lambda _name: object() if there else None)
    text = str(decide(REQUEST, RenormalizeNaive()).plan)
    assert "taken    triton" in text
    assert ("layer --kernel triton --kernel deep_gemm --json times.json" in text) is there
    assert ("TYPED_MOE_TIMES=times.json" in text) is there


@pytest.mark.usefixtures("card")
def test_a_format_that_it_has_no_product_for_is_not_mentioned() -> None:
    """No line about a library that has nothing to do with the layer."""
    plan = decide(attrs.evolve(REQUEST, quant=MxFp4()), RenormalizeNaive()).plan
    assert "deep_gemm" not in str(plan)


@pytest.mark.usefixtures("card")
def test_it_is_asked_for_by_name() -> None:
    """At every size, whatever was measured."""
    plan = decide(REQUEST, DeepSeekV3(), kernel=DeepGemmKernel()).plan
    assert plan.kernel == "deep_gemm"


# --- what it takes --------------------------------------------------------------------------------


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (
            attrs.evolve(REQUEST, quant=MxFp4()),
            "multiplies bf16, unquantized, fp8_block; this layer's format is mxfp4",
        ),
        (
            attrs.evolve(REQUEST, quant=Unquantized(), dtype=torch.float16),
            "this layer's are torch.float16; pass dtype=torch.bfloat16",
        ),
        (attrs.evolve(REQUEST, has_bias=True), "adds no expert biases; this layer has them"),
        (
            attrs.evolve(REQUEST, intermediate_size=192),
            "multiples of 128 in the format fp8_block; this layer has hidden_size 1024 and, on",
        ),
        (
            attrs.evolve(REQUEST, quant=Bf16(), hidden_size=1000),
            "multiples of 64 in the format bf16; this layer has hidden_size 1000",
        ),
        (
            attrs.evolve(REQUEST, placement=Placement(tp_size=8)),
            "on this rank, intermediate_size 64",
        ),
        (
            attrs.evolve(REQUEST, num_fused_shared_experts=1, placement=Placement(ep_size=2)),
            "added once per rank; run them unfused",
        ),
    ],
    ids=["format", "dtype", "bias", "width", "bf16 width", "shard", "shared"],
)
def test_refusals(request_: KernelRequest, reason: str) -> None:
    """When the layer is made, with the numbers."""
    refused = DeepGemmKernel().rules(request_)
    assert isinstance(refused, Refused)
    assert reason in refused.reason


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name: a sentence that says what to install."""
    monkeypatch.setattr(deep_gemm, "find_spec", lambda _name: None)
    deep_gemm.installed_deep_gemm.cache_clear()
    try:
        with pytest.raises(UnsupportedRouting, match="is not installed; pip install sgl-deep-gemm"):
            decide(REQUEST, RenormalizeNaive(), kernel=DeepGemmKernel())
    finally:
        deep_gemm.installed_deep_gemm.cache_clear()


def test_a_matrix_that_the_card_cannot_copy() -> None:
    """Weights that start between two multiples of 16 bytes, as a view of a loaded file may."""
    loose = torch.zeros(2 * 64 * 64 + 1, dtype=torch.bfloat16)[1:].view(2, 64, 64)
    given = ExpertWeights(w13_weight=loose, w2_weight=loose.clone())
    with pytest.raises(ValueError, match=r"w13_weight starts at .* pass w13_weight.clone\(\)"):
        DeepGemmKernel().prepare(given, REQUEST)


# --- one of two by size ---------------------------------------------------------------------------


@attrs.frozen(kw_only=True)
class Told:
    """A kernel whose output is its number; it takes every layer."""

    name: str
    number: float
    rearranges: bool = False
    rows_dtype: torch.dtype = torch.bfloat16

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        return DEEP_GEMM_RULES

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        if self.rearranges:
            return ExpertWeights(w13_weight=weights.w13_weight, w2_weight=weights.w2_weight)
        return weights

    def __call__(self, args: MoeArgs, /) -> Tensor:
        return torch.tensor(self.number)

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        return UnfinalizedRules(rows_dtype=self.rows_dtype, weights_dtype=torch.float32)

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        number = torch.tensor(self.number)
        return Unfinalized(
            gemm2_output=number, expert_weights=number, expanded_idx_to_permuted_idx=number
        )

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        return Quantized(data=torch.tensor(self.number), scale=None)


def record(tokens: int, routing: Routing, *, shared: int = 0) -> MoeArgs:
    """Of 32 experts, four for each token."""
    nothing = torch.zeros(1)
    return Bf16MoeArgs(
        routing=routing,
        experts=ExpertArgs(
            num_experts=32,
            top_k=4,
            intermediate_size=64,
            local_expert_offset=0,
            local_num_experts=32,
            activation_type="Swiglu",
            num_fused_shared_experts=shared,
        ),
        hidden_states=torch.zeros(tokens, 64),
        gemm1_weights=nothing,
        gemm2_weights=nothing,
    )


def logits(tokens: int) -> Routing:
    """Routing by the kernel."""
    return from_logits(torch.zeros(tokens, 32))


def ids(tokens: int, slots: int) -> Routing:
    """Routing before it."""
    chosen = torch.zeros(tokens, slots, dtype=torch.int32)
    return Precomputed(topk_ids=as_global_ids(chosen), topk_weights=torch.zeros(tokens, slots))


def test_rows_per_expert() -> None:
    """Slots over experts; shared experts are slots of every token, and experts."""
    assert rows_per_expert(record(256, logits(256))) == 32
    assert rows_per_expert(record(256, ids(256, 4))) == 32
    assert rows_per_expert(record(256, logits(256), shared=2)) == 256 * 6 / 34
    assert rows_per_expert(record(256, ids(256, 6), shared=2)) == 256 * 6 / 34


FEW, MANY = Told(name="few", number=1.0), Told(name="many", number=2.0)


@pytest.mark.parametrize(("tokens", "number"), [(1, 1.0), (255, 1.0), (256, 2.0), (4096, 2.0)])
def test_each_size_has_its_kernel(tokens: int, number: float) -> None:
    """With the sum and without it; from the limit on."""
    kernel = BySizeKernel(few=FEW, many=MANY, least_rows=32)
    args = record(tokens, logits(tokens))
    assert float(kernel(args)) == number
    assert float(kernel.unfinalized(args).gemm2_output) == number


def test_one_for_every_size() -> None:
    """It has that kernel's name, and runs it for a single token."""
    kernel = BySizeKernel(few=FEW, many=MANY, least_rows=0)
    assert kernel.name == "many"
    assert float(kernel(record(1, logits(1)))) == 2.0


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
def test_no_tokens_call_no_kernel(form: RoutingForm, monkeypatch: pytest.MonkeyPatch) -> None:
    """T = 0 is the runners' own, with the sum and without: a library's products have no empty size."""

    def called(*_: object, **__: object) -> Tensor:
        raise AssertionError("a kernel was called with T = 0")

    for name in ("__call__", "unfinalized", "quantize"):
        monkeypatch.setattr(Told, name, called)
    pair = BySizeKernel(few=FEW, many=MANY, least_rows=0)
    layer = Build(
        routing=RenormalizeNaive(),
        hidden_size=128,
        intermediate_size=128,
        quant=Fp8BlockScale(),
        routing_form=form,
        kernel=pair,
        dtype=torch.bfloat16,
    ).loaded(random_experts(8, 128, 128))
    x, logits = torch.empty(0, 128).bfloat16(), torch.empty(0, 8)
    output = layer(x, logits)
    assert (output.shape, output.dtype) == ((0, 128), torch.bfloat16)
    assert layer.forward_unfinalized(x, logits).expanded_idx_to_permuted_idx.numel() == 0
    with pytest.raises(AssertionError, match="called with T = 0"):
        layer(torch.zeros(1, 128).bfloat16(), torch.zeros(1, 8))


def test_weights_serve_both_as_they_are() -> None:
    """A kernel that would have them otherwise is no half of a pair: there would be two copies."""
    given = ExpertWeights(w13_weight=torch.zeros(1), w2_weight=torch.zeros(1))
    assert BySizeKernel(few=FEW, many=MANY, least_rows=32).prepare(given, REQUEST) is given
    other = attrs.evolve(MANY, rearranges=True)
    with pytest.raises(ValueError, match="many rearranges the weights"):
        BySizeKernel(few=FEW, many=other, least_rows=32).prepare(given, REQUEST)


def test_rows_before_the_sum_have_one_dtype() -> None:
    """The plan names it once, for every size."""
    pair = BySizeKernel(few=FEW, many=MANY, least_rows=32)
    assert pair.unfinalized_rules(REQUEST, FromLogits) == FEW.unfinalized_rules(REQUEST, FromLogits)
    other = attrs.evolve(MANY, rows_dtype=torch.float32)
    refused = BySizeKernel(few=FEW, many=other, least_rows=32).unfinalized_rules(
        REQUEST, FromLogits
    )
    assert isinstance(refused, Refused)
