"""Whole layers trace into one graph; the kernel's call is one operator in it."""

from __future__ import annotations

from collections.abc import Iterator

import attrs
import pytest
import torch
from torch import Tensor, nn
from typing_extensions import override

from tests.kernels.recorded_flashinfer import RecordedLibrary
from tests.layer.build import Build, random_experts
from typed_moe import (
    Bf16,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    FusedMoE,
    Llama4,
    MoeKernel,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    ReferenceKernel,
    RenormalizeNaive,
    RoutingForm,
    Unquantized,
)
from typed_moe.kernels import FlashInferKernel
from typed_moe.runners import KernelRunner

FORMATS = (
    Unquantized(),
    Bf16(),
    Fp8PerTensor(),
    Fp8PerChannel(),
    Fp8BlockScale(),
    MxFp8(),
    Nvfp4(),
    MxFp4(),
    MxInt4(),
)


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    """Every test compiles from nothing."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loaded(build: Build, bias: Tensor | None = None) -> FusedMoE:
    """With static scales, where the format has any, and ready for its first call."""
    experts = random_experts(build.num_experts, build.hidden_size, build.intermediate_size)
    layer = build.loaded(experts, bias)
    for name, parameter in layer.named_parameters():
        if name.endswith("input_scale"):
            parameter.data.fill_(0.05)
    layer.prepare_weights()
    return layer


def build(quant: Format, form: RoutingForm, kernel: MoeKernel | None = None) -> Build:
    """A small layer of whole blocks."""
    return Build(
        routing=RenormalizeNaive(),
        hidden_size=128,
        intermediate_size=128,
        quant=quant,
        kernel=kernel,
        routing_form=form,
        dtype=torch.bfloat16,
    )


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("quant", FORMATS, ids=lambda quant: quant.name)
def test_a_layer_is_one_graph(quant: Format, form: RoutingForm) -> None:
    """The same bits as without compilation, for every format and form."""
    layer = loaded(build(quant, form, ReferenceKernel()))
    x, logits = torch.randn(16, 128).bfloat16(), torch.randn(16, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")

    assert torch.equal(compiled(x, logits), layer(x, logits))


@pytest.mark.parametrize("quant", FORMATS[1:], ids=lambda quant: quant.name)
def test_a_flashinfer_layer_is_one_graph(quant: Format) -> None:
    """The call arrives as it does without compilation, every keyword."""
    library = RecordedLibrary("0.7.2.post1")
    layer = loaded(build(quant, RoutingForm.IN_KERNEL, FlashInferKernel(library)))
    x, logits = torch.randn(16, 128).bfloat16(), torch.randn(16, 8)
    layer(x, logits)
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x, logits)

    (entry, eager), (compiled_entry, compiled) = library.calls
    assert compiled_entry == entry
    assert compiled.keys() == eager.keys()
    for name, value in eager.items():
        other = compiled[name]
        if isinstance(value, Tensor):
            assert isinstance(other, Tensor)
            assert torch.equal(_bits(other), _bits(value)), name
        else:
            assert other == value, name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def test_the_number_of_tokens_is_dynamic() -> None:
    """One graph serves every T from 2 on."""
    layer = loaded(build(Fp8BlockScale(), RoutingForm.IN_KERNEL, ReferenceKernel()))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 7, 64):
        x, logits = torch.randn(tokens, 128).bfloat16(), torch.randn(tokens, 8)
        with torch.compiler.set_stance("default" if tokens == 2 else "fail_on_recompile"):
            assert torch.equal(compiled(x, logits), layer(x, logits))


def test_weights_on_the_input_and_a_bias() -> None:
    """Llama4's rows and DeepSeekV3's bias go through the operator as well."""
    x, logits = torch.randn(16, 128).bfloat16(), torch.randn(16, 8)
    made = build(Fp8BlockScale(), RoutingForm.PRECOMPUTED, ReferenceKernel())
    llama4 = loaded(attrs.evolve(made, routing=Llama4(), top_k=1))
    made = build(Bf16(), RoutingForm.IN_KERNEL, ReferenceKernel())
    strategy = DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)
    deepseek = loaded(attrs.evolve(made, routing=strategy), torch.randn(8))
    for layer in (llama4, deepseek):
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x, logits), layer(x, logits))


class Model(nn.Module):
    """Two layers, one after the other, as a compiled model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(128, 8, bias=False, dtype=torch.bfloat16)
        self.first = loaded(build(Bf16(), RoutingForm.IN_KERNEL))
        self.second = loaded(build(Nvfp4(), RoutingForm.PRECOMPUTED))

    @override
    def forward(self, hidden_states: Tensor) -> Tensor:
        """Residual experts."""
        hidden_states = hidden_states + self.first(hidden_states, self.gate(hidden_states))
        result: Tensor = hidden_states + self.second(hidden_states, self.gate(hidden_states))
        return result


