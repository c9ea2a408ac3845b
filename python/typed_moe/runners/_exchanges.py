"""The exchanges that torch.distributed's collectives make: NCCL's, gloo's, any backend's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, final

import attrs
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.nn.functional import pad

from typed_moe.config import Placement, check_count
from typed_moe.runners._ep import Dispatched

_REDUCE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@final
@attrs.frozen(kw_only=True, eq=False)
class AllReduce:
    """Every rank has the same tokens; one all-reduce adds up the partial sums.

    y = sum over ranks of (this rank's experts on x). It serves tensor and expert parallelism
    whose attention gives every rank all tokens. Nothing is sent before the experts. Without
    tokens nothing happens, on no rank.

    Attributes:
        group: the ranks, tp_size * ep_size of them. Rank ep_rank * tp_size + tp_rank holds
            that shard, as in SGLang.
        reduce_dtype: what the partial sums are added in. None: in their own dtype, that of
            `hidden_states`, as SGLang, vLLM and TensorRT-LLM do. A kernel's partial sum is rounded
            to bfloat16 already, by up to 2**-9 of it; in bfloat16 each of the R - 1 additions
            rounds once more. With `torch.float32` the sum alone is rounded once more, and twice
            the bytes are sent.

    Raises:
        TypeError: `group` is no ProcessGroup; a process outside a group has none.
        ValueError: `reduce_dtype` is none of the allowed.

    Source: SGLang `StandardDispatcher` followed by `tensor_model_parallel_all_reduce`.
    """

    group: ProcessGroup
    reduce_dtype: torch.dtype | None = None

    def __attrs_post_init__(self) -> None:
        _check_settings("AllReduce", self.group, self.reduce_dtype)

    @property
    def name(self) -> str:
        """`AllReduce over 4 ranks`, and in which dtype."""
        return _name("AllReduce", self.group, self.reduce_dtype)

    def check(self, placement: Placement) -> None:
        """Refuse a placement whose shards are not the group's ranks.

        Raises:
            ValueError: the group's size is not tp_size * ep_size, or this process's rank in it is
                not ep_rank * tp_size + tp_rank.
        """
        _check_placement("AllReduce", self.group, placement)

    def dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> Dispatched:
        """The tokens as they are: every rank has them."""
        return _Replicated(exchange=self, hidden_states=hidden_states, router_logits=router_logits)

    def __deepcopy__(self, memo: dict[int, object]) -> AllReduce:
        """Itself: a copied model speaks to the same ranks."""
        return self


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Replicated:
    """See `Dispatched`. A dataclass, because torch.compile cannot trace attrs' frozen `__init__`."""

    exchange: AllReduce
    hidden_states: Tensor
    router_logits: Tensor

    def combine(self, partial_output: Tensor) -> Tensor:
        if self.hidden_states.shape[0] == 0:
            return torch.empty_like(partial_output)
        return _all_reduce(partial_output, self.exchange.group, self.exchange.reduce_dtype)


@final
@attrs.frozen(kw_only=True, eq=False)
class AllGatherReduceScatter:
    """Each rank has tokens of its own; its experts see everybody's.

    All-gather hidden states and logits, run this rank's experts on all of them, add up over the
    ranks and give each rank its own rows. It serves data-parallel attention with expert
    parallelism. The ranks' numbers of tokens may differ, and one may be 0: that rank has to
    call the layer all the same, or the others wait. Rows are padded to the longest rank's, since
    collectives want equal shapes, and cut before the experts see them.

    A strategy that looks at more than one row at a time sees all ranks' rows, in rank order.

    Attributes:
        group: as of `AllReduce`.
        reduce_dtype: as of `AllReduce`.
        max_num_tokens: tokens per rank that every rank is padded to, on all ranks the same
            number. None: the ranks tell each other their numbers at each call, and the host
            waits for them. With a number it does not wait, so CUDA graphs can hold the call;
            the experts then compute the padding too, and its rows are dropped.

    Raises:
        TypeError: `group` is no ProcessGroup, or `max_num_tokens` no int.
        ValueError: `reduce_dtype` is none of the allowed, or `max_num_tokens` is below 1.

    Source: vLLM's all2all backend `allgather_reducescatter`; SGLang's data-parallel attention
    with `DpPaddingMode.MAX_LEN`.
    """

    group: ProcessGroup
    reduce_dtype: torch.dtype | None = None
    max_num_tokens: int | None = None

    def __attrs_post_init__(self) -> None:
        _check_settings("AllGatherReduceScatter", self.group, self.reduce_dtype)
        if self.max_num_tokens is not None:
            check_count("max_num_tokens", self.max_num_tokens, least=1)

    @property
    def name(self) -> str:
        """`AllGatherReduceScatter over 4 ranks`, in which dtype, padded to how many tokens."""
        name = _name("AllGatherReduceScatter", self.group, self.reduce_dtype)
        most = self.max_num_tokens
        return name if most is None else f"{name}, padded to {most} tokens per rank"

    def check(self, placement: Placement) -> None:
        """As `AllReduce.check`."""
        _check_placement("AllGatherReduceScatter", self.group, placement)

    def dispatch(self, hidden_states: Tensor, router_logits: Tensor) -> Dispatched:
        """All ranks' tokens, in rank order.

        Raises:
            ValueError: there are more tokens than `max_num_tokens`.
        """
        counts = self._num_tokens(hidden_states)
        return _Gathered(
            exchange=self,
            hidden_states=_gather(hidden_states, counts, self.group),
            router_logits=_gather(router_logits, counts, self.group),
            counts=counts,
            num_tokens=hidden_states.shape[0],
        )

    def _num_tokens(self, hidden_states: Tensor) -> tuple[int, ...]:
        """Rows of each rank, in rank order."""
        mine, most = hidden_states.shape[0], self.max_num_tokens
        if most is not None:
            if mine > most:
                raise ValueError(
                    f"hidden_states has {mine} tokens; allowed: 0 to max_num_tokens = {most}. "
                    "Send them in parts, or raise max_num_tokens on every rank"
                )
            return (most,) * self.group.size()
        # On the host where the group can speak there: a number on a GPU has to be waited for.
        on_host = "cpu:" in dist.get_backend_config(self.group)
        device = torch.device("cpu") if on_host else hidden_states.device
        counts = _all_gather(torch.tensor([mine], device=device), self.group)
        return tuple(int(count) for count in counts.tolist())

    def __deepcopy__(self, memo: dict[int, object]) -> AllGatherReduceScatter:
        """Itself: a copied model speaks to the same ranks."""
        return self


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class _Gathered:
    """See `Dispatched`; `counts` rows of each rank, `num_tokens` of them wanted by this one."""

    exchange: AllGatherReduceScatter
    hidden_states: Tensor
    router_logits: Tensor
    counts: tuple[int, ...]
    num_tokens: int

    def combine(self, partial_output: Tensor) -> Tensor:
        longest = max(self.counts)
        if longest == 0:
            return partial_output
        padded = torch.cat(
            [
                pad(rows, (0, 0, 0, longest - rows.shape[0]))
                for rows in partial_output.split_with_sizes(self.counts)
            ]
        )
        mine = _reduce_scatter(padded, self.exchange.group, self.exchange.reduce_dtype)
        return mine[: self.num_tokens]


def _gather(tensor: Tensor, counts: tuple[int, ...], group: ProcessGroup) -> Tensor:
    """All ranks' rows (sum of counts, W), without the padding that they travel with."""
    longest = max(counts)
    if longest == 0:
        return tensor
    gathered = _all_gather(pad(tensor, (0, 0, 0, longest - tensor.shape[0])).contiguous(), group)
    if min(counts) == longest:
        return gathered
    by_rank = gathered.view(len(counts), longest, tensor.shape[1])
    return torch.cat([by_rank[rank, :count] for rank, count in enumerate(counts)])


class _Collective(Protocol):
    """Of torch.distributed, which leaves its functions untyped."""

    def __call__(self, output: Tensor, input: Tensor, /, *, group: ProcessGroup) -> object: ...  # noqa: A002


# torch 2.13 renamed them and warns of the old names; the new ones alone once it is required.
_all_gather_single: _Collective = (
    getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
)
_reduce_scatter_single: _Collective = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def _all_gather(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """(R * n, ...) from each rank's (n, ...)."""
    gathered = tensor.new_empty((group.size() * tensor.shape[0], *tensor.shape[1:]))
    _all_gather_single(gathered, tensor, group=group)
    return gathered


def _reduce_scatter(tensor: Tensor, group: ProcessGroup, dtype: torch.dtype | None) -> Tensor:
    """This rank's n of the summed (R * n, H)."""
    rows = tensor.shape[0] // group.size()
    if "mpi" in dist.get_backend_config(group):
        # torch's MPI backend has no reduce-scatter.
        return _all_reduce(tensor, group, dtype)[group.rank() * rows :][:rows]
    sums = tensor.to(dtype or tensor.dtype)
    mine = sums.new_empty((rows, sums.shape[1]))
    _reduce_scatter_single(mine, sums, group=group)
    return mine.to(tensor.dtype)


def _all_reduce(tensor: Tensor, group: ProcessGroup, dtype: torch.dtype | None) -> Tensor:
    """The sum over ranks, in the dtype of `tensor`, which may be written to."""
    sums = tensor.to(dtype or tensor.dtype).contiguous()
    dist.all_reduce(sums, group=group)
    return sums.to(tensor.dtype)


def _check_settings(name: str, group: ProcessGroup, dtype: torch.dtype | None) -> None:
    if not isinstance(group, ProcessGroup):
        raise TypeError(
            f"{name}: group is {group!r}; allowed: a torch.distributed ProcessGroup that this "
            "process is in, such as dist.new_group([0, 1]) gives its members, or dist.group.WORLD"
        )
    if dtype not in _REDUCE_DTYPES:
        raise ValueError(
            f"{name}: reduce_dtype is {dtype}; allowed: torch.float32, torch.bfloat16, "
            "torch.float16, or None for the dtype of hidden_states"
        )


def _check_placement(name: str, group: ProcessGroup, placement: Placement) -> None:
    tp, ep = placement.tp_size, placement.ep_size
    if group.size() != tp * ep:
        raise ValueError(
            f"{name}: the group has {group.size()} ranks and the placement has tp_size * ep_size "
            f"= {tp} * {ep} = {tp * ep} shards; allowed: one rank for each shard, because each "
            "one's sum is added once. Give the group of the ranks that share these experts"
        )
    expected = placement.ep_rank * tp + placement.tp_rank
    if group.rank() != expected:
        raise ValueError(
            f"{name}: this process is rank {group.rank()} of the group and the placement has "
            f"ep_rank {placement.ep_rank} and tp_rank {placement.tp_rank}; allowed: rank ep_rank "
            f"* tp_size + tp_rank = {expected}. Set ep_rank = rank // tp_size and tp_rank = rank "
            "% tp_size, or order the group's ranks so"
        )


def _name(name: str, group: ProcessGroup, dtype: torch.dtype | None) -> str:
    added = "in the dtype of hidden_states" if dtype is None else f"in {dtype}"
    return f"{name} over {group.size()} ranks, {added}"
