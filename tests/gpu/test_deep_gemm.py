"""DeepGEMM's products in our layer on a Hopper card: against the oracle, and against themselves.

It compiles a kernel for each size, two seconds or more each: `pytest -n 8` does so side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import attrs
import pytest
import torch

from tests.gpu.library import deep_gemm_absent
from tests.gpu.test_triton_experts import (
    EXPERTS,
    HIDDEN,
    TOP_K,
    WIDTH,
    Name,
    check_skipped_slots,
    expected,
    local,
    stored,
)
from tests.kernels.build import from_logits, precomputed
from tests.kernels.grouped_products import ROUNDING, product_bound
from tests.layer.build import random_experts, relative_error, separate
from typed_moe import (
    Bf16,
    BySizeKernel,
    DeepGemmKernel,
    Fp8BlockScale,
    FusedMoE,
    RenormalizeNaive,
    RoutingForm,
    TritonKernel,
)
from typed_moe.kernels._measured import MeasuredLayer
from typed_moe.runners import _providers

ABSENT = deep_gemm_absent()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(ABSENT is not None, reason=str(ABSENT))]

TOKENS = (1, 64, 1024)


BOUNDS: dict[Name, float] = {
    "bf16": product_bound(Bf16()),
    "fp8_block": product_bound(Fp8BlockScale()),
}
NAMES = pytest.mark.parametrize("name", ["bf16", "fp8_block"])


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN and large integers, so that nothing left over passes for a result."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    assert bool(torch.empty(7, device="cuda", dtype=torch.bfloat16).isnan().all())
    yield
    torch.use_deterministic_algorithms(mode=False)


@NAMES
@pytest.mark.parametrize("activation", ["swiglu", "swiglu-gpt-oss", "relu2"])
def test_every_form_and_size(name: Name, activation: str) -> None:
    """Within the format's bound of float64 on the same stored values, and the same bits again."""
    layer, (routing, output) = stored(name, activation), expected(name, activation)
    for tokens in TOKENS:
        for given in (
            precomputed(routing.ids[:tokens].cuda(), routing.weights[:tokens].cuda()),
            from_logits(layer.logits[:tokens].cuda(), "RenormalizeNaive"),
        ):
            record = layer.record(given, tokens)
            got = DeepGemmKernel()(record)
            assert got.dtype is torch.bfloat16
            error = relative_error(got.cpu(), output[:tokens])
            assert error < BOUNDS[name], f"{tokens} tokens, {type(given).__name__}: {error}"
            assert torch.equal(DeepGemmKernel()(record), got)


@NAMES
def test_acceptance_46_shards_add_up(name: Name) -> None:
    """The ranks' parts are the whole; a token with no expert of a rank gets zeros there."""
    layer, (routing, output) = stored(name, "swiglu"), expected(name, "swiglu")
    tokens, count = 200, EXPERTS // 2
    ids = routing.ids[:tokens]
    total = torch.zeros(tokens, HIDDEN)
    for rank in range(2):
        here = range(rank * count, (rank + 1) * count)
        given = from_logits(layer.logits[:tokens].cuda(), "RenormalizeNaive")
        part = DeepGemmKernel()(local(layer, given, tokens, here)).float().cpu()
        elsewhere = ~((ids >= here.start) & (ids < here.stop)).any(1)
        assert bool((part[elsewhere] == 0).all())
        total += part
    # Two partial sums, each rounded to bfloat16.
    error = relative_error(total, output[:tokens])
    assert error < math.sqrt(BOUNDS[name] ** 2 + 2 * ROUNDING), error


@pytest.mark.parametrize("tokens", [3, 1024])
def test_skipped_slots_and_unfinalized(tokens: int) -> None:
    """As the Triton kernels' own."""
    check_skipped_slots(DeepGemmKernel(), tokens, BOUNDS["bf16"])


PAIR = BySizeKernel(few=TritonKernel(), many=DeepGemmKernel(), least_rows=16)
"""Triton at 8 tokens, which are 2 rows per expert; the library's at 300, which are 75."""
FORMATS = pytest.mark.parametrize("quant", [Bf16(), Fp8BlockScale()], ids=repr)


