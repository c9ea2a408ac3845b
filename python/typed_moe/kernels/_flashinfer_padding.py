"""Widths that the weight layouts ask for: zeros up to the next multiple of 128; 256 for int4.

What is behind a width is exactly 0 throughout, since every activation that is served maps 0 to 0;
what is cut off again is nothing. SGLang pads to 128 as well (`quantization/mxfp4.py`: "FlashInfer
trtllm-gen FP4 kernel actual alignment"). gpt-oss's 2880 becomes 2944.

Shapes: L experts, T tokens, H hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

import torch
from torch import Tensor
from torch.nn import functional

from typed_moe.config import MxInt4, is_gated
from typed_moe.kernels._protocol import KernelRequest
from typed_moe.kernels.args import (
    Bf16MoeArgs,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerChannelMoeArgs,
    Fp8PerTensorMoeArgs,
    MoeArgs,
    MxInt4MoeArgs,
    given_scale,
)
from typed_moe.kernels.weights import ExpertWeights

_MULTIPLE = 128
_MULTIPLE_INT4 = 256  # 128 bytes of packed values


def padded_sizes(request: KernelRequest) -> tuple[int, int]:
    """(hidden size, intermediate size of this rank), as the kernel is told them."""
    hidden, width = _stored_sizes(request)
    multiple = _MULTIPLE_INT4 if isinstance(request.quant, MxInt4) else _MULTIPLE
    return _up(hidden, multiple), _up(width, multiple)


def is_padded(request: KernelRequest) -> bool:
    """Whether either width has zeros behind it."""
    return padded_sizes(request) != _stored_sizes(request)


def pad_weights(weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
    """The weights, scales and biases with zeros behind both widths, in new tensors."""
    stored, padded = _stored_sizes(request), padded_sizes(request)
    hidden, width = (stored[0], padded[0]), (stored[1], padded[1])
    halves = 2 if is_gated(request.activation) else 1
    return replace(
        weights,
        w13_weight=_grown(weights.w13_weight, halves, width, hidden),
        w2_weight=_grown(weights.w2_weight, 1, hidden, width),
        w13_scale=_or_none(weights.w13_scale, halves, width, hidden),
        w2_scale=_or_none(weights.w2_scale, 1, hidden, width),
        w13_bias=_or_none(weights.w13_bias, halves, width, hidden),
        w2_bias=_or_none(weights.w2_bias, 1, hidden, width),
    )


def hidden_size_of(args: MoeArgs) -> int:
    """H of a record's activations."""
    columns = args.hidden_states.shape[1]
    return 2 * columns if args.hidden_states.dtype is torch.uint8 else columns


def padded_intermediate_size(args: MoeArgs) -> int:
    """The rank's intermediate size, as the kernel is told it."""
    return _up(args.experts.intermediate_size, _multiple_of(args))


def pad_activations(args: MoeArgs, hidden_size: int) -> MoeArgs:
    """The record with zeros behind H of its activations and their scales."""
    padded = _up(hidden_size, _multiple_of(args))
    if padded == hidden_size:
        return args
    match args:
        case Bf16MoeArgs() | Fp8PerTensorMoeArgs() | Fp8PerChannelMoeArgs() | MxInt4MoeArgs():
            return replace(args, hidden_states=_wide(args.hidden_states, hidden_size, padded))
        case Fp4MoeArgs():
            scale = args.hidden_states_scale
            return replace(
                args,
                hidden_states=_wide(args.hidden_states, hidden_size, padded),
                hidden_states_scale=None if scale is None else _wide(scale, hidden_size, padded),
            )
        case Fp8BlockMoeArgs():
            return replace(
                args,
                hidden_states=_wide(args.hidden_states, hidden_size, padded),
                hidden_states_scale=_wide(given_scale(args), hidden_size, padded),
            )
        case _:
            assert_never(args)


def _stored_sizes(request: KernelRequest) -> tuple[int, int]:
    width = request.placement.local_intermediate_size(request.intermediate_size)
    return request.hidden_size, width


def _multiple_of(args: MoeArgs) -> int:
    return _MULTIPLE_INT4 if isinstance(args, MxInt4MoeArgs) else _MULTIPLE


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _or_none(
    tensor: Tensor | None, halves: int, rows: tuple[int, int], columns: tuple[int, int]
) -> Tensor | None:
    return None if tensor is None else _grown(tensor, halves, rows, columns)


def _grown(tensor: Tensor, halves: int, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """(L, halves * rows, columns / n) with both sizes from stored to padded; n values share one.

    (L, halves * rows), a bias, grows in its rows; (L,), one scale per expert, stays.
    """
    if tensor.dim() == 1:
        return tensor
    values = _bytes(tensor.detach())
    stored = values.reshape(values.shape[0], halves, rows[0], *values.shape[2:])
    shape = [tensor.shape[0], halves, rows[1]]
    if tensor.dim() == 3:
        shape.append(columns[1] * tensor.shape[2] // columns[0])
    grown = stored.new_zeros(shape)
    grown[tuple(slice(size) for size in stored.shape)] = stored
    return grown.flatten(1, 2).view(tensor.dtype)


def _wide(tensor: Tensor, hidden_size: int, padded: int) -> Tensor:
    """(T, H / n) as (T, padded / n)."""
    columns = padded * tensor.shape[1] // hidden_size
    return functional.pad(_bytes(tensor), (0, columns - tensor.shape[1])).view(tensor.dtype)


def _bytes(tensor: Tensor) -> Tensor:
    """One-byte values as uint8, which can be filled and padded."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
