"""From a checkpoint's tensor names to (expert, projection, kind)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal, assert_never, final

import attrs
import torch
from torch import Tensor

from typed_moe.errors import CheckpointError
from typed_moe.models import CheckpointLayout

Projection = Literal["gate_proj", "up_proj", "down_proj"]

_SEPARATE: dict[str, Projection] = {
    "gate_proj": "gate_proj",
    "up_proj": "up_proj",
    "down_proj": "down_proj",
    "w1": "gate_proj",
    "w3": "up_proj",
    "w2": "down_proj",
}
_KINDS = (
    "weight",
    "weight_scale_inv",
    "weight_scale",
    "weight_scale_2",
    "input_scale",
    "bias",
    # compressed-tensors' int4 ("pack-quantized")
    "weight_packed",
    "weight_shape",
)
_NAME = re.compile(rf"^(?:(\d+)\.)?(\w+?)\.({'|'.join(_KINDS)})$")
_FUSED = re.compile(r"^(gate_up_proj|down_proj)(?:_(bias|blocks|scales)|\.weight)?$")

_BESIDE_STACKED = ("gate.weight", "router_bias")
"""Step keeps its router's tensors beside the stacked experts; they are the model's to load."""

ExpertTensors = dict[Projection, dict[str, Tensor]]
"""One expert: projection -> kind -> tensor."""


@final
@attrs.frozen(kw_only=True, eq=False)
class NamedTensors:
    """The experts of one layer, by global expert id, as the checkpoint stores them."""

    experts: dict[int, ExpertTensors]
    names: frozenset[str]


def read_names(
    weights: Iterable[tuple[str, Tensor]], layout: CheckpointLayout, num_experts: int
) -> NamedTensors:
    """Sort a layer's tensors by expert and projection.

    Args:
        weights: (name below the experts' prefix, tensor).
        layout: how the checkpoint stores the experts.
        num_experts: experts that the layer has.

    Raises:
        CheckpointError: a name is not of the layout, an expert is out of range, or a stacked
            tensor does not hold `num_experts` experts.
    """
    experts: dict[int, ExpertTensors] = {}
    names: set[str] = set()
    for name, tensor in weights:
        if layout is CheckpointLayout.STACKED and name in _BESIDE_STACKED:
            continue
        if name in names:
            raise CheckpointError(f"{name} is given twice")
        names.add(name)
        for expert, projection, kind, part in _entries(name, tensor, layout, num_experts):
            if expert >= num_experts:
                raise CheckpointError(
                    f"{name} is of expert {expert}; the layer has experts 0 to {num_experts - 1}"
                )
            experts.setdefault(expert, {}).setdefault(projection, {})[kind] = part
    return NamedTensors(experts=experts, names=frozenset(names))


Entry = tuple[int, Projection, str, Tensor]


def _entries(
    name: str, tensor: Tensor, layout: CheckpointLayout, num_experts: int
) -> Iterable[Entry]:
    match layout:
        case (
            CheckpointLayout.SEPARATE
            | CheckpointLayout.MIXTRAL
            | CheckpointLayout.SEPARATE_UNGATED
            | CheckpointLayout.STACKED
        ):
            return _separate(name, tensor, layout, num_experts)
        case (
            CheckpointLayout.FUSED
            | CheckpointLayout.FUSED_TRANSPOSED
            | CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED
        ):
            return _fused(name, tensor, layout, num_experts)
        case _:
            assert_never(layout)


def _separate(
    name: str, tensor: Tensor, layout: CheckpointLayout, num_experts: int
) -> Iterable[Entry]:
    found = _NAME.match(name)
    projection = _SEPARATE.get(found.group(2)) if found else None
    stacked = layout is CheckpointLayout.STACKED
    if found is None or projection is None or (found.group(1) is None) != stacked:
        raise CheckpointError(
            f"{name} is no expert tensor of the layout {layout.value}; allowed: names such as "
            f"{'gate_proj.weight' if stacked else '0.gate_proj.weight or 0.w1.weight'}"
        )
    if not stacked:
        return [(int(found.group(1)), projection, found.group(3), tensor)]
    _check_count(name, tensor, num_experts)
    return [(expert, projection, found.group(3), tensor[expert]) for expert in range(num_experts)]


def _check_count(name: str, tensor: Tensor, num_experts: int) -> None:
    if tensor.dim() < 2 or tensor.shape[0] != num_experts:
        raise CheckpointError(
            f"{name} has shape {tuple(tensor.shape)}; allowed: the experts first, {num_experts} of "
            "them"
        )


def _fused(
    name: str, tensor: Tensor, layout: CheckpointLayout, num_experts: int
) -> Iterable[Entry]:
    found = _FUSED.match(name)
    if found is None:
        raise CheckpointError(
            f"{name} is no expert tensor of the layout {layout.value}; allowed: gate_up_proj, "
            "down_proj and their _bias, _blocks, _scales"
        )
    _check_count(name, tensor, num_experts)
    suffix = found.group(2)
    entries: list[Entry] = []
    for expert in range(num_experts):
        rows = _rows(tensor[expert], suffix, layout)
        kind = {"bias": "bias", "scales": "weight_scale"}.get(suffix or "", "weight")
        if found.group(1) == "down_proj":
            entries.append((expert, "down_proj", kind, rows))
            continue
        gate, up = _halves(rows, layout)
        entries += [(expert, "gate_proj", kind, gate), (expert, "up_proj", kind, up)]
    return entries


def _rows(tensor: Tensor, suffix: str | None, layout: CheckpointLayout) -> Tensor:
    """One expert's tensor with the output features first."""
    if suffix == "blocks":
        return tensor.reshape(tensor.shape[0], -1)  # (rows, K / 32, 16) bytes to (rows, K / 2)
    if suffix is None and layout is not CheckpointLayout.FUSED:
        return tensor.T
    return tensor


def _halves(rows: Tensor, layout: CheckpointLayout) -> tuple[Tensor, Tensor]:
    """The gate's rows and the up projection's."""
    if layout is CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED:
        return rows[::2], rows[1::2]
    gate, up = torch.tensor_split(rows, 2)
    return gate, up
