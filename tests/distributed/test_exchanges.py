"""Real ranks over gloo: with an exchange a sharded layer gives what the whole one gives.

Two and four processes, started once for the file. `test_shards.py` has the same without them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Final
from unittest import mock

import attrs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from tests.distributed.ranks import LOOPBACK, Ranks
from tests.distributed.shards import NAMES, expected, rows_of, shard, tokens, whole
from tests.layer.build import Build, random_experts, relative_error
from typed_moe import (
    AllGatherReduceScatter,
    AllReduce,
    DeepSeekV3,
    FusedMoE,
    Llama4,
    Nvfp4,
    Placement,
    Renormalize,
    RoutingForm,
    TokenExchange,
)
from typed_moe.routing import Routed
from typed_moe.runners import NO_BUFFERS, CallBuffers, EpMoeRunner

COUNTS: Final = ((1, 8, 32, 0), (0, 256, 8, 1), (32, 32, 32, 32), (0, 0, 0, 0), (256, 0, 0, 0))
"""Tokens of each rank: unequal, on one rank alone, equal, none at all."""
SUMMED: Final = 2e-6
"""Relative error of a float32 output: sums over ranks in another order, 2**-24 a term."""

# One worker of xdist runs the file, or each would start processes of its own.
pytestmark = pytest.mark.xdist_group("ranks")
on_ranks = pytest.mark.parametrize("size", [2, 4])
formats = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Four processes for the whole file."""
    started = Ranks(tmp_path_factory.mktemp("ranks"))
    yield started
    started.close()


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ProcessGroup]:
    """A group of this process and no other."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", LOOPBACK)
    store = (tmp_path / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def _place(group: ProcessGroup, tp_size: int) -> Placement:
    """This rank's, expert parallel outside and tensor parallel inside."""
    rank, size = group.rank(), group.size()
    return Placement(
        tp_size=tp_size,
        tp_rank=rank % tp_size,
        ep_size=size // tp_size,
        ep_rank=rank // tp_size,
    )


def _mine(
    group: ProcessGroup, counts: tuple[int, ...]
) -> tuple[slice[int, int, None], Tensor, Tensor]:
    """This rank's rows of all ranks' tokens, with their tensors."""
    borders = [sum(counts[:rank]) for rank in range(group.size() + 1)]
    start, stop = list(pairwise(borders))[group.rank()]
    x, logits = tokens(borders[-1])
    return slice(start, stop), x[start:stop], logits[start:stop]


def _replicated(group: ProcessGroup, case: str) -> None:
    """Every rank has all tokens, and gets the whole sum."""
    name, tp_size = case.split(",")
    layer = shard(name, _place(group, int(tp_size)), AllReduce(group=group))
    rows = rows_of(name, int(tp_size))
    for count in (1, 8, 32, 256, 0):
        rows.add(layer(*tokens(count)), expected(name, count))
    rows.check()


def _gathered(group: ProcessGroup, case: str) -> None:
    """Each rank has its own tokens, and gets theirs."""
    name, tp_size, most = case.split(",")
    exchange = AllGatherReduceScatter(group=group, max_num_tokens=int(most) or None)
    layer = shard(name, _place(group, int(tp_size)), exchange)
    rows = rows_of(name, int(tp_size))
    for counts in COUNTS:
        mine, x, logits = _mine(group, counts)
        rows.add(layer(x, logits), expected(name, sum(counts[: group.size()]))[mine])
    rows.check()


@pytest.mark.parametrize("name", ["unquantized", "nvfp4"])
def test_a_group_of_one(alone: ProcessGroup, name: str) -> None:
    """A model's code is the same on one rank: it adds up one sum."""
    _replicated(alone, f"{name},1")
    _gathered(alone, f"{name},1,0")
    _gathered(alone, f"{name},1,256")


@on_ranks
@formats
@pytest.mark.parametrize("tp_size", [1, 2])
def test_the_same_tokens_on_every_rank(ranks: Ranks, size: int, name: str, tp_size: int) -> None:
    """EP 2, EP 4, TP 2, and TP 2 with EP 2; T = 0, 1, 8, 32, 256."""
    ranks.run(_replicated, f"{name},{tp_size}", size)