@torch.no_grad()
def test_a_model_of_two_layers() -> None:
    """Each layer's operator finds its own kernel and settings."""
    model = Model()
    x = torch.randn(12, 128).bfloat16()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), model(x))


def test_the_operators_shape_and_schema() -> None:
    """torch's own check of a custom operator: schema, fake tensor, no aliasing."""
    layer = loaded(build(Bf16(), RoutingForm.IN_KERNEL))
    runner = layer.prepare_weights()
    assert isinstance(runner, KernelRunner)
    handle = runner._call._handle
    x, logits = torch.randn(5, 128).bfloat16(), torch.randn(5, 8)
    weights = [layer.get_parameter(name).data for name in ("w13_weight", "w2_weight")]
    operands = (logits, None, [x, *weights], handle, 128, 1)
    for operator, more in (
        (torch.ops.typed_moe.bf16_moe, (torch.bfloat16,)),
        (torch.ops.typed_moe.bf16_moe_unfinalized, (2, torch.float32, torch.float32)),
    ):
        torch.library.opcheck(
            operator.default, (*operands, *more), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    ("quant", "form"),
    [*((quant, RoutingForm.IN_KERNEL) for quant in FORMATS), (Bf16(), RoutingForm.PRECOMPUTED)],
    ids=lambda one: one.value if isinstance(one, RoutingForm) else one.name,
)
def test_unfinalized_rows_are_one_graph(quant: Format, form: RoutingForm) -> None:
    """Their number is known when the kernel has run; what is made of them is compiled all the same.

    Each format has an operator; the routing before it is the other tests', in both forms of every format.
    """
    layer = loaded(build(quant, form, ReferenceKernel()))

    def finished(x: Tensor, logits: Tensor) -> Tensor:
        return layer.forward_unfinalized(x, logits).finalize(x.dtype)

    compiled = torch.compile(finished, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (2, 7, 64):
        x, logits = torch.randn(tokens, 128).bfloat16(), torch.randn(tokens, 8)
        with torch.compiler.set_stance("default" if tokens == 2 else "fail_on_recompile"):
            assert torch.equal(compiled(x, logits), layer(x, logits))


def test_unfinalized_flashinfer_rows_are_one_graph() -> None:
    """float32 weights come back as they were given, which an operator may not do: it copies."""
    library = RecordedLibrary("0.7.2.post1")
    layer = loaded(build(Nvfp4(), RoutingForm.PRECOMPUTED, FlashInferKernel(library)))
    x, logits = torch.randn(16, 128).bfloat16(), torch.randn(16, 8)
    eager = layer.forward_unfinalized(x, logits)
    made = torch.compile(layer.forward_unfinalized, fullgraph=True, backend="aot_eager")(x, logits)

    assert torch.equal(made.expert_weights, eager.expert_weights)
    assert torch.equal(made.expanded_idx_to_permuted_idx, eager.expanded_idx_to_permuted_idx)
    assert torch.equal(made.gemm2_output.view(torch.int16), eager.gemm2_output.view(torch.int16))
