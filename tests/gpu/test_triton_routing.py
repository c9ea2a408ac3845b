"""The fused routing kernel on a CUDA device: against the oracle, the strategies and itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import final

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests import oracle
from tests.acceptance import checks
from tests.acceptance.cases import CASES, Case, find, loosened, sized
from tests.acceptance.routes import fused_kernel
from tests.kernels.slots import expect_sorted
from tests.layer.build import Build, random_experts, relative_error
from typed_moe import (
    DeepSeekV3,
    Placement,
    ReferenceKernel,
    Renormalize,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
)
from typed_moe.kernels import FusedRouting, SortRequest, fused_routing, sort_slots

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton's interpreter is on"),
]
every = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
TOKENS = (1, 4, 5, 8, 16, 17, 256, 257, 1024, 1025, 5000)
"""On both sides of every border between ways of launching, here and in FlashInfer (57)."""
SIZES = ((8, 2), (60, 4), (128, 1), (160, 6), (257, 8), (512, 22), (896, 16), (2048, 32))


@final
class Own(RoutingStrategy):
    """A user's strategy: two members."""

    @property
    @override
    def name(self) -> str:
        """The name in plans."""
        return "Own"

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        """As `Renormalize`."""
        return Renormalize().select_experts(router_logits, e_score_correction_bias, shape=shape)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN and large integers, so that nothing left over passes for a result."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    assert bool(torch.empty(7, device="cuda").isnan().all())
    yield
    torch.use_deterministic_algorithms(mode=False)


def _fused(case: Case) -> FusedRouting:
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    made = fused_routing(case.strategy, shape=shape, device=torch.device("cuda"))
    assert isinstance(made, FusedRouting), made
    return made


