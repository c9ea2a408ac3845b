"""The fused routing kernel's logic in Triton's interpreter, on small shapes. No GPU.

`tests/gpu/test_triton_routing.py` has the same kernel compiled.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import pickle
from typing import final

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests.acceptance import checks
from tests.acceptance.cases import CASES, Case, find, sized
from tests.acceptance.routes import fused_kernel
from tests.kernels.slots import expect_sorted
from typed_moe import (
    DeepSeekV3,
    Refused,
    Renormalize,
    Routed,
    RoutingShape,
    RoutingStrategy,
    UnsupportedRouting,
)
from typed_moe.kernels import FusedRouting, SortRequest, fused_route, fused_routing, sort_slots

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None, reason="Triton is not installed here"
    ),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not on"
    ),
    # NumPy says that exp(200) is infinite; so it is on a card, which does not say it.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]
CPU = torch.device("cpu")
ANY_NUMBER = frozenset({"Default", "DeepSeekV3-8of4"})
"""Cases whose slots are sorted at every number of rows."""


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


def _fused(case: Case) -> FusedRouting:
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    made = fused_routing(case.strategy, shape=shape, device=CPU)
    assert isinstance(made, FusedRouting), made
    return made


@pytest.mark.parametrize(
    ("case", "number"),
    [
        pytest.param(case, number, id=f"{case.id}-{number}")
        for case in CASES
        for number in checks.checks_for(case)
    ],
)
def test_acceptance(case: Case, number: str) -> None:
    """The acceptance list's checks."""
    checks.checks_for(case)[number](case, fused_kernel)


def test_acceptance_06_saturated_sigmoids() -> None:
    """Saturated sigmoids tie and go to the lower id; the same logits do not."""
    checks.check_06_saturated(find("Sigmoid"), find("TopKSigmoid"), fused_kernel)


@pytest.mark.parametrize(("low", "high"), [(-104.0, -16.0), (88.0, 200.0), (-20.5, -19.5)])
def test_acceptance_07_08_sqrt_softplus_at_both_ends(low: float, high: float) -> None:
    """Without underflow or overflow."""
    checks.check_07_08_both_ends(find("SqrtSoftplus"), fused_kernel, low, high)


