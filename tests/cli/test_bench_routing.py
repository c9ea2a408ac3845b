"""`typed-moe bench routing` without a GPU: what is checked, what is timed, what the report says.

The clocks are told, and the fused kernel is a stand-in: the strategy in PyTorch, and slots sorted by
plain Python.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from tests.cli.calls import Cli, items, part
from tests.cli.clocks import GRAPH_US, ToldClocks
from typed_moe.cli import _bench_routing, _bench_routing_command
from typed_moe.cli._bench_routing import (
    ROUTER_NAMES,
    Router,
    RoutingRow,
    bench_routing,
    chosen_routers,
)
from typed_moe.cli._progress import Steps
from typed_moe.kernels import SortedSlots, SortRequest
from typed_moe.routing import InKernel, Routed

SLOTTED = {"route", "route_bf16", "route_and_slots", "sort_slots"}


def sorted_by_hand(ids: Tensor, request: SortRequest) -> SortedSlots:
    block, flat = request.block_size, ids.flatten().tolist()
    by_expert: list[list[int]] = [[] for _ in range(request.num_local)]
    for slot, expert in enumerate(flat):
        by_expert[expert].append(slot)
    places: list[int] = []
    owners: list[int] = []
    offsets = [0]
    for expert, mine in enumerate(by_expert):
        blocks = -(-len(mine) // block)
        places += mine + [len(flat)] * (blocks * block - len(mine))
        owners += [expert] * blocks
        offsets.append(len(places))
    return SortedSlots(
        slots=torch.tensor(places, dtype=torch.int32),
        counts=torch.tensor([len(mine) for mine in by_expert]),
        offsets=torch.tensor(offsets, dtype=torch.int32),
        block_experts=torch.tensor(owners, dtype=torch.int32),
        block_size=block,
        first_local=0,
    )


@attrs.frozen(kw_only=True)
class InPyTorch:
    """A stand-in for `FusedRouting`, whose choice or slots can be bent."""

    router: Router
    bend: Callable[[Routed], Routed] = lambda routed: routed
    bend_slots: Callable[[SortedSlots], SortedSlots] = lambda slots: slots

    def __call__(self, router_logits: Tensor, bias: Tensor | None, /) -> Routed:
        chosen = self.router.strategy.select_experts(router_logits, bias, shape=self.router.shape)
        return self.bend(chosen)

    def with_slots(
        self, router_logits: Tensor, bias: Tensor | None, request: SortRequest, /
    ) -> tuple[Routed, SortedSlots]:
        routed = self(router_logits, bias)
        return routed, self.bend_slots(sorted_by_hand(routed.topk_ids, request))


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(_bench_routing, "_fused", lambda router, device: InPyTorch(router=router))
    monkeypatch.setattr(_bench_routing, "_sort_slots", sorted_by_hand)
    return monkeypatch


def rows_of(name: str, tokens: int = 64, library: object = None) -> RoutingRow:
    assert library is None or isinstance(library, Library)
    (row,) = bench_routing(ToldClocks(), chosen_routers((name,)), (tokens,), library, Steps())
    return row


@pytest.mark.parametrize("name", ROUTER_NAMES)
def test_every_router_is_right_and_timed(name: str) -> None:
    row = rows_of(name)
    assert row.reasons == {}
    assert set(row.us) == SLOTTED | {"topk_softmax", "select_experts"}
    assert set(row.us.values()) == {GRAPH_US}


def test_rows_that_bfloat16_changes_are_counted() -> None:
    """Of 2048 experts and top 32, near ties are many: some rows change, and never all of few."""
    many, few = rows_of("largest-2048"), rows_of("llama4-scout")
    assert many.rows_changed_by_bf16 is not None
    assert few.rows_changed_by_bf16 is not None
    assert 0 <= few.rows_changed_by_bf16 < many.rows_changed_by_bf16 <= 64


def _other_expert(routed: Routed) -> Routed:
    ids = routed.topk_ids.clone()
    ids[3, 0] = (set(range(128)) - set(ids[3].tolist())).pop()
    return Routed(topk_ids=ids, topk_weights=routed.topk_weights)


def _off(routed: Routed) -> Routed:
    return Routed(topk_ids=routed.topk_ids, topk_weights=routed.topk_weights * 1.001)


def _moved(slots: SortedSlots) -> SortedSlots:
    changed = slots.slots.clone()
    filled = int(slots.offsets[1])
    changed[0], changed[filled] = slots.slots[filled], slots.slots[0]
    return SortedSlots(
        slots=changed,
        counts=slots.counts,
        offsets=slots.offsets,
        block_experts=slots.block_experts,
        block_size=slots.block_size,
        first_local=0,
    )


def _twice(slots: SortedSlots) -> SortedSlots:
    changed = slots.slots.clone()
    changed[0] = changed[1]
    return SortedSlots(
        slots=changed,
        counts=slots.counts,
        offsets=slots.offsets,
        block_experts=slots.block_experts,
        block_size=slots.block_size,
        first_local=0,
    )


def _same(routed: Routed) -> Routed:
    return routed


def _same_slots(slots: SortedSlots) -> SortedSlots:
    return slots


@pytest.mark.parametrize(
    ("bend", "bend_slots", "said"),
    [
        (_other_expert, _same_slots, "1 of 64 decided rows have other experts"),
        (_off, _same_slots, "a weight is"),
        (_same, _moved, "in another expert's block"),
        (_same, _twice, "not every slot once"),
    ],
)
def test_a_wrong_kernel_is_not_timed(
    bend: Callable[[Routed], Routed],
    bend_slots: Callable[[SortedSlots], SortedSlots],
    said: str,
    stand_ins: pytest.MonkeyPatch,
) -> None:
    """What does not come from it is."""

    def bent(router: Router, device: torch.device) -> InPyTorch:
        return InPyTorch(router=router, bend=bend, bend_slots=bend_slots)

    stand_ins.setattr(_bench_routing, "_fused", bent)
    row = rows_of("qwen3-30b-a3b")
    assert set(row.reasons) == SLOTTED
    assert all(said in reason for reason in row.reasons.values())
    assert set(row.us) == {"topk_softmax", "select_experts"}
    assert row.rows_changed_by_bf16 is None


@attrs.define(kw_only=True)
class Library:
    """FlashInfer's kernels, as a router whose weights are rounded to bfloat16."""

    router: Router
    refusal: str | None = None
    factor: float = 1.0
    calls: int = 0

    def prepared(
        self, told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int, /
    ) -> tuple[Routed, Callable[[], object]]:
        if self.refusal is not None:
            raise RuntimeError(f"in a file\n{self.refusal}")
        chosen = InPyTorch(router=self.router)(logits, None if bias is None else bias.float())
        weights = (chosen.topk_weights * self.factor).bfloat16().float()

        def call() -> None:
            self.calls += 1

        return Routed(topk_ids=chosen.topk_ids, topk_weights=weights), call