def _cuda(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cuda()


@pytest.mark.parametrize(
    ("case", "number"),
    [
        pytest.param(case, number, id=f"{case.id}-{number}")
        for case in CASES
        for number in checks.checks_for(case)
    ],
)
def test_acceptance(case: Case, number: str) -> None:
    """The acceptance list's checks, 01 to 17 and 52 among them."""
    checks.checks_for(case)[number](case, fused_kernel)


def test_acceptance_06_saturated_sigmoids() -> None:
    """Saturated sigmoids tie and go to the lower id; the same logits do not."""
    checks.check_06_saturated(find("Sigmoid"), find("TopKSigmoid"), fused_kernel)


@pytest.mark.parametrize(("low", "high"), [(-104.0, -16.0), (88.0, 200.0), (-20.5, -19.5)])
def test_acceptance_07_08_sqrt_softplus_at_both_ends(low: float, high: float) -> None:
    """Without underflow or overflow."""
    checks.check_07_08_both_ends(find("SqrtSoftplus"), fused_kernel, low, high)


@every
@pytest.mark.parametrize("tokens", TOKENS)
def test_acceptance_57_every_tier(case: Case, tokens: int) -> None:
    """Gate-like logits at every T: decided rows' experts and every row's weights."""
    checks.check_selection(case, fused_kernel, torch.randn(tokens, case.num_experts), case.bias())


@every
@pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
def test_every_size(case: Case, num_experts: int, top_k: int) -> None:
    """What FlashInfer's tables refuse too: 2048 experts, top_k 32, any number of experts."""
    groups = case.rule.num_expert_group
    top_k = 1 if case.id == "Llama4" else top_k
    if num_experts % groups or num_experts // groups * case.rule.topk_group < top_k:
        pytest.skip(f"{num_experts} experts and top_k {top_k} do not fit {groups} groups")
    if num_experts // groups < 2:
        pytest.skip("a group is scored by its two best")
    case = sized(case, num_experts, top_k)
    logits = torch.randn(70, num_experts) * 2
    checks.check_selection(case, fused_kernel, logits, case.bias(), least_decided=0.1)


@every
def test_equals_the_strategy_on_the_card(case: Case) -> None:
    """Bit for bit the same experts as `select_experts` there, on all but a handful of rows."""
    logits = (torch.randn(4096, case.num_experts) * 2).cuda()
    bias = _cuda(case.bias())
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    strategy = case.strategy.select_experts(logits, bias, shape=shape)
    fused = _fused(case)(logits, bias)
    same = (strategy.topk_ids == fused.topk_ids).all(1)
    # A softmax over all experts is summed in another order: scores that differ by a bit may swap.
    allowed = 8 if case.rule.rank == "softmax" and case.rule.num_expert_group > 1 else 0
    assert int((~same).sum()) <= allowed
    torch.testing.assert_close(
        fused.topk_weights[same], strategy.topk_weights[same], rtol=2e-6, atol=0.0
    )


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_and_strides(case: Case, dtype: torch.dtype) -> None:
    """Logits of any dtype in a wider tensor, bias in bfloat16, give what float32 copies give."""
    fused = _fused(loosened(case))
    wide = torch.full((33, case.num_experts + 5), 50.0, device="cuda", dtype=dtype)
    wide[:, : case.num_experts] = torch.randn(33, case.num_experts, device="cuda")
    view = wide[:, : case.num_experts]
    bias = _cuda(case.bias())
    bias = None if bias is None else bias.bfloat16()
    narrow = fused(view, bias)
    copy = fused(view.float().contiguous(), None if bias is None else bias.float())
    assert torch.equal(narrow.topk_ids, copy.topk_ids)
    assert torch.equal(narrow.topk_weights, copy.topk_weights)


@every
@pytest.mark.parametrize("tokens", [1, 3, 8, 9, 50, 700, 5000])
def test_slots(case: Case, tokens: int) -> None:
    """Slots sorted by expert, stable, padded; of a rank in the middle and of all experts."""
    fused, experts = _fused(case), case.num_experts
    logits, bias = torch.randn(tokens, experts, device="cuda"), _cuda(case.bias())
    for first, count, block in ((0, experts, 16), (experts // 4, experts // 2, 64), (3, 5, 1)):
        request = SortRequest(first_local=first, num_local=count, block_size=block)
        routed, slots = fused.with_slots(logits, bias, request)
        alone = fused(logits, bias)
        assert torch.equal(routed.topk_ids, alone.topk_ids)
        assert torch.equal(routed.topk_weights, alone.topk_weights)
        expect_sorted(slots, routed.topk_ids.cpu(), request)
        expect_sorted(sort_slots(routed.topk_ids, request), routed.topk_ids.cpu(), request)
        again = fused.with_slots(logits, bias, request)[1]
        assert torch.equal(again.slots, slots.slots)


@pytest.mark.parametrize("case_id", ["Renormalize", "DeepSeekV3-8of4", "GroupedSoftmax-max"])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("scan", [1, 2**30])
@pytest.mark.parametrize(
    ("rows", "warps", "tokens"), [(1, 1, 70), (4, 4, 70), (4, 1, 700), (8, 2, 700)]
)
def test_slots_with_any_tile(
    case_id: str, overlap: bool, scan: int, rows: int, warps: int, tokens: int
) -> None:
    """Whatever the tile and the number of launches, and with each starting during the one before."""
    from typed_moe.kernels import _triton_launch as launch

    if overlap and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("launches overlap from compute capability 9.0 on")
    case = find(case_id)
    fused = _fused(case)
    request = SortRequest(first_local=0, num_local=case.num_experts, block_size=16)
    tile = launch.Tile(rows=rows, warps=warps, whole=0, overlap=overlap, scan=scan)
    for _ in range(20):
        logits, bias = torch.randn(tokens, case.num_experts, device="cuda"), _cuda(case.bias())
        ids, weights, slots = launch.route(fused.settings, logits, bias, request, tile)
        expected = fused(logits, bias)
        assert torch.equal(ids, expected.topk_ids)
        assert torch.equal(weights, expected.topk_weights)
        assert slots is not None
        expect_sorted(slots, ids.cpu(), request)


@pytest.mark.parametrize("levels", [1, 2, 3, 5])
@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (300, 22), (512, 10)])
@pytest.mark.parametrize(
    "strategy", [Renormalize(), DeepSeekV3()], ids=["Renormalize", "DeepSeekV3"]
)
def test_best_of_one_lane(
    strategy: RoutingStrategy, num_experts: int, top_k: int, levels: int
) -> None:
    """However many of its best a lane gives: as `torch.sort` has them, also where one lane has all."""
    from typed_moe.kernels import _triton_launch as launch

    shape = RoutingShape(num_experts=num_experts, top_k=top_k)
    fused = fused_routing(strategy, shape=shape, device=torch.device("cuda"))
    assert isinstance(fused, FusedRouting)
    logits = torch.randn(300, num_experts, device="cuda")
    logits[3::7, 5::32] += 20.0
    logits[10::9, 7::32] = 30.0
    logits[11::5] = logits[11::5].round()
    logits[12] = 1.0
    bias = torch.randn(num_experts, device="cuda").round() if fused.settings.rule.biased else None
    scores = logits if bias is None else torch.sigmoid(logits) + bias
    best = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    for rows in (1, 4):
        tile = launch.Tile(rows=rows, warps=rows, levels=levels)
        ids, _, _ = launch.route(fused.settings, logits, bias, None, tile)
        assert torch.equal(ids.long(), best)


@every
@pytest.mark.parametrize("tokens", [8, 200])
def test_acceptance_43_replay_equals_eager(case: Case, tokens: int) -> None:
    """A graph captured at T, replayed with fewer real rows and garbage behind them."""
    fused = _fused(case)
    request = SortRequest(first_local=0, num_local=case.num_experts, block_size=16)
    static, bias = torch.randn(tokens, case.num_experts, device="cuda"), _cuda(case.bias())
    fused.with_slots(static, bias, request)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, slots = fused.with_slots(static, bias, request)
        alone = fused(static, bias)
    fresh = torch.randn(tokens, case.num_experts, device="cuda")
    fresh[-3], fresh[-2], fresh[-1] = torch.nan, torch.inf, -torch.inf
    static.copy_(fresh)
    captured.topk_weights.fill_(torch.nan)
    captured.topk_ids.fill_(-7)
    graph.replay()
    eager = fused(fresh, bias)
    real = fused(fresh[:-3].clone(), bias)
    assert torch.equal(captured.topk_ids, eager.topk_ids)
    assert torch.equal(captured.topk_weights, eager.topk_weights)
    assert torch.equal(alone.topk_weights, eager.topk_weights)
    assert torch.equal(captured.topk_ids[:-3], real.topk_ids)
    assert torch.equal(captured.topk_weights[:-3], real.topk_weights)
    assert bool((captured.topk_weights[[-3, -1]] == 0).all())
    expect_sorted(slots, captured.topk_ids.cpu(), request)


@every
def test_torch_compile(case: Case) -> None:
    """`fullgraph=True`, dynamic T: the same bits as the eager call."""
    fused = _fused(case)
    bias = _cuda(case.bias())

    @torch.compile(fullgraph=True, dynamic=True)
    def compiled(logits: Tensor) -> tuple[Tensor, Tensor]:
        routed = fused(logits * 1.0, bias)
        return routed.topk_ids, routed.topk_weights

    for tokens in (4, 9):
        logits = torch.randn(tokens, case.num_experts, device="cuda")
        ids, weights = compiled(logits)
        eager = fused(logits, bias)
        assert torch.equal(ids, eager.topk_ids)
        assert torch.equal(weights, eager.topk_weights)


def test_acceptance_42_no_tokens() -> None:
    """T = 0 launches nothing and gives empty results."""
    case = CASES[0]
    fused = _fused(case)
    request = SortRequest(first_local=0, num_local=case.num_experts, block_size=16)
    routed, slots = fused.with_slots(torch.empty(0, case.num_experts, device="cuda"), None, request)
    assert routed.topk_ids.shape == (0, case.top_k)
    assert slots.slots.numel() == 0
    assert int(slots.counts.sum()) == int(slots.offsets.sum()) == 0


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_acceptance_44_45_46_shards_of_a_layer(ranks: int) -> None:
    """Whole layers: the ranks' parts add up, garbage rows behind the real ones change nothing."""
    torch.backends.cuda.matmul.allow_tf32 = False
    experts, bias = random_experts(16, 16, 12), torch.randn(16) * 0.05
    x, logits = torch.randn(40, 16), torch.randn(40, 16)
    x[30:], logits[30:] = torch.nan, torch.nan
    routing = DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)
    rule = replace(oracle.RULES["DeepSeekV3"], num_expert_group=4, topk_group=2, scale=2.5)
    chosen = oracle.route(rule, logits[:30], bias, 4)
    expected = oracle.moe(experts, x[:30], chosen.ids, chosen.weights, oracle.Act())
    total = torch.zeros(30, 16)
    for rank in range(ranks):
        build = Build(
            routing=routing,
            num_experts=16,
            top_k=4,
            placement=Placement(ep_size=ranks, ep_rank=rank),
            routing_form=RoutingForm.PRECOMPUTED,
            kernel=ReferenceKernel(),
        )
        layer = build.loaded(experts, bias).cuda()
        assert "by the fused routing kernel" in str(layer.plan)
        part = layer(x.cuda(), logits.cuda())[:30].cpu()
        # Not bit for bit: the reference kernel's matrix products depend on how many rows they have.
        alone = layer(x[:30].cuda(), logits[:30].cuda()).cpu()
        assert relative_error(part, alone.double()) < 1e-5
        assert float(part.norm()) > 0
        total += part
    assert relative_error(total, expected) < 1e-5


def test_a_strategy_of_ones_own_routes_in_pytorch() -> None:
    """And the plan says so, with the reason."""
    layer = Build(routing=Own(), kernel=ReferenceKernel()).empty(device="cuda")
    assert "Own.select_experts, in PyTorch" in str(layer.plan)
    assert "fused routing has no routing method for Own" in str(layer.plan)
