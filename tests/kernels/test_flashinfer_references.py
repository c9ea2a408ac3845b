"""Whole layers through FlashInfer's argument building and FlashInfer's own references.

The oracle of the value is float64 on the stored (dequantised) weights and activations; what is
between them and the result is our arguments, FlashInfer's reading of them, and one rounding to
bfloat16. An oracle nobody here wrote says that a layer's call means what the layer means.
"""

from __future__ import annotations

from dataclasses import replace

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import CASES, Case, sized
from tests.layer.build import Build, random_experts, relative_error
from typed_moe import (
    Bf16,
    BiasedSigmoid,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    FusedMoE,
    GroupedSoftmax,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Renormalize,
    RoutingForm,
    Swiglu,
    SwigluStep,
)
from typed_moe.config import Activation
from typed_moe.kernels import FlashInferKernel
from typed_moe.quantization import (
    Quantized,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
)

pytest.importorskip("flashinfer", reason="FlashInfer's references are the oracle here")

from typed_moe.testing._flashinfer_references import ReferenceLibrary

HIDDEN, WIDTH, TOKENS = 256, 128, 24
ROUNDING = 2**-9 + 1e-5
"""Relative error of one rounding to bfloat16, 2^-9 at most, with float32 sums beside it."""


@attrs.frozen
class Covered:
    """A format and activation whose references follow what is under test."""

    quant: Format
    activation: Activation = attrs.field(factory=Swiglu)
    unit_scales: bool = False

    @property
    def width(self) -> int:
        """int4 comes in blocks of 256."""
        return 256 if isinstance(self.quant, MxInt4) else WIDTH

    @property
    def id(self) -> str:
        """For pytest."""
        kind = self.quant.activation if isinstance(self.quant, MxFp4) else self.activation.name
        return f"{self.quant.name}-{kind}"


STEP = SwigluStep(limit=1.5)
FROM_LOGITS = (
    Covered(Fp8BlockScale()),
    Covered(MxFp8(), STEP),
    Covered(MxFp4()),
    Covered(MxFp4(activation="mxfp8")),
    Covered(Nvfp4(), unit_scales=True),
    Covered(Nvfp4(), STEP),
)
WEIGHTED = (
    Covered(Bf16(), STEP),
    Covered(Fp8PerTensor()),
    Covered(Fp8PerTensor(), STEP),
    Covered(MxFp8(), STEP),
    Covered(Nvfp4(), STEP),
)
UNIFORM = (
    Covered(Bf16()),
    Covered(Fp8BlockScale()),
    Covered(MxFp4()),
    Covered(MxFp4(activation="mxfp8")),
    Covered(Nvfp4(), unit_scales=True),
)
METHODS = ("Default", "Renormalize", "RenormalizeNaive", "TopK", "DeepSeekV3")


def _small(case: Case) -> Case:
    """16 experts; groups become 4 of 4, 2 kept; Llama4 keeps its top_k of 1."""
    strategy, rule = case.strategy, case.rule
    if isinstance(strategy, DeepSeekV3 | BiasedSigmoid | GroupedSoftmax):
        grouped = rule.num_expert_group > 1
        groups = (4, 2) if grouped else (1, 1)
        rule = replace(rule, num_expert_group=groups[0], topk_group=groups[1])
        strategy = attrs.evolve(strategy, num_expert_group=groups[0], topk_group=groups[1])
    if isinstance(strategy, DeepSeekV3):
        strategy = attrs.evolve(strategy, correction_bias_dtype=torch.bfloat16)
    return sized(attrs.evolve(case, strategy=strategy, rule=rule), 16, min(case.top_k, 2))


SMALL = [_small(case) for case in CASES]


@attrs.frozen(eq=False)
class Prepared:
    """A loaded layer on the references, and what its stored tensors stand for."""

    layer: FusedMoE
    library: ReferenceLibrary
    experts: oracle.Experts
    x: Tensor
    read: Tensor
    logits: Tensor
    bias: Tensor | None
    act: oracle.Act

    def expected(self, rule: oracle.Rule, top_k: int, *, uniform: bool = False) -> Tensor:
        """(T, H) float64."""
        routing = oracle.route(rule, self.logits, self.bias, top_k)
        assert bool(routing.decided.all())
        weights = torch.full_like(routing.weights, 1 / top_k) if uniform else routing.weights
        return oracle.moe(self.experts, self.read, routing.ids, weights, self.act)


