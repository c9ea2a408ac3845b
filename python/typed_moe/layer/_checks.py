"""What a layer refuses when it is made and when it is called."""

from __future__ import annotations

import torch
from torch import Tensor

from typed_moe.config import Placement, check_count, weight_block
from typed_moe.kernels import KernelRequest
from typed_moe.routing import RoutingStrategy
from typed_moe.runners import CallBuffers, TokenExchange

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_call(
    label: str, request: KernelRequest, hidden_states: Tensor, router_logits: Tensor
) -> None:
    """Refuse tensors that are not the layer's; metadata only."""
    width = request.hidden_size
    if hidden_states.dim() != 2 or hidden_states.shape[1] != width:
        raise ValueError(
            f"{label}: hidden_states has shape {tuple(hidden_states.shape)}; allowed: "
            f"(num_tokens, hidden_size) = (T, {width})"
        )
    if hidden_states.dtype not in _DTYPES:
        raise TypeError(
            f"{label}: hidden_states is {hidden_states.dtype}; allowed: float32, bfloat16, float16"
        )
    expected = (hidden_states.shape[0], request.shape.num_experts)
    if router_logits.shape != expected:
        raise ValueError(
            f"{label}: router_logits has shape {tuple(router_logits.shape)} for "
            f"{expected[0]} tokens; allowed: (num_tokens, num_experts) = {expected}"
        )
    devices = {hidden_states.device, router_logits.device, request.device}
    if len(devices) > 1:
        raise ValueError(
            f"{label}: hidden_states is on {hidden_states.device}, router_logits on "
            f"{router_logits.device}, the weights on {request.device}; move them to one"
        )


def check_buffers(
    label: str, request: KernelRequest, hidden_states: Tensor, buffers: CallBuffers
) -> None:
    """Refuse buffers that a kernel would write past, or in another dtype."""
    output, replay = buffers.output, buffers.routing_replay_out
    if output is not None and (
        output.shape != hidden_states.shape
        or output.dtype != hidden_states.dtype
        or output.device != hidden_states.device
        or not output.is_contiguous()
    ):
        raise ValueError(
            f"{label}: output is {output.dtype} of shape {tuple(output.shape)} on {output.device}; "
            f"allowed: contiguous, {hidden_states.dtype} of shape {tuple(hidden_states.shape)} on "
            f"{hidden_states.device}"
        )
    tokens, top_k = hidden_states.shape[0], request.shape.top_k
    if replay is not None and (
        replay.dtype is not torch.int16
        or replay.dim() != 2
        or replay.shape[0] < tokens
        or replay.shape[1] != top_k
        or replay.device != hidden_states.device
        or not replay.is_contiguous()
    ):
        raise ValueError(
            f"{label}: routing_replay_out is {replay.dtype} of shape {tuple(replay.shape)} on "
            f"{replay.device}; allowed: contiguous, torch.int16 of shape ({tokens} or more, {top_k}) "
            f"on {hidden_states.device}"
        )


def check_routing(routing: RoutingStrategy) -> None:
    """Refuse what is no strategy, for callers whom no type checker warned."""
    members = ("name", "select_experts", "bias", "scale", "check", "in_kernel")
    missing = [member for member in members if not hasattr(routing, member)]
    if missing or isinstance(routing, type):
        got = f"the class {routing.__name__}" if isinstance(routing, type) else repr(routing)
        raise TypeError(
            f"routing is {got}; allowed: a RoutingStrategy object such as RenormalizeNaive(), or "
            "one of a class that inherits from RoutingStrategy. A routing method's number is "
            "never taken: the same number means different methods in different libraries"
        )


def check_exchange(exchange: TokenExchange | None, placement: Placement) -> None:
    """Refuse what is no exchange, or one of other ranks."""
    if exchange is None:
        return
    if isinstance(exchange, type) or not hasattr(exchange, "dispatch"):
        raise TypeError(
            f"exchange is {exchange!r}; allowed: a TokenExchange such as AllReduce(group=group), "
            "where every rank has the same tokens, or AllGatherReduceScatter(group=group), where "
            "each has its own; or None, and the caller adds the partial sums"
        )
    exchange.check(placement)


def check_layer(dtype: torch.dtype, hidden: int, intermediate: int, shared: int) -> None:
    if dtype not in _DTYPES:
        raise TypeError(f"dtype is {dtype}; allowed: torch.float32, torch.bfloat16, torch.float16")
    for name, value, least in (
        ("hidden_size", hidden, 1),
        ("intermediate_size", intermediate, 1),
        ("num_fused_shared_experts", shared, 0),
    ):
        check_count(name, value, least=least)


def check_shards(request: KernelRequest, width: int) -> None:
    """Refuse a tensor-parallel slice that cuts through a block of the format."""
    block = max(weight_block(request.quant))
    if request.placement.tp_size > 1 and width % block:
        raise ValueError(
            f"intermediate_size / tp_size is {width}, not a multiple of {block}, the block of "
            f"{request.quant.name}; choose a smaller tp_size, or expert parallelism"
        )


def ranges(ids: list[int]) -> str:
    """`0-3, 7` for [0, 1, 2, 3, 7]."""
    runs: list[list[int]] = []
    for number in ids:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
