"""What FlashInfer's launcher returns with `do_finalize=False`, written from its C++ source.

`trtllm_fused_moe_kernel_launcher.cu` of the ten wheels: `FusedMoeLauncher::run` and each family's
`prepare_routing`. The experts are not computed: every value of a row is its expert's id.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import cast

import attrs
import torch
from torch import Tensor

from tests import oracle

TILE = 8
"""`tile_tokens_dim`: an expert's rows start at a multiple of it."""


@attrs.frozen(eq=False)
class Slots:
    """ids (T, k) and weights (T, k); `given`: the caller's own tensor of weights comes back."""

    ids: Tensor
    weights: Tensor
    given: bool = False
    logits_dtype: torch.dtype = torch.bfloat16


def release(version: str) -> tuple[int, ...]:
    """0.7.2 of 0.7.2.post1."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def mislabels(entry_point: str, version: str) -> bool:
    """Whether float32 logits give bfloat16 weights in a tensor that calls itself float32.

    FP4 allocates by the logits' dtype (`core.py`, `routing_dtype`) until 0.6.15; the others do so
    (launcher, `ew_dtype`, `expert_weights_dtype`) from 0.6.8 until 0.6.16.
    """
    if "fp4" in entry_point:
        return release(version) < (0, 6, 15)
    return (0, 6, 8) <= release(version) < (0, 6, 16)


def slots_of(arguments: Mapping[str, object], methods: Mapping[int, str]) -> Slots:
    """Where each token goes, from what the entry point was given."""
    given = arguments.get("topk_ids")
    if isinstance(given, tuple):
        return Slots(ids=given[0], weights=given[1], given=True)
    if isinstance(given, Tensor):
        bits = (given & 0xFFFF).to(torch.int32)
        return Slots(ids=given >> 16, weights=(bits << 16).view(torch.float32))
    logits = cast("Tensor", arguments["routing_logits"])
    rule = replace(
        oracle.RULES[methods[cast("int", arguments["routing_method_type"])]],
        num_expert_group=cast("int | None", arguments["n_group"]) or 1,
        topk_group=cast("int | None", arguments["topk_group"]) or 1,
        scale=cast("float | None", arguments["routed_scaling_factor"]) or 1.0,
    )
    bias = cast("Tensor | None", arguments["routing_bias"])
    routing = oracle.route(rule, logits, bias, cast("int", arguments["top_k"]))
    return Slots(ids=routing.ids, weights=routing.weights, logits_dtype=logits.dtype)


def returned(
    arguments: Mapping[str, object], slots: Slots, *, mislabelled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """gemm2_output, expert_weights, expanded_idx_to_permuted_idx; NaN where nothing is written."""
    hidden = cast("Tensor", arguments["hidden_states"])
    width = hidden.shape[1] * (2 if hidden.dtype is torch.uint8 else 1)
    first = cast("int", arguments["local_expert_offset"])
    count = cast("int", arguments["local_num_experts"])
    index = torch.full(slots.ids.shape, -1, dtype=torch.int32)
    rows, start = [torch.full((TILE, width), torch.nan)], TILE
    for expert in range(first, first + count):
        token, slot = (slots.ids == expert).nonzero(as_tuple=True)
        padded = -(-len(token) // TILE) * TILE
        index[token, slot] = torch.arange(start, start + len(token), dtype=torch.int32)
        tile = torch.full((padded, width), torch.nan)
        tile[: len(token)] = expert
        rows.append(tile)
        start += padded
    weights = slots.weights
    if not slots.given:
        weights = weights.masked_fill(index < 0, torch.nan).bfloat16()
        if mislabelled and slots.logits_dtype is torch.float32:
            weights = _called_float32(weights)
    return torch.cat(rows).bfloat16(), weights, index.flatten()


def _called_float32(weights: Tensor) -> Tensor:
    """flashinfer#3595: a float32 buffer whose first half is filled with bfloat16."""
    buffer = torch.zeros(weights.shape, dtype=torch.float32)
    buffer.view(torch.bfloat16).flatten()[: weights.numel()] = weights.flatten()
    return buffer
