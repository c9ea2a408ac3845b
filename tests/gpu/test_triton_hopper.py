"""The persistent kernels of a Hopper card: against the oracle, and against themselves.

`test_triton_experts.py` has them too, at widths that their tiles divide, by way of the built-in table.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.gpu.test_triton_formats import changed, moved
from tests.kernels.build import RecordName, Sizes, from_logits, precomputed, record
from tests.layer.build import ACTIVATIONS, relative_error
from typed_moe import Bf16, Fp8BlockScale, Fp8PerTensor, TritonKernel
from typed_moe.kernels._expert_tiles import ExpertTile, GemmTile
from typed_moe.quantization import stored_error_bound

HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_HOPPER, reason="no CUDA device of compute capability 9.0"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton's interpreter is on"),
]

BOUNDS: dict[RecordName, float] = {
    "bf16": stored_error_bound(Bf16()),
    "fp8_block": stored_error_bound(Fp8BlockScale()),
    "fp8_per_tensor": stored_error_bound(Fp8PerTensor()),
}
SIZES = Sizes(experts=8, hidden=640, width=384, tokens=700, top_k=3)
"""Halves of a tile behind the last column in either product; blocks with one row, and with 128."""


def tile(name: RecordName, group_m: int = 2) -> ExpertTile:
    """Both products by the persistent kernel."""
    gemm = GemmTile(
        block_n=128,
        block_k=64 if name == "bf16" else 128,
        warps=8,
        stages=4,
        group_m=group_m,
        persistent=True,
    )
    return ExpertTile(block_m=128, first=gemm, second=gemm)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN and large integers, so that nothing left over passes for a result."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds of the products that the persistent kernels were launched for."""
    from typed_moe.kernels import _triton_hopper_launch

    launched: list[str] = []
    launch = _triton_hopper_launch._product

    def counted(*args: object, kind: str, **settings: object) -> None:
        launched.append(kind)
        launch(*args, kind=kind, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(_triton_hopper_launch, "_product", counted)
    return launched


def drawn(tokens: int = SIZES.tokens) -> tuple[Tensor, Tensor]:
    """Distinct ids of uneven experts, some of them -1, and weights."""
    favour = torch.linspace(0, 4, SIZES.experts)
    ids = (torch.randn(tokens, SIZES.experts) + favour).topk(SIZES.top_k).indices.int()
    ids[torch.rand(ids.shape) < 0.1] = -1
    return ids, torch.rand(ids.shape)


@pytest.mark.parametrize("name", sorted(BOUNDS))
@pytest.mark.parametrize("activation", ["swiglu", "swiglu-gpt-oss", "geglu", "relu2", "gelu"])
def test_every_format(name: RecordName, activation: str, products: list[str]) -> None:
    """Within the format's bound of float64, and the same bits again, in another order of the tiles too."""
    torch.manual_seed(7)
    made = record(name, ACTIVATIONS[activation][1], SIZES)
    ids, weights = drawn()
    wanted = oracle.moe(made.experts, made.x, ids, weights, made.act, rounding=made.rounding)
    args = moved(made.make(precomputed(ids.cuda(), weights.cuda())))
    got = TritonKernel(tile=tile(name))(args)
    assert relative_error(got.cpu(), wanted) < BOUNDS[name]
    assert torch.equal(TritonKernel(tile=tile(name))(args), got)
    assert torch.equal(TritonKernel(tile=tile(name, group_m=16))(args), got)
    assert len(products) == 6


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_the_weight_on_the_input(name: RecordName, products: list[str]) -> None:
    """Through an activation that is not linear."""
    torch.manual_seed(8)
    made = record(name, oracle.Act(), SIZES)
    logits = torch.randn(SIZES.tokens, SIZES.experts)
    chosen = oracle.route(oracle.RULES["Renormalize"], logits, None, SIZES.top_k)
    wanted = oracle.moe(
        made.experts,
        made.x,
        chosen.ids,
        chosen.weights,
        made.act,
        on_input=True,
        rounding=made.rounding,
    )
    args = moved(made.make(from_logits(logits.cuda(), on_input=True)))
    got = TritonKernel(tile=tile(name))(args)
    assert relative_error(got.cpu(), wanted) < BOUNDS[name]
    assert len(products) == 2


@pytest.mark.parametrize("kind", ["swiglu", "relu2"])
def test_biases(kind: oracle.Kind, products: list[str]) -> None:
    """Of both products; the gate's stand first."""
    torch.manual_seed(9)
    made = record("bf16", oracle.Act(kind=kind), SIZES)
    ids, weights = drawn()
    up, gate, down = (
        torch.randn(SIZES.experts, width) for width in (SIZES.width, SIZES.width, SIZES.hidden)
    )
    gated = made.experts.gate is not None
    experts = replace(made.experts, up_bias=up, gate_bias=gate if gated else None, down_bias=down)
    wanted = oracle.moe(experts, made.x, ids, weights, made.act, rounding=made.rounding)
    args = made.make(precomputed(ids.cuda(), weights.cuda()))
    first = torch.cat((gate, up), dim=1) if gated else up
    args = moved(
        replace(args, experts=changed(args.experts, {"gemm1_bias": first, "gemm2_bias": down}))
    )
    got = TritonKernel(tile=tile("bf16"))(args)
    assert relative_error(got.cpu(), wanted) < BOUNDS["bf16"]
    assert len(products) == 2


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_no_slot_at_all(name: RecordName, products: list[str]) -> None:
    """Every id is -1: zeros, and nothing is read from a block that there is not."""
    torch.manual_seed(10)
    made = record(name, oracle.Act(), SIZES)
    ids, weights = drawn()
    args = moved(made.make(precomputed(torch.full_like(ids, -1).cuda(), weights.cuda())))
    assert not bool(TritonKernel(tile=tile(name))(args).any())
    assert len(products) == 2


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_a_row_of_nan_stays_alone(name: RecordName, products: list[str]) -> None:
    """The first token's is in no other token's sum, nor in what stands at places without a slot."""
    torch.manual_seed(12)
    made = record(name, oracle.Act(), SIZES)
    ids, weights = drawn()
    ids[0] = torch.tensor([5, 6, 7])
    args = moved(made.make(precomputed(ids.cuda(), weights.cuda())))
    wanted = TritonKernel(tile=tile(name))(args)
    args.hidden_states[0] = torch.full_like(args.hidden_states[0].float(), torch.nan).to(
        args.hidden_states.dtype
    )
    got = TritonKernel(tile=tile(name))(args)
    assert bool(got[0].isnan().all())
    assert torch.equal(got[1:], wanted[1:])
    assert len(products) == 4


def test_a_sum_of_no_whole_steps_goes_elsewhere(products: list[str]) -> None:
    """A width of 352 is no multiple of a step of 64: the same tile, by the portable kernels."""
    torch.manual_seed(11)
    size = Sizes(experts=8, hidden=352, width=352, tokens=300, top_k=3)
    made = record("bf16", oracle.Act(), size)
    ids, weights = drawn(size.tokens)
    wanted = oracle.moe(made.experts, made.x, ids, weights, made.act, rounding=made.rounding)
    args = moved(made.make(precomputed(ids.cuda(), weights.cuda())))
    got = TritonKernel(tile=tile("bf16"))(args)
    assert relative_error(got.cpu(), wanted) < BOUNDS["bf16"]
    assert products == []