def test_flashinfers_kernels_are_checked_and_timed() -> None:
    (router,) = chosen_routers(("deepseek-v3",))
    library = Library(router=router)
    row = rows_of("deepseek-v3", library=library)
    assert row.us["flashinfer"] == GRAPH_US
    assert library.calls > 0

    wrong = rows_of("deepseek-v3", library=Library(router=router, factor=1.02))
    assert "a weight is" in wrong.reasons["flashinfer"]
    refused = rows_of("deepseek-v3", library=Library(router=router, refusal="top_k must be 1"))
    assert refused.reasons["flashinfer"] == "top_k must be 1"
    unknown = rows_of("deepseek-v4-flash", library=Library(router=router))
    assert unknown.reasons["flashinfer"] == "no such method"


# --- the command ----------------------------------------------------------------------------------


def test_table_and_json_have_the_same(
    cli: Cli, stand_ins: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    clocks = ToldClocks()
    stand_ins.setattr(_bench_routing_command, "cuda_clocks", lambda command: clocks)
    report = tmp_path / "routing.json"
    names = ("--model", "qwen3-30b-a3b", "--model", "llama4-scout")
    stand_ins.setattr(_bench_routing_command, "compile_first", lambda names, tokens: None)
    done = cli("bench", "routing", *names, "--tokens", "4", "--tokens", "9", "--json", str(report))
    data = json.loads(report.read_text())

    assert done.status == 0
    rows = items(data, "rows")
    assert [(row["model"], row["tokens"]) for row in rows] == [
        ("qwen3-30b-a3b", 4),
        ("qwen3-30b-a3b", 9),
        ("llama4-scout", 4),
        ("llama4-scout", 9),
    ]
    assert part(rows[0], "us")["route"] == GRAPH_US
    assert sum(line.split()[:1] in (["4"], ["9"]) for line in done.out.splitlines()) == 4
    assert "qwen3-30b-a3b: RenormalizeNaive, 128 experts, top_k 8" in done.out


def test_a_wrong_kernel_is_exit_status_1(cli: Cli, stand_ins: pytest.MonkeyPatch) -> None:
    stand_ins.setattr(_bench_routing_command, "cuda_clocks", lambda command: ToldClocks())
    stand_ins.setattr(
        _bench_routing, "_fused", lambda router, device: InPyTorch(router=router, bend=_off)
    )
    done = cli("bench", "routing", "--model", "qwen3-30b-a3b", "--tokens", "8")
    assert done.status == 1
    assert "off the oracle's" in " ".join(done.out.split())


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--model", "qwen"), "--model is 'qwen'; allowed: qwen3-30b-a3b"),
        (("--tokens", "-1"), "--tokens is -1; allowed: 1 to"),
        (("--json", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
    ],
)
def test_a_mistake_is_a_sentence(cli: Cli, argv: tuple[str, ...], said: str) -> None:
    done = cli("bench", "routing", *argv)
    assert (done.status, done.out) == (2, "")
    assert said in done.err


def test_a_library_that_is_none(cli: Cli, stand_ins: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("tvm_ffi")
    stand_ins.setattr(_bench_routing_command, "cuda_clocks", lambda command: ToldClocks())
    done = cli("bench", "routing", "--flashinfer-library", str(tmp_path / "none.so"))
    assert (done.status, done.out) == (2, "")
    assert "cannot be used" in done.err
    assert "tests.conformance.build" in done.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(cli: Cli) -> None:
    done = cli("bench", "routing")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: bench routing runs on a CUDA device; this torch (")