@on_ranks
@formats
@pytest.mark.parametrize("tp_size", [1, 2])
def test_tokens_of_its_own_on_every_rank(ranks: Ranks, size: int, name: str, tp_size: int) -> None:
    """Unequal numbers of tokens, idle ranks, all ranks idle."""
    ranks.run(_gathered, f"{name},{tp_size},0", size)


@on_ranks
@pytest.mark.parametrize("name", ["unquantized", "fp8_block", "nvfp4"])
def test_tokens_padded_to_a_fixed_number(ranks: Ranks, size: int, name: str) -> None:
    """The same where no sizes are exchanged: padding is computed and dropped."""
    ranks.run(_gathered, f"{name},1,256", size)


def _other_backends(group: ProcessGroup, case: str) -> None:
    """Gloo, taken for a backend that lacks something."""
    with mock.patch.object(dist, "get_backend_config", return_value=case):
        _gathered(group, "unquantized,1,0")


@pytest.mark.parametrize("backend", ["cpu:mpi", "cuda:nccl"])
def test_backends_without_reduce_scatter_or_without_the_host(ranks: Ranks, backend: str) -> None:
    """MPI adds up with an all-reduce; NCCL alone tells the numbers of tokens on the device."""
    ranks.run(_other_backends, backend, 2)


def _strategies(group: ProcessGroup, case: str) -> None:
    """Groups, a correction bias and a weight on the input, routed in the kernel and before it."""
    which, form = case.split(",")
    experts, bias = random_experts(8, 16, 12), torch.randn(8) * 0.05
    build = Build(routing=Llama4(), top_k=1, routing_form=RoutingForm(form))
    if which == "DeepSeekV3":
        routing = DeepSeekV3(num_expert_group=4, topk_group=2, routed_scaling_factor=2.5)
        build = attrs.evolve(build, routing=routing, top_k=3)
    loaded = bias if which == "DeepSeekV3" else None
    x, logits = torch.randn(40, 16), torch.randn(40, 8)
    own = slice(10 * group.rank(), 10 * group.rank() + 10)
    total = build.loaded(experts, loaded)(x, logits).double()
    for tp_size in (1, 2):
        place = _place(group, tp_size)
        same = attrs.evolve(build, placement=place, exchange=AllReduce(group=group))
        assert relative_error(same.loaded(experts, loaded)(x, logits), total) < SUMMED
        gathered = AllGatherReduceScatter(group=group)
        each = attrs.evolve(build, placement=place, exchange=gathered).loaded(experts, loaded)
        assert relative_error(each(x[own], logits[own]), total[own]) < SUMMED


@on_ranks
@pytest.mark.parametrize("form", list(RoutingForm), ids=lambda form: form.value)
@pytest.mark.parametrize("which", ["Llama4", "DeepSeekV3"])
def test_strategies_with_more_to_lose(
    ranks: Ranks, size: int, which: str, form: RoutingForm
) -> None:
    """Llama4 weights the input; DeepSeekV3's groups span ranks."""
    ranks.run(_strategies, f"{which},{form.value}", size)


def _padding(group: ProcessGroup, case: str) -> None:
    """Eight rows on each rank, garbage from this rank's own count of real ones on."""
    del case
    real = (5, 3)
    x, logits = tokens(16)
    for exchange in (
        AllGatherReduceScatter(group=group),
        AllGatherReduceScatter(group=group, max_num_tokens=16),
    ):
        layer = shard("unquantized", _place(group, 1), exchange)
        rows = slice(8 * group.rank(), 8 * group.rank() + 8)
        mine, its_logits, count = x[rows].clone(), logits[rows].clone(), real[group.rank()]
        alone = layer(mine[:count], its_logits[:count])
        mine[count:], its_logits[count:] = torch.nan, torch.nan
        among = layer(mine, its_logits)
        unsharded = expected("unquantized", 16)[rows][:count].double()
        assert relative_error(alone, unsharded) < SUMMED
        assert relative_error(among[:count], unsharded) < SUMMED


def test_acceptance_45_two_ranks_with_different_padding(ranks: Ranks) -> None:
    """sglang#39804, sglang#31838: each rank's real rows get what they get unpadded."""
    ranks.run(_padding, "", 2)