@pytest.mark.parametrize(
    ("case", "tokens"),
    [
        pytest.param(case, tokens, id=f"{tokens}-{case.id}")
        for case in CASES
        for tokens in ((0, 1, 3, 8, 9, 34) if case.id in ANY_NUMBER else (3, 9))
    ],
)
def test_slots(case: Case, tokens: int) -> None:
    """Slots sorted by expert, stable, padded: in one launch, in two, and from ids alone; 34 rows are two words of marks.

    Sorting reads no more than ids, so that numbers of rows are those of one case with groups, and one without.
    """
    fused, experts = _fused(case), case.num_experts
    logits, bias = torch.randn(tokens, experts), case.bias()
    for first, count, block in ((0, experts, 16), (experts // 4, experts // 2, 64), (3, 5, 1)):
        request = SortRequest(first_local=first, num_local=count, block_size=block)
        routed, slots = fused.with_slots(logits, bias, request)
        alone = fused(logits, bias)
        assert torch.equal(routed.topk_ids, alone.topk_ids)
        assert torch.equal(routed.topk_weights, alone.topk_weights)
        expect_sorted(slots, routed.topk_ids, request)
        expect_sorted(sort_slots(routed.topk_ids, request), routed.topk_ids, request)


@pytest.mark.parametrize("scan", [1, 2**30], ids=["added up between", "by every program"])
@pytest.mark.parametrize("rows", [1, 2, 8])
def test_slots_of_many_chunks(scan: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More chunks than are added up at a time; experts that no token chose; other ranks' experts."""
    from typed_moe.kernels import _triton_launch as launch

    monkeypatch.setattr(launch, "_SCANNED_CHUNKS", 2)
    shape = RoutingShape(num_experts=24, top_k=3)
    fused = fused_routing(Renormalize(), shape=shape, device=torch.device("cpu"))
    assert isinstance(fused, FusedRouting)
    tile = launch.Tile(rows=rows, warps=1, whole=0, scan=scan, place_slots=32, filled=2)
    logits = torch.randn(45, 24)
    logits[:, 5] = -9.0
    for first, count in ((0, 24), (3, 11)):
        request = SortRequest(first_local=first, num_local=count, block_size=4)
        ids, _, slots = launch.route(fused.settings, logits, None, request, tile)
        assert slots is not None
        expect_sorted(slots, ids, request)


def test_slots_of_padding() -> None:
    """Ids of -1, as a strategy of one's own gives them for padding, are in no place."""
    ids = torch.randint(0, 16, (40, 4))
    ids[30:] = -1
    ids[3, 1] = -1
    for request in (
        SortRequest(first_local=0, num_local=16, block_size=8),
        SortRequest(first_local=12, num_local=4, block_size=32),
    ):
        expect_sorted(sort_slots(ids, request), ids, request)


@pytest.mark.parametrize(("num_experts", "top_k"), [(1, 1), (8, 8), (61, 5), (600, 32)])
@pytest.mark.parametrize("case_id", ["Default", "SqrtSoftplus", "SigmoidRenorm"])
def test_sizes(case_id: str, num_experts: int, top_k: int) -> None:
    """All experts, one expert, and counts that are no power of two."""
    case = sized(find(case_id), num_experts, top_k)
    logits = torch.randn(9, num_experts)
    checks.check_selection(case, fused_kernel, logits, case.bias(), least_decided=0.2)


@pytest.mark.parametrize("levels", [1, 3])
@pytest.mark.parametrize(("num_experts", "top_k"), [(256, 8), (300, 22)])
def test_best_of_one_lane(num_experts: int, top_k: int, levels: int) -> None:
    """However many of its best a lane gives: rows whose best all lie 32 ids apart; ties."""
    from typed_moe.kernels import _triton_launch as launch

    shape = RoutingShape(num_experts=num_experts, top_k=top_k)
    fused = fused_routing(Renormalize(), shape=shape, device=CPU)
    assert isinstance(fused, FusedRouting)
    logits = torch.randn(20, num_experts)
    logits[3, 5::32] += 20.0
    logits[10, 7::32] = 30.0
    logits[11] = logits[11].round()
    logits[12] = 1.0
    best = logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    tile = launch.Tile(rows=4, warps=1, levels=levels)
    ids, _, _ = launch.route(fused.settings, logits, None, None, tile)
    assert torch.equal(ids.long(), best)


@pytest.mark.parametrize("case_id", ["Default", "DeepSeekV3-8of4", "GroupedSoftmax-max"])
def test_torch_compile(case_id: str) -> None:
    """One operator in one graph, with T symbolic, and the eager call's bits."""
    case = sized(find(case_id), 32, 3)
    fused, bias = _fused(case), case.bias()

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(logits: Tensor) -> tuple[Tensor, Tensor]:
        routed = fused(logits * 1.0, bias)
        return routed.topk_ids, routed.topk_weights

    for tokens in (4, 9):
        logits = torch.randn(tokens, 32)
        ids, weights = compiled(logits)
        eager = fused(logits, bias)
        assert torch.equal(ids, eager.topk_ids)
        assert torch.equal(weights, eager.topk_weights)


def test_the_operator_is_sound() -> None:
    """torch's own check of schema, fake and dispatch."""
    case = sized(find("DeepSeekV3-8of4"), 32, 3)
    bias = case.bias()
    arguments = (torch.randn(5, 32), bias, 3, "sigmoid", "sigmoid", "nothing", 8, 4, True, 1.0)
    torch.library.opcheck(torch.ops.typed_moe.fused_route.default, arguments)


def test_refusals() -> None:
    """A strategy that says not how it routes, sizes beyond the table, and a T that overflows."""
    with pytest.raises(UnsupportedRouting, match="has no routing method for Own"):
        fused_route(Own(), torch.randn(2, 8), None, shape=RoutingShape(num_experts=8, top_k=2))
    shape = RoutingShape(num_experts=4096, top_k=2)
    refused = fused_routing(Renormalize(), shape=shape, device=CPU)
    assert isinstance(refused, Refused)
    assert "up to 2048 experts with top_k up to 32; this layer has 4096" in refused.reason
    request = SortRequest(first_local=0, num_local=8, block_size=8)
    with pytest.raises(ValueError, match="allowed: up to 2"):
        sort_slots(torch.empty(2**28, 8, dtype=torch.int32, device="meta"), request)


def test_a_copy_routes_alike() -> None:
    """Pickled and deepcopied, as layers are."""
    shape = RoutingShape(num_experts=16, top_k=2)
    made = fused_routing(DeepSeekV3(), shape=shape, device=torch.device("cpu"))
    assert isinstance(made, FusedRouting)
    logits, bias = torch.randn(3, 16), torch.randn(16)
    for copied in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert copied == made
        assert torch.equal(copied(logits, bias).topk_ids, made(logits, bias).topk_ids)