def layer_on_card(quant: Bf16 | Fp8BlockScale, kernel: BySizeKernel | None) -> FusedMoE:
    """A layer with random experts, on the pair, or on what the plan takes."""
    torch.manual_seed(5)
    layer = FusedMoE(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        routing=RenormalizeNaive(),
        quant=quant,
        kernel=kernel,
        device="cuda",
        dtype=torch.bfloat16,
    )
    layer.load_weights(separate(random_experts(EXPERTS, HIDDEN, WIDTH)))
    return layer


@FORMATS
@pytest.mark.parametrize("tokens", [8, 300])
def test_acceptance_43_replay_equals_eager(quant: Bf16 | Fp8BlockScale, tokens: int) -> None:
    """A graph captured at T, replayed with garbage behind the real rows: the same bits."""
    layer = layer_on_card(quant, PAIR)
    x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
    logits = torch.randn(tokens, EXPERTS, device="cuda")
    layer(x, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer(x, logits)
    real = tokens - 3
    fresh_x, fresh = torch.randn_like(x), torch.randn_like(logits)
    fresh_x[real:], fresh[real:] = torch.nan, torch.nan
    x.copy_(fresh_x)
    logits.copy_(fresh)
    captured.fill_(torch.nan)
    graph.replay()
    eager = layer(fresh_x, fresh)
    assert bool(captured[:real].isfinite().all())
    assert torch.equal(captured[:real], eager[:real])


@FORMATS
def test_torch_compile(quant: Bf16 | Fp8BlockScale) -> None:
    """`fullgraph=True`: the custom operator gives the eager call's values, in either half.

    In FP8 the input is quantised by inductor's code there, and by a launch of ours otherwise. The values are
    float8 times a group's power of two, so that none lies at a rounding border: both give the same bytes,
    and scales that differ in the last bit at most. The bound is for the few values of the intermediate that this
    moves across a border; one wrong scale of a group gives more.
    """
    layer = layer_on_card(quant, PAIR)
    layer.prepare_weights()
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for tokens in (8, 300):
        x = on_the_grid(tokens)
        logits = torch.randn(tokens, EXPERTS, device="cuda")
        eager = layer(x, logits)
        error = relative_error(compiled(x, logits), eager.double())
        assert error < (1e-6 if isinstance(quant, Bf16) else 1e-3), error


def on_the_grid(tokens: int) -> torch.Tensor:
    """(T, H) bfloat16 whose groups of 128 are a power of two times float8 values up to 448, 448 among them."""
    values = (torch.randn(tokens, HIDDEN, device="cuda") * 128).clamp(-448, 448)
    values[:, ::128] = 448
    return (values.to(torch.float8_e4m3fn).float() * 2.0**-7).bfloat16()


def test_the_plan_takes_it_by_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half of the layer is bit for bit the kernel that the plan names for that size."""
    measured = MeasuredLayer(
        card=torch.cuda.get_device_name(),
        format="fp8_block",
        model="told",
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        microseconds={8: {"triton": 1.0, "deep_gemm": 2.0}, 64: {"triton": 9.0, "deep_gemm": 8.0}},
        source="told",
    )
    monkeypatch.setattr(_providers, "measured_layers", lambda _card: (measured,))
    layer = layer_on_card(Fp8BlockScale(), None)
    assert layer.plan.kernel == "triton, deep_gemm from 16 rows per expert on"
    assert layer.plan.form is RoutingForm.IN_KERNEL
    assert "8 us against 9 with triton at T = 64 of told" in str(layer.plan)
    for kernel, tokens in ((TritonKernel(), 8), (DeepGemmKernel(), 300)):
        alone = layer_on_card(Fp8BlockScale(), attrs.evolve(PAIR, few=kernel, many=kernel))
        x = torch.randn(tokens, HIDDEN, device="cuda").bfloat16()
        logits = torch.randn(tokens, EXPERTS, device="cuda")
        assert torch.equal(layer(x, logits), alone(x, logits))