def _idle(group: ProcessGroup, case: str) -> None:
    """One rank has no tokens, yet its experts are asked."""
    layer = shard("unquantized", _place(group, 1), AllGatherReduceScatter(group=group))
    counts = tuple(0 if rank == int(case) else 8 for rank in range(group.size()))
    mine, x, logits = _mine(group, counts)
    got = layer(x, logits)
    # A rank that did not wait would do its part of the next call for this one's.
    dist.barrier(group)
    assert got.shape == (counts[group.rank()], 128)
    wanted = expected("unquantized", sum(counts))[mine].double()
    assert got.shape[0] == 0 or relative_error(got, wanted) < SUMMED


@on_ranks
@pytest.mark.parametrize("idle", [0, 1])
def test_acceptance_45_an_idle_rank_takes_part(ranks: Ranks, size: int, idle: int) -> None:
    """A rank with T = 0 neither stays away nor is left alone, and its experts serve the others."""
    ranks.run(_idle, str(idle), size)


def _mistakes(group: ProcessGroup, case: str) -> None:
    """Each at construction, or before anything is sent."""
    del case
    build = Build(routing=Renormalize())
    rank = group.rank()
    for exchange in (AllReduce(group=group), AllGatherReduceScatter(group=group)):
        for place, message in (
            (Placement(), r"the group has 2 ranks .* = 1 \* 1 = 1 shards; allowed: one rank"),
            (Placement(tp_size=2, tp_rank=rank, ep_size=2), r"= 2 \* 2 = 4 shards"),
            (Placement(ep_size=2, ep_rank=1 - rank), f"is rank {rank} of .* ep_rank {1 - rank}"),
            (Placement(tp_size=2, tp_rank=1 - rank), rf"tp_rank = {1 - rank}\. Set ep_rank = rank"),
        ):
            with pytest.raises(ValueError, match=message):
                attrs.evolve(build, placement=place, exchange=exchange).empty()
    few = shard(
        "unquantized", _place(group, 1), AllGatherReduceScatter(group=group, max_num_tokens=4)
    )
    with pytest.raises(ValueError, match="has 5 tokens; allowed: 0 to max_num_tokens = 4"):
        few(*tokens(5))
    with pytest.raises(ValueError, match="max_num_tokens is 0; allowed: 1 or more"):
        AllGatherReduceScatter(group=group, max_num_tokens=0)
    with pytest.raises(ValueError, match=r"reduce_dtype is torch\.int8; allowed: torch\.float32"):
        AllReduce(group=group, reduce_dtype=torch.int8)
    calibrated = shard("nvfp4", _place(group, 1), AllGatherReduceScatter(group=group))
    with pytest.raises(ValueError, match="calibrate was given no tokens"):
        calibrated.calibrate(*tokens(0))


def test_mistakes_are_sentences(ranks: Ranks) -> None:
    """A wrong group is refused before a weight is loaded, on every rank."""
    ranks.run(_mistakes, "", 2)


def test_what_is_no_exchange() -> None:
    """A group is no exchange, and a process outside a group has none to give."""
    build = Build(routing=Renormalize())
    wrong: tuple[object, ...] = (AllReduce, "nccl", 2)
    for exchange in wrong:
        with pytest.raises(TypeError, match="allowed: a TokenExchange such as AllReduce"):
            attrs.evolve(build, exchange=exchange).empty()  # type: ignore[arg-type]  # on purpose
    with pytest.raises(TypeError, match=r"group is -100; allowed: .* that this process is in"):
        AllReduce(group=-100)  # type: ignore[arg-type]  # what new_group gives non-members


def _plans(group: ProcessGroup, case: str) -> str:
    """The plan's row, before and after a copy, which speaks to the same ranks."""
    exchange: TokenExchange = AllReduce(group=group, reduce_dtype=torch.float32)
    x, logits = tokens(8)
    if case == "gathered":
        exchange = AllGatherReduceScatter(group=group, max_num_tokens=64)
    layer = shard("bf16", _place(group, 1), exchange)
    twin = copy.deepcopy(layer)
    row = dict(layer.plan.rows())["summed over ranks"]
    assert row in str(twin.plan)
    assert torch.equal(twin(x, logits), layer(x, logits))
    return row


