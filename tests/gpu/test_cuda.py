"""The same answers on a CUDA device, and inside a CUDA graph. Skipped where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.recorded_flashinfer import RecordedLibrary, fill
from typed_moe import (
    BiasedSigmoid,
    BiasRule,
    DeepSeekV3,
    Default,
    FlashInferKernel,
    FusedMoE,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    ReferenceKernel,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    ScaledSoftmax,
    Sigmoid,
    SigmoidRenorm,
    SqrtSoftplus,
    TopK,
    TopKSigmoid,
    UnsupportedRouting,
)
from typed_moe.config import FORMATS, FormatName

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]

STRATEGIES: tuple[RoutingStrategy, ...] = (
    Default(),
    Renormalize(),
    RenormalizeNaive(),
    TopK(),
    Sigmoid(),
    TopKSigmoid(),
    SigmoidRenorm(),
    Llama4(),
    DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
    DeepSeekV3(routed_scaling_factor=2.827),
    MiniMax2(),
    SqrtSoftplus(routed_scaling_factor=1.5),
    BiasedSigmoid(num_expert_group=8, topk_group=4),
    ScaledSoftmax(norm_topk_prob=True, routed_scaling_factor=2.0),
    GroupedSoftmax(num_expert_group=8, topk_group=3, group_score="max", norm_topk_prob=False),
)
EXPERTS = 256


def _shape(strategy: RoutingStrategy) -> RoutingShape:
    return RoutingShape(num_experts=EXPERTS, top_k=1 if strategy.name == "Llama4" else 8)


def _inputs(strategy: RoutingStrategy, tokens: int) -> tuple[Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(7)
    logits = 2.0 * torch.randn(tokens, EXPERTS, generator=generator)
    bias = 0.3 * torch.randn(EXPERTS, generator=generator)
    return logits, bias if strategy.bias is BiasRule.REQUIRED else None


def _cuda(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cuda()


def _by_id(routed: Routed) -> tuple[Tensor, Tensor]:
    order = routed.topk_ids.cpu().argsort(dim=-1)
    return routed.topk_ids.cpu().gather(1, order), routed.topk_weights.cpu().gather(1, order)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_routing_equals_the_cpu(strategy: RoutingStrategy) -> None:
    """A CUDA device chooses the experts that the CPU chooses, with its weights to 1e-6."""
    logits, bias = _inputs(strategy, 2048)
    shape = _shape(strategy)
    on_cpu = strategy.select_experts(logits, bias, shape=shape)
    on_cuda = strategy.select_experts(logits.cuda(), _cuda(bias), shape=shape)
    (ids, weights), (cuda_ids, cuda_weights) = _by_id(on_cpu), _by_id(on_cuda)
    decided = (ids == cuda_ids).all(dim=-1)
    # Devices round exp differently, so a row whose last two scores differ by one unit in the
    # last place may differ; there are a handful at most in 2048.
    assert int((~decided).sum()) <= 4
    torch.testing.assert_close(cuda_weights[decided], weights[decided], rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=repr)
def test_acceptance_43_capture_at_8_replay_with_3_garbage_rows(strategy: RoutingStrategy) -> None:
    """Real rows of a replayed graph are bit-identical to eager, whatever the padding holds."""
    logits, bias = _inputs(strategy, 8)
    shape, static = _shape(strategy), logits.cuda()
    cuda_bias = _cuda(bias)
    strategy.select_experts(static, cuda_bias, shape=shape)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = strategy.select_experts(static, cuda_bias, shape=shape)
    fresh = _inputs(strategy, 16)[0][8:].cuda()
    fresh[5], fresh[6], fresh[7] = torch.nan, torch.inf, -torch.inf
    static.copy_(fresh)
    graph.replay()
    eager = strategy.select_experts(fresh[:5].clone(), cuda_bias, shape=shape)
    assert torch.equal(captured.topk_ids[:5], eager.topk_ids)
    assert torch.equal(captured.topk_weights[:5], eager.topk_weights)
    assert bool((captured.topk_weights[[5, 7]] == 0).all())


@pytest.mark.parametrize("name", sorted(FORMATS))
@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
def test_layer_equals_the_cpu(name: FormatName, form: RoutingForm) -> None:
    """The reference kernel gives on a CUDA device what it gives on the CPU, in every format."""
    torch.backends.cuda.matmul.allow_tf32 = False
    layer = FusedMoE(
        num_experts=8,
        top_k=2,
        hidden_size=256,
        intermediate_size=128,
        routing=DeepSeekV3(num_expert_group=2, topk_group=1, routed_scaling_factor=2.5),
        quant=FORMATS[name],
        kernel=ReferenceKernel(),
        routing_form=form,
    )
    generator = torch.Generator().manual_seed(1)
    weights = [("e_score_correction_bias", 0.1 * torch.randn(8, generator=generator))]
    for expert in range(8):
        for projection, rows, columns in (
            ("gate_proj", 128, 256),
            ("up_proj", 128, 256),
            ("down_proj", 256, 128),
        ):
            matrix = torch.randn(rows, columns, generator=generator) / columns**0.5
            weights.append((f"{expert}.{projection}.weight", matrix))
    layer.load_weights(weights)
    x, logits = torch.randn(32, 256, generator=generator), torch.randn(32, 8, generator=generator)
    layer.calibrate(x, logits)
    on_cpu = layer(x, logits)
    on_cuda = layer.cuda()(x.cuda(), logits.cuda()).cpu()
    assert layer.plan.request.device.type == "cuda"
    # An intermediate on a rounding border may fall to the other side: one step of the format.
    relative = float((on_cuda - on_cpu).norm() / on_cpu.norm())
    assert relative < (1e-5 if name == "unquantized" else 1e-2)


def test_a_cuda_layer_runs_the_reference_kernel_only_when_asked() -> None:
    """Slow float32 PyTorch never runs on a GPU unnoticed."""
    with pytest.raises(UnsupportedRouting, match="only when asked for"):
        FusedMoE(
            num_experts=8,
            top_k=2,
            hidden_size=64,
            intermediate_size=64,
            routing=RenormalizeNaive(),
            device="cuda",
        )


def test_a_layer_on_the_current_device() -> None:
    """`cuda` without an index is the device that tensors made on it have."""
    layer = FusedMoE(
        num_experts=8,
        top_k=2,
        hidden_size=64,
        intermediate_size=64,
        routing=RenormalizeNaive(),
        kernel=ReferenceKernel(),
        device="cuda",
    )
    for parameter in layer.parameters():
        parameter.data.normal_()
    x, logits = torch.randn(3, 64, device="cuda"), torch.randn(3, 8, device="cuda")
    assert layer(x, logits).device == x.device
    layer.to("cuda")
    assert layer(x, logits).isfinite().all()


@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("name", sorted(set(FORMATS) - {"unquantized"}))
def test_a_flashinfer_call_can_be_captured(name: FormatName, form: RoutingForm) -> None:
    """What a replayed graph gives the kernel is what an eager call gives it.

    The kernel itself is left out: everything before it has to be capturable, and to follow its
    inputs.
    """
    library = RecordedLibrary("0.7.2.post1")
    layer = FusedMoE(
        num_experts=16,
        top_k=2,
        hidden_size=256,
        intermediate_size=256,
        routing=Default() if name == "mxint4" else RenormalizeNaive(),
        quant=FORMATS[name],
        kernel=FlashInferKernel(library),
        routing_form=form,
        device="cuda",
        dtype=torch.bfloat16,
    )
    fill(layer)
    layer.prepare_weights()
    x, logits = torch.randn(8, 256, device="cuda").bfloat16(), torch.randn(8, 16, device="cuda")
    layer(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer(x, logits)
    captured = library.calls[-1][1]
    x.normal_()
    logits.normal_()
    graph.replay()
    layer(x, logits)
    eager = library.calls[-1][1]
    for argument, value in eager.items():
        for mine, theirs in zip(_tensors(captured[argument]), _tensors(value), strict=True):
            assert torch.equal(_bytes(mine), _bytes(theirs)), argument


def _tensors(value: object) -> tuple[Tensor, ...]:
    values = value if isinstance(value, tuple) else (value,)
    return tuple(one for one in values if isinstance(one, Tensor))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


@pytest.mark.parametrize("hidden_size", [256, 192])
def test_inductor_compiles_a_layer(hidden_size: int) -> None:
    """With torch's own backend, which looks at strides; a padded kernel's output is cut."""
    library = RecordedLibrary("0.7.2.post1")
    x = torch.randn(32, hidden_size, device="cuda").bfloat16()
    logits = torch.randn(32, 16, device="cuda")
    for kernel in (ReferenceKernel(), FlashInferKernel(library)):
        layer = FusedMoE(
            num_experts=16,
            top_k=2,
            hidden_size=hidden_size,
            intermediate_size=128,
            routing=RenormalizeNaive(),
            quant=FORMATS["bf16"],
            kernel=kernel,
            device="cuda",
            dtype=torch.bfloat16,
        )
        for parameter in layer.parameters():
            parameter.data.normal_(std=0.05)
        layer.prepare_weights()
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True)
        assert torch.equal(compiled(x, logits), layer(x, logits))
