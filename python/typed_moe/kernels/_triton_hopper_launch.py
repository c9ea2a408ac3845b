"""Launching the Hopper kernels: where they can run, descriptors and constants of one call.

Importing this needs Triton; the kernels themselves one with Gluon, which `takes` asks for.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Final, Literal

import torch
import triton
from torch import Tensor

from typed_moe.kernels._expert_operands import Operands, Slots
from typed_moe.kernels._expert_tiles import ExpertTile, GemmTile
from typed_moe.kernels._experts_math import is_gated_type
from typed_moe.kernels._fused_rules import ceil_div
from typed_moe.kernels._triton_launch import INTERPRETED, follows
from typed_moe.kernels.args import ExpertArgs

if TYPE_CHECKING:
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

_TRITONS: Final = ("3.6.", "3.7.")
"""Gluon is experimental, and these are the versions that compiled the kernels."""
_HOPPER: Final = (9, 0)
_STEP_BYTES: Final = 128
"""Of a row, per step of the sum: what the copies lay out for the matrix units."""
_HALF, _PLACES = 128, 128
_ALIGNED: Final = 16


def takes(x: Tensor, weights: Tensor, gemm: GemmTile, operands: Operands, slots: Slots) -> bool:
    """Whether the kernel runs this product: asked for by the tile, on a Hopper, in whole steps."""
    if not gemm.persistent or operands.group or operands.fp8 == "bits" or not _runs(x.device):
        return False
    if slots.sorted.block_size != _PLACES or x.shape[0] == 0:
        return False
    step = gemm.block_k * weights.element_size()
    aligned = x.data_ptr() % _ALIGNED == 0 and weights.data_ptr() % _ALIGNED == 0
    # In elements: Triton knows no stride to be a multiple of less than 16 of them.
    rows = x.stride(0) % _ALIGNED == 0
    return step == _STEP_BYTES and weights.shape[2] % gemm.block_k == 0 and aligned and rows


@cache
def _runs(device: torch.device) -> bool:
    """Whether the card is a Hopper, and Triton one that has compiled the kernels."""
    known = str(triton.__version__).startswith(_TRITONS)
    if INTERPRETED or not known or device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) == _HOPPER


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def _kernel() -> ModuleType:
    """The module that has the kernel; imported where Triton has Gluon alone."""
    return import_module("typed_moe.kernels._triton_hopper")


def _tiles(matrix: Tensor, rows: int, gemm: GemmTile) -> TensorDescriptor:
    """A descriptor whose tiles lie as the matrix units read them."""
    gluon = import_module("triton.experimental.gluon.language")
    hopper = import_module("triton.experimental.gluon.nvidia.hopper")
    layout = gluon.NVMMASharedLayout(
        swizzle_byte_width=_STEP_BYTES, element_bitwidth=8 * matrix.element_size(), rank=2
    )
    flat = matrix.view(-1, matrix.shape[-1])
    described: TensorDescriptor = hopper.TensorDescriptor.from_tensor(
        flat, [rows, gemm.block_k], layout
    )
    return described


def first(
    operands: Operands,
    slots: Slots,
    experts: ExpertArgs,
    tile: ExpertTile,
    quantize: Literal["none", "tensor", "group"],
    hidden: Tensor,
    hidden_scale: Tensor | None,
) -> None:
    """The first product and its activation into `hidden` (P, I), quantised as said."""
    x, width, gated = operands.hidden, operands.width, is_gated_type(experts.activation_type)
    # Halves are the gate's and the up projection's columns, or neighbours.
    _product(
        x,
        operands.hidden_scale,
        (0, 1),
        operands.first,
        operands.first_scale,
        hidden,
        hidden_scale,
        operands,
        slots,
        experts,
        tile.first,
        bias=experts.gemm1_bias,
        width=width,
        apart=width if gated else _HALF,
        columns=_HALF if gated else 2 * _HALF,
        kind=str(experts.activation_type),
        quantize=quantize,
    )


def second(
    operands: Operands,
    slots: Slots,
    experts: ExpertArgs,
    tile: ExpertTile,
    intermediate: tuple[Tensor, Tensor | None],
    out: Tensor,
) -> None:
    """The second product into `out` (T * k, H)."""
    hidden, hidden_scale = intermediate
    _product(
        hidden,
        hidden_scale,
        (1, 0),
        operands.second,
        operands.second_scale,
        out,
        None,
        operands,
        slots,
        experts,
        tile.second,
        bias=experts.gemm2_bias,
        width=out.shape[1],
        apart=_HALF,
        columns=2 * _HALF,
        kind="",
        quantize="none",
    )


def _product(
    x: Tensor,
    x_scale: Tensor | None,
    scale_dims: tuple[int, int],
    weights: Tensor,
    weight_scale: Tensor | None,
    out: Tensor,
    out_scale: Tensor | None,
    operands: Operands,
    slots: Slots,
    experts: ExpertArgs,
    gemm: GemmTile,
    *,
    bias: Tensor | None,
    width: int,
    apart: int,
    columns: int,
    kind: str,
    quantize: str,
) -> None:
    """x @ weights^T by expert. `scale_dims`: which of x_scale's dimensions are its groups, its rows."""
    local, outputs, is_first = slots.sorted, operands.outputs, bool(kind)
    tiles = ceil_div(width, columns)
    programs = min(_multiprocessors(x.device), local.block_experts.shape[0] * tiles)
    described = _tiles(weights, _HALF, gemm)
    scaled = x_scale is not None and operands.scales == "block"
    group_dim, row_dim = scale_dims
    _kernel().product_kernel[(programs,)](
        x,
        described if is_first else _tiles(x, _PLACES, gemm),
        described,
        x if x_scale is None else x_scale,
        x if weight_scale is None else weight_scale,
        x if bias is None else bias,
        slots.weights,
        x if experts.gemm1_alpha is None else experts.gemm1_alpha,
        x if experts.gemm1_beta is None else experts.gemm1_beta,
        x if experts.gemm1_clamp_limit is None else experts.gemm1_clamp_limit,
        x if outputs is None else outputs.first if is_first else outputs.second,
        x if outputs is None else outputs.stored,
        out,
        x if out_scale is None else out_scale,
        local.slots,
        local.block_experts,
        local.offsets,
        local.counts.shape[0],
        slots.ids.numel(),
        x.stride(0),
        x_scale.stride(row_dim) if scaled and x_scale is not None else 0,
        x_scale.stride(group_dim) if scaled and x_scale is not None else 0,
        SLOTS=slots.ids.shape[1],
        K=weights.shape[2],
        N=width,
        HEIGHT=weights.shape[1],
        APART=apart,
        TILE=columns,
        TILES=tiles,
        BLOCK_K=gemm.block_k,
        STAGES=gemm.stages,
        GROUP_M=gemm.group_m,
        KIND=kind,
        GATHER=is_first,
        FP8=weights.dtype is torch.float8_e4m3fn,
        SCALED=scaled,
        QUANTIZE=quantize,
        HAS_ALPHA=is_first and experts.gemm1_alpha is not None,
        HAS_BETA=is_first and experts.gemm1_beta is not None,
        HAS_LIMIT=is_first and experts.gemm1_clamp_limit is not None,
        HAS_BIAS=bias is not None,
        HAS_OUTPUT_SCALE=outputs is not None,
        ON_INPUT=is_first and slots.on_input,
        num_warps=4,
        **follows(x.device),
    )