def test_the_plan_says_who_adds_the_sums(ranks: Ranks) -> None:
    """Nobody, the caller, or the layer, and how."""
    alone, sharded = whole("bf16"), shard("bf16", Placement(ep_size=4, ep_rank=1))

    same, gathered = ranks.run(_plans, "same", 2), ranks.run(_plans, "gathered", 2)
    assert same == ["by the layer: AllReduce over 2 ranks, in torch.float32"] * 2
    text = (
        "by the layer: AllGatherReduceScatter over 2 ranks, in the dtype of hidden_states, "
        "padded to 64 tokens per rank"
    )
    assert gathered == [text] * 2
    assert dict(alone.plan.rows())["summed over ranks"] == "one rank has all"
    assert dict(sharded.plan.rows())["summed over ranks"] == "by the caller, over 4 ranks"


def _rounded(group: ProcessGroup, case: str) -> tuple[float, float, float]:
    """Errors of bfloat16 outputs: added in bfloat16, added in float32, and not split at all."""
    del case
    x, logits = tokens(256)
    true = expected("unquantized", 256).double()
    half = x.to(torch.bfloat16)
    assert group.size() == 4
    in_bf16, in_float32 = (
        relative_error(shard("unquantized", _place(group, 2), exchange)(half, logits), true)
        for exchange in (
            AllReduce(group=group),
            AllReduce(group=group, reduce_dtype=torch.float32),
        )
    )
    scattered = AllGatherReduceScatter(group=group, reduce_dtype=torch.float32)
    mine, own, its_logits = _mine(group, (64,) * 4)
    part = shard("unquantized", _place(group, 2), scattered)(own.to(torch.bfloat16), its_logits)
    assert part.dtype is torch.bfloat16
    assert relative_error(part, true[mine]) < 2**-8
    return in_bf16, in_float32, relative_error(whole("unquantized")(half, logits), true)


def test_float32_sums_of_bfloat16_lose_less(ranks: Ranks) -> None:
    """A partial sum is rounded once in either case; each addition in bfloat16 rounds again."""
    for in_bf16, in_float32, unsplit in ranks.run(_rounded, "", 4):
        assert unsplit < in_float32 < in_bf16 < 2**-7


def _rows_alone(
    hidden_states: Tensor,
    router_logits: Tensor | Routed,
    e_score_correction_bias: Tensor | None,
    buffers: CallBuffers = NO_BUFFERS,
) -> Tensor:
    """A runner without a kernel: what is traced is the exchange."""
    assert isinstance(router_logits, Tensor)
    assert e_score_correction_bias is None
    del buffers
    return hidden_states * router_logits.sum(dim=1, keepdim=True)


def _compiled(group: ProcessGroup, case: str) -> None:
    """One graph, collectives included."""
    exchange: TokenExchange = AllReduce(group=group)
    x, logits = tokens(8)
    if case == "gathered":
        exchange = AllGatherReduceScatter(group=group, max_num_tokens=8)
        _, x, logits = _mine(group, (8, 5))
    runner = EpMoeRunner(_rows_alone, exchange)

    def call(x: Tensor, logits: Tensor) -> Tensor:
        return runner(x, logits, None)

    wanted = 2 * _rows_alone(x, logits, None)
    assert torch.equal(call(x, logits), wanted)
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x, logits), wanted)


@pytest.mark.parametrize("exchange", ["same", "gathered"])
def test_an_exchange_compiles_to_one_graph(ranks: Ranks, exchange: str) -> None:
    """`torch.compile(fullgraph=True)` takes the collectives too, where no sizes are exchanged."""
    ranks.run(_compiled, exchange, 2)


def _calibrated(group: ProcessGroup, case: str) -> None:
    """All tokens are on rank 0."""
    del case
    exchange = AllGatherReduceScatter(group=group)
    build = Build(
        routing=Renormalize(),
        intermediate_size=16,
        quant=Nvfp4(),
        placement=_place(group, 1),
        exchange=exchange,
    )
    experts = random_experts(8, 16, 16)
    x, logits = torch.randn(64, 16), torch.randn(64, 8)
    layer: FusedMoE = build.loaded(experts)
    alone = attrs.evolve(build, exchange=None).loaded(experts)
    alone.calibrate(x, logits)
    count = 64 if group.rank() == 0 else 0
    layer.calibrate(x[:count], logits[:count])
    for scale in ("w13_input_scale", "w2_input_scale"):
        assert torch.equal(layer.get_parameter(scale), alone.get_parameter(scale))


def test_calibration_sees_what_the_experts_see(ranks: Ranks) -> None:
    """An idle rank's static scales come from the tokens that its experts are sent."""
    ranks.run(_calibrated, "", 2)
