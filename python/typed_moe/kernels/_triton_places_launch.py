"""Launching what stands around a library's grouped products: buffers, pointers and constants of one call.

Importing this needs Triton; see `typed_moe.kernels.deep_gemm`.
"""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.kernels._expert_operands import Slots
from typed_moe.kernels._experts_math import is_gated_type
from typed_moe.kernels._fused_rules import ceil_div, power_of_two
from typed_moe.kernels._triton_launch import INTERPRETED, follows, on_device
from typed_moe.kernels._triton_places import (
    activate_kernel,
    mark_kernel,
    spread_kernel,
)
from typed_moe.kernels.args import ExpertArgs

_GROUP = 128
_ROWS = 8
"""Places of a program: their scales stand side by side, 32 bytes together."""
_BYTES = 2048
"""Of a row, copied by one program: 16 for a thread."""


@final
@attrs.frozen(kw_only=True, eq=False)
class Places:
    """Rows in the order of places: P places, in blocks that belong to one expert each.

    Attributes:
        rows: (P, H) in the dtype of the activations.
        scale: (P, H / 128) float32, whose places stand side by side; or None.
        group: (P,) int32, the expert, counted from the rank's first; -1 for a place without a slot.
        place: (T, k) int32, the slot's place; not written for slots of no local expert.
    """

    rows: Tensor
    scale: Tensor | None
    group: Tensor
    place: Tensor


def gather(x: Tensor, scale: Tensor | None, slots: Slots) -> Places:
    """The rows of x (T, H), and its scales (H / 128, T), by place."""
    x = x if x.stride(1) == 1 else x.contiguous()
    local, width = slots.sorted, x.shape[1]
    places = local.slots.shape[0]
    rows = torch.empty((places, width), dtype=x.dtype, device=x.device)
    group = torch.empty((places,), dtype=torch.int32, device=x.device)
    place = torch.empty(slots.ids.shape, dtype=torch.int32, device=x.device)
    moved = None if scale is None else _scales(places, width, x.device)
    count = slots.ids.shape[1]
    with on_device(x.device):
        mark_kernel[(places // _ROWS,)](
            x if scale is None else scale,
            x if moved is None else moved,
            group,
            place,
            local.slots,
            local.block_experts,
            slots.ids.numel(),
            places,
            0 if scale is None else scale.stride(1),
            0 if scale is None else scale.stride(0),
            SLOTS=count,
            H=width,
            SCALED=scale is not None,
            GROUPS=power_of_two(max(1, width // _GROUP)),
            BLOCK_M=local.block_size,
            ROWS=_ROWS,
            num_warps=4,
            **follows(x.device),
        )
        block = min(_BYTES // x.itemsize, power_of_two(width))
        spread_kernel[(x.shape[0], ceil_div(width, block))](
            x.view(torch.uint8) if x.itemsize == 1 else x,
            rows.view(torch.uint8) if x.itemsize == 1 else rows,
            place,
            slots.ids,
            local.first_local,
            local.counts.shape[0],
            x.stride(0),
            H=width,
            SLOTS=count,
            BLOCK=block,
            num_warps=4,
            **follows(x.device),
        )
    return Places(rows=rows, scale=None if moved is None else moved.T, group=group, place=place)


def activated(
    first: Tensor, slots: Slots, experts: ExpertArgs, *, quantize: bool
) -> tuple[Tensor, Tensor | None]:
    """(P, I) from first products (P, M) bfloat16: in bfloat16, or float8_e4m3fn with its scales."""
    local = slots.sorted
    halves = 2 if is_gated_type(experts.activation_type) else 1
    places, width = first.shape[0], first.shape[1] // halves
    dtype = torch.float8_e4m3fn if quantize else torch.bfloat16
    hidden = torch.empty((places, width), dtype=dtype, device=first.device)
    scale = _scales(places, width, first.device) if quantize else None
    settings = (experts.gemm1_alpha, experts.gemm1_beta, experts.gemm1_clamp_limit)
    with on_device(first.device):
        activate_kernel[(places // _ROWS, ceil_div(width, _GROUP))](
            first,
            slots.weights,
            *(first if one is None else one for one in settings),
            hidden,
            hidden if scale is None else scale,
            local.slots,
            local.block_experts,
            slots.ids.numel(),
            places,
            I=width,
            KIND=experts.activation_type,
            HALVES=halves,
            HAS_ALPHA=experts.gemm1_alpha is not None,
            HAS_BETA=experts.gemm1_beta is not None,
            HAS_LIMIT=experts.gemm1_clamp_limit is not None,
            ON_INPUT=slots.on_input,
            QUANTIZE=quantize,
            BLOCK_M=local.block_size,
            ROWS=_ROWS,
            DEVICE=not INTERPRETED,
            num_warps=4,
            **follows(first.device),
        )
    return hidden, None if scale is None else scale.T


def _scales(places: int, width: int, device: torch.device) -> Tensor:
    """(width / 128, P) float32."""
    return torch.empty((width // _GROUP, places), dtype=torch.float32, device=device)
