"""What a layer keeps between calls: layouts, runners, copies; none of it may go stale silently."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import attrs
import pytest
import torch
from torch import Tensor, nn

from tests.kernels.recorded_flashinfer import RecordedLibrary
from tests.layer.build import Build, random_experts, separate
from typed_moe import (
    Bf16,
    FlashInferKernel,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    FusedMoE,
    KernelRules,
    Llama4,
    MxFp8,
    Nvfp4,
    ReferenceKernel,
    Refused,
    Renormalize,
    RenormalizeNaive,
    RoutingForm,
    Swiglu,
    SwigluStep,
    UnsupportedRouting,
)
from typed_moe.kernels import ExpertWeights, KernelRequest, MoeArgs

WIDE = Build(
    routing=RenormalizeNaive(),
    num_experts=8,
    hidden_size=128,
    intermediate_size=128,
    quant=Bf16(),
    dtype=torch.bfloat16,
)
X, LOGITS = torch.randn(3, 128).bfloat16(), torch.randn(3, 8)


def recorded(build: Build) -> tuple[FusedMoE, RecordedLibrary]:
    """A loaded layer whose FlashInfer calls are kept."""
    library = RecordedLibrary("0.7.2.post1")
    layer = attrs.evolve(build, kernel=FlashInferKernel(library)).loaded(
        random_experts(
            build.num_experts + build.num_fused_shared_experts,
            build.hidden_size,
            build.intermediate_size,
        )
    )
    for name, parameter in layer.named_parameters():
        if name.endswith("input_scale"):
            parameter.data.fill_(0.25)
    return layer, library


def sent(library: RecordedLibrary, name: str) -> Tensor:
    """A tensor of the last call."""
    value = library.calls[-1][1][name]
    assert isinstance(value, Tensor)
    return value


def test_a_parameter_assigned_after_the_layout_is_refused() -> None:
    """It would be as stored, and the kernel would read it as shuffled."""
    layer, _ = recorded(WIDE)
    stored = layer.get_parameter("w13_weight").detach().clone()
    layer(X, LOGITS)
    with pytest.raises(ValueError, match="a parameter that is assigned is as stored"):
        layer.w13_weight = nn.Parameter(stored, requires_grad=False)


def test_loading_again_after_the_layout() -> None:
    """New weights go in by load_weights, whatever the layout was."""
    layer, library = recorded(WIDE)
    layer(X, LOGITS)
    first = sent(library, "gemm1_weights").clone()
    layer.load_weights(separate(random_experts(8, 128, 128)))
    layer(X, LOGITS)
    assert not torch.equal(sent(library, "gemm1_weights"), first)
    assert sent(library, "gemm1_weights").shape == first.shape


@pytest.mark.parametrize(
    "what",
    [
        lambda layer: layer.state_dict(),
        lambda layer: layer.calibrate(X, LOGITS),
        lambda layer: layer.to("meta"),
    ],
    ids=["state dict", "calibrate", "move"],
)
def test_what_reads_weights_as_stored_is_refused(what: Callable[[FusedMoE], object]) -> None:
    """With the sentence that says what to do; a move to where it is is none."""
    layer, _ = recorded(attrs.evolve(WIDE, quant=Nvfp4()))
    layer(X, LOGITS)
    layer.to("cpu")
    with pytest.raises(ValueError, match="load them again with load_weights"):
        what(layer)


def test_an_assigned_state_dict_is_left_as_it_was() -> None:
    """Two layers of one dict: the first one's layout must not be the second one's weights."""
    source, _ = recorded(WIDE)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    kept = {name: tensor.clone() for name, tensor in state.items()}
    calls = []
    for _ in range(2):
        layer, library = recorded(WIDE)
        layer.load_state_dict(state, assign=True)
        layer(X, LOGITS)
        calls.append(sent(library, "gemm1_weights"))
    assert torch.equal(calls[0], calls[1])
    assert all(torch.equal(state[name], tensor) for name, tensor in kept.items())


@attrs.define
class Failing:
    """A kernel whose preparation stops half way."""

    kernel: FlashInferKernel
    fail: bool = True

    @property
    def name(self) -> str:
        return self.kernel.name

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        return self.kernel.rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        if self.fail:
            weights.w13_weight.data[0].zero_()
            raise RuntimeError("out of memory")
        return self.kernel.prepare(weights, request)

    def __call__(self, args: MoeArgs, /) -> Tensor:
        return self.kernel(args)


def test_a_preparation_that_failed_is_not_taken_up_again() -> None:
    """Some experts have the layout and some have not."""
    kernel = Failing(FlashInferKernel(RecordedLibrary("0.7.2.post1")))
    layer = attrs.evolve(WIDE, kernel=kernel).loaded(random_experts(8, 128, 128))
    with pytest.raises(RuntimeError, match="out of memory"):
        layer(X, LOGITS)
    kernel.fail = False
    with pytest.raises(ValueError, match="an unfinished preparation"):
        layer(X, LOGITS)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_their_own_layers_also_compiled(how: str) -> None:
    """A compiled copy runs its own kernel and its own biases."""
    build = attrs.evolve(WIDE, kernel=ReferenceKernel(), has_bias=True)
    layer = build.loaded(random_experts(8, 128, 128, biases=True))
    layer(X, LOGITS)
    other = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    for parameter in other.parameters():
        parameter.data.mul_(0.5)
    other.prepare_weights()
    del layer
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, LOGITS), other(X, LOGITS))


def test_a_flashinfer_layer_can_be_pickled() -> None:
    """Before a call and after one."""
    layer, library = recorded(WIDE)
    for _ in range(2):
        twin = copy.deepcopy(layer)
        twin(X, LOGITS)
        layer(X, LOGITS)
    kernel = pickle.loads(pickle.dumps(FlashInferKernel(library)))
    assert kernel.name == "flashinfer 0.7.2.post1"


def test_compiling_before_the_weights_were_looked_at() -> None:
    """The sentence names what to call."""
    layer = attrs.evolve(WIDE, kernel=ReferenceKernel()).loaded(random_experts(8, 128, 128))
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match=r"prepare_weights\(\) before torch\.compile"):
        compiled(X, LOGITS)


@pytest.mark.parametrize("quant", [Fp8PerTensor(), Nvfp4()], ids=lambda quant: quant.name)
def test_nothing_is_computed_in_the_first_call(quant: Format) -> None:
    """Under CUDA graph capture it would stay uncomputed outside the graph."""
    layer, library = recorded(attrs.evolve(WIDE, quant=quant, activation=SwigluStep(limit=7.0)))
    layer.prepare_weights()
    for _ in range(2):
        layer(X, LOGITS)
    limits = [call[1]["gemm1_clamp_limit"] for call in library.calls]
    assert limits[0] is limits[1]


def test_output_scales_are_float32_whatever_the_default() -> None:
    """Serving engines load with bfloat16 as the default dtype."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        layer, library = recorded(attrs.evolve(WIDE, quant=Fp8PerChannel()))
        layer(X, LOGITS)
    finally:
        torch.set_default_dtype(torch.float32)
    for name in ("output1_scale_scalar", "output1_scale_gate_scalar", "output2_scale_scalar"):
        assert sent(library, name).dtype is torch.float32