def prepared(
    covered: Covered, case: Case, form: RoutingForm, sizes: tuple[int, int] | None = None
) -> Prepared:
    """The layer of a case in a format, before its first call."""
    hidden, width = (HIDDEN, covered.width) if sizes is None else sizes
    library = ReferenceLibrary()
    build = Build(
        routing=case.strategy,
        num_experts=case.num_experts,
        top_k=case.top_k,
        hidden_size=hidden,
        intermediate_size=width,
        quant=covered.quant,
        activation=covered.activation,
        kernel=FlashInferKernel(library),
        routing_form=form,
        dtype=torch.bfloat16,
    )
    bias = case.bias()
    # Exact in bfloat16, which the grouped kernel rounds it to.
    bias = None if bias is None else bias.bfloat16().float()
    layer = build.loaded(random_experts(case.num_experts, hidden, width), bias)
    x, logits = torch.randn(TOKENS, hidden).bfloat16(), torch.randn(TOKENS, case.num_experts)
    _set_static_scales(layer, unit=covered.unit_scales)
    act = oracle.Act()
    if isinstance(covered.activation, SwigluStep):
        act = oracle.Act(kind="swiglu_step", limit=covered.activation.limit)
    return Prepared(
        layer=layer,
        library=library,
        experts=_stored(layer, covered.quant),
        x=x,
        read=_as_read(layer, x, covered.quant),
        logits=logits,
        bias=bias,
        act=act,
    )


def _set_static_scales(layer: FusedMoE, *, unit: bool) -> None:
    """Scales that nothing derives from the weights, so that mixing two of them up shows."""
    names = {name for name, _ in layer.named_parameters()}
    if "w13_input_scale" in names:
        layer.get_parameter("w13_input_scale").data.fill_(1.0 if unit else 0.0117)
        layer.get_parameter("w2_input_scale").data.fill_(1.0 if unit else 0.0321)
    if unit:
        layer.get_parameter("w13_weight_scale_2").data.fill_(1.0)
        layer.get_parameter("w2_weight_scale_2").data.fill_(1.0)


def _stored(layer: FusedMoE, quant: Format) -> oracle.Experts:
    matrices = []
    for prefix in ("w13", "w2"):
        tensors = dict(layer.named_parameters())
        scale = tensors.get(f"{prefix}_weight_scale_inv", tensors.get(f"{prefix}_weight_scale"))
        stored = Quantized(
            data=tensors[f"{prefix}_weight"].data,
            scale=scale,
            global_scale=tensors.get(f"{prefix}_weight_scale_2"),
        )
        matrices.append(dequantize_weight(stored, quant).clone())
    gate, up = matrices[0].chunk(2, dim=1)
    return oracle.Experts(gate=gate, up=up, down=matrices[1])


def _as_read(layer: FusedMoE, x: Tensor, quant: Format) -> Tensor:
    scale = dict(layer.named_parameters()).get("w13_input_scale")
    return dequantize_activation(quantize_activation(x, quant, input_scale=scale), quant)


@pytest.mark.parametrize(
    "case", [c for c in SMALL if c.strategy.name in METHODS], ids=lambda one: one.id
)
@pytest.mark.parametrize("covered", FROM_LOGITS, ids=lambda one: one.id)
def test_from_logits(covered: Covered, case: Case) -> None:
    """Methods 0 to 5 in the kernel, end to end."""
    made = prepared(covered, case, RoutingForm.IN_KERNEL)
    got = made.layer(made.x, made.logits)

    uniform = case.strategy.name == "TopK"
    expected = made.expected(case.rule, case.top_k, uniform=uniform)
    assert relative_error(got, expected) < ROUNDING
    ((entry, arguments),) = made.library.calls
    assert not entry.endswith("_routed_moe")
    assert arguments["routing_logits"] is made.logits


def test_int4_from_logits() -> None:
    """Values, scales and their layouts; the reference knows Default alone."""
    (case,) = (c for c in SMALL if c.strategy.name == "Default")
    made = prepared(Covered(MxInt4()), case, RoutingForm.IN_KERNEL)
    got = made.layer(made.x, made.logits)

    assert relative_error(got, made.expected(case.rule, case.top_k)) < ROUNDING
    ((entry, _),) = made.library.calls
    assert entry == "trtllm_mxint4_block_scale_moe"