@pytest.mark.parametrize(
    "quant", [Fp8PerTensor(), Fp8PerChannel(), MxFp8()], ids=lambda quant: quant.name
)
def test_transposed_activations_are_made_contiguous(quant: Format) -> None:
    """Elementwise quantisation keeps strides, and the kernel reads a pointer."""
    layer, library = recorded(attrs.evolve(WIDE, quant=quant))
    layer(torch.randn(128, 3).bfloat16().T, LOGITS)
    assert sent(library, "hidden_states").is_contiguous()


def test_outputs_of_other_dtypes_are_copied() -> None:
    """FlashInfer writes bfloat16 alone."""
    layer, library = recorded(attrs.evolve(WIDE, quant=Fp8BlockScale()))
    x = X.half()
    output = torch.ones_like(x)
    assert layer(x, LOGITS, output=output) is output
    assert not output.any()
    assert "output" not in library.calls[-1][1]


@pytest.mark.parametrize("quant", [Fp8BlockScale(), MxFp8()], ids=lambda quant: quant.name)
def test_shared_experts_keep_to_multiples_of_4(quant: Format) -> None:
    """The launcher checks num_experts % 4 in routed calls as well; DeepSeek-V3 has 256 + 1."""
    layer, library = recorded(attrs.evolve(WIDE, quant=quant, num_fused_shared_experts=1))
    layer(X, LOGITS)
    arguments = library.calls[-1][1]
    assert arguments["num_experts"] == 12
    assert arguments["local_num_experts"] == 9
    assert arguments["top_k"] == 3


def test_shared_experts_count_against_the_tiers() -> None:
    """top_k 32 and one shared slot are 33."""
    build = attrs.evolve(
        WIDE,
        num_experts=64,
        top_k=32,
        num_fused_shared_experts=1,
        kernel=FlashInferKernel(RecordedLibrary("0.7.2.post1")),
    )
    with pytest.raises(UnsupportedRouting, match="65 experts with top_k 33"):
        build.empty("meta")


def test_rounded_logits_are_in_the_plan() -> None:
    """FP8 per channel with Llama4 reads bfloat16 alone; strict refuses that."""
    build = attrs.evolve(WIDE, quant=Fp8PerChannel(), routing=Llama4(), top_k=1)
    layer, _ = recorded(build)
    assert layer.plan.form is RoutingForm.IN_KERNEL
    assert any("router logits are rounded" in reason for reason in layer.plan.degraded)


def test_a_switch_that_drops_swiglus_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """run_deepseek_da_body sets alpha, beta and the limit to null; off by default."""
    build = attrs.evolve(
        WIDE,
        routing=Renormalize(),
        quant=Fp8BlockScale(),
        activation=Swiglu(limit=10.0),
        routing_form=RoutingForm.PRECOMPUTED,
    )
    recorded(build)
    monkeypatch.setenv("FLASHINFER_DIST_AWARE_AUTOTUNE", "1")
    with pytest.raises(UnsupportedRouting, match="FLASHINFER_DIST_AWARE_AUTOTUNE=1"):
        recorded(build)


def test_a_calibration_that_failed_leaves_no_scale_behind() -> None:
    """1.0, which it starts from, would pass for a scale."""
    layer = attrs.evolve(WIDE, quant=Fp8PerTensor(), kernel=ReferenceKernel()).loaded(
        random_experts(8, 128, 128)
    )
    layer.calibrate(X, LOGITS)
    with pytest.raises(TypeError, match="router_logits is"):
        layer.calibrate(X, LOGITS.int())
    assert layer.get_parameter("w2_input_scale").isnan()
    with pytest.raises(ValueError, match="w2_input_scale hold NaN"):
        layer(X, LOGITS)