@pytest.mark.parametrize("case", [c for c in SMALL if not c.rule.on_input], ids=lambda one: one.id)
@pytest.mark.parametrize("covered", WEIGHTED, ids=lambda one: one.id)
def test_precomputed(covered: Covered, case: Case) -> None:
    """Every strategy, its weights followed by the reference."""
    made = prepared(covered, case, RoutingForm.PRECOMPUTED)
    got = made.layer(made.x, made.logits)

    limit = ROUNDING
    if isinstance(covered.quant, Fp8PerTensor):
        limit += 2**-9  # The reference reads packed weights.
    assert relative_error(got, made.expected(case.rule, case.top_k)) < limit
    ((entry, arguments),) = made.library.calls
    assert entry.endswith("_routed_moe")
    assert arguments["routing_method_type"] == made.library.number("RoutingMethodType", "TopK")


@pytest.mark.parametrize("case", [c for c in SMALL if not c.rule.on_input], ids=lambda one: one.id)
@pytest.mark.parametrize("covered", UNIFORM, ids=lambda one: one.id)
def test_precomputed_ids(covered: Covered, case: Case) -> None:
    """Every strategy's ids; the weights are looked at in the arguments."""
    made = prepared(covered, case, RoutingForm.PRECOMPUTED)
    got = made.layer(made.x, made.logits)
    expected = made.expected(case.rule, case.top_k, uniform=True)

    assert relative_error(got, expected) < ROUNDING
    ((_, arguments),) = made.library.calls
    given = arguments["topk_ids"]
    assert isinstance(given, tuple)
    weights = oracle.weights_of(case.rule, made.logits, given[0])
    torch.testing.assert_close(given[1].double(), weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("covered", [*UNIFORM, *WEIGHTED], ids=lambda one: one.id)
def test_llama4_weights_the_input(covered: Covered) -> None:
    """Outside the kernel, before the activations are quantised; the kernel is given weight 1."""
    (case,) = (c for c in SMALL if c.rule.on_input)
    made = prepared(covered, case, RoutingForm.PRECOMPUTED)
    got = made.layer(made.x, made.logits)
    routing = oracle.route(case.rule, made.logits, None, 1)
    weighted = (made.x.float() * routing.weights.float()).bfloat16()
    read = _as_read(made.layer, weighted, covered.quant)
    ones = torch.ones_like(routing.weights)
    expected = oracle.moe(made.experts, read, routing.ids, ones, made.act)

    assert relative_error(got, expected) < ROUNDING + 2**-9


PADDED = (*(one for one in (*UNIFORM, *WEIGHTED) if not isinstance(one.quant, Fp8BlockScale)),)


@pytest.mark.parametrize("covered", PADDED, ids=lambda one: one.id)
@pytest.mark.parametrize("sizes", [(160, 96), (288, 128), (128, 32)], ids=str)
def test_widths_that_are_padded(sizes: tuple[int, int], covered: Covered) -> None:
    """gpt-oss's 2880 in small: zeros behind both widths change nothing, and are cut off."""
    (case,) = (c for c in SMALL if c.strategy.name == "RenormalizeNaive")
    made = prepared(covered, case, RoutingForm.PRECOMPUTED, sizes)
    got = made.layer(made.x, made.logits)
    expected = made.expected(case.rule, case.top_k, uniform=covered in UNIFORM)

    assert got.shape == (TOKENS, sizes[0])
    assert relative_error(got, expected) < ROUNDING + 2**-9
    ((_, arguments),) = made.library.calls
    assert arguments["intermediate_size"] == covered.width


@pytest.mark.parametrize("sizes", [(256, 128), (160, 96)], ids=str)
def test_gpt_oss_experts_with_biases(sizes: tuple[int, int]) -> None:
    """MXFP4 with biases on both matrices, which lie in the weights' row order."""
    hidden, width = sizes
    library = ReferenceLibrary()
    build = Build(
        routing=Renormalize(),
        num_experts=16,
        top_k=4,
        hidden_size=hidden,
        intermediate_size=width,
        quant=MxFp4(activation="mxfp8"),
        has_bias=True,
        kernel=FlashInferKernel(library),
        dtype=torch.bfloat16,
    )
    experts = random_experts(16, hidden, width, biases=True)
    layer = build.loaded(experts)
    stored = _stored(layer, build.quant)
    stored = replace(
        stored,
        gate_bias=experts.gate_bias,
        up_bias=experts.up_bias,
        down_bias=experts.down_bias,
    )
    x, logits = torch.randn(TOKENS, hidden).bfloat16(), torch.randn(TOKENS, 16)
    read = _as_read(layer, x, build.quant)
    got = layer(x, logits)

    routing = oracle.route(oracle.RULES["Renormalize"], logits, None, 4)
    expected = oracle.moe(stored, read, routing.ids, routing.weights, oracle.Act())
    assert layer.plan.form is RoutingForm.IN_KERNEL
    assert relative_error(got, expected) < ROUNDING
