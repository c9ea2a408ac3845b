"""From one expert's checkpoint tensors to its rows of the layer's parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.config import Format, Placement
from typed_moe.errors import CheckpointError
from typed_moe.layer._checkpoint_names import ExpertTensors, Projection
from typed_moe.layer._matrices import StoredMatrix, join, read_matrix
from typed_moe.layer._parameters import scale_name
from typed_moe.quantization import Quantized


@final
@attrs.frozen(kw_only=True)
class ExpertLoader:
    """Writes experts into a rank's parameters.

    Attributes:
        quant: the layer's format.
        placement: this rank's share.
        hidden_size, intermediate_size: of one expert, whole.
        gated: whether there is a gate projection.
        has_bias: whether the layer has bias vectors.
    """

    quant: Format
    placement: Placement
    hidden_size: int
    intermediate_size: int
    gated: bool
    has_bias: bool

    def load(
        self, parameters: Mapping[str, Tensor], row: int, expert: int, tensors: ExpertTensors
    ) -> None:
        """Write one expert.

        Args:
            parameters: the layer's, by name.
            row: this rank's row of the expert.
            expert: its global id, for messages.
            tensors: what the checkpoint has of it.

        Raises:
            CheckpointError: a tensor is missing or of the wrong shape or dtype.
        """
        start, stop = self._slice()
        first: list[StoredMatrix] = []
        for projection in self._first():
            matrix = self._read(expert, projection, tensors)
            first.append(matrix.rows(start, stop))
        down = self._read(expert, "down_proj", tensors).columns(start, stop)
        self._write(parameters, "w13", row, join(tuple(first), self.quant))
        self._write(parameters, "w2", row, join((down,), self.quant))
        self._write_input_scale(parameters, "w13", [matrix.input_scale for matrix in first])
        self._write_input_scale(parameters, "w2", [down.input_scale])
        self._write_biases(parameters, row, expert, tensors)

    def _first(self) -> tuple[Projection, ...]:
        return ("gate_proj", "up_proj") if self.gated else ("up_proj",)

    def _slice(self) -> tuple[int, int]:
        size = self.placement.local_intermediate_size(self.intermediate_size)
        return self.placement.tp_rank * size, (self.placement.tp_rank + 1) * size

    def _read(self, expert: int, projection: Projection, tensors: ExpertTensors) -> StoredMatrix:
        name = f"expert {expert}'s {projection}"
        if projection not in tensors:
            raise CheckpointError(
                f"{name} is missing; the checkpoint has {sorted(tensors)} of this expert"
            )
        down = projection == "down_proj"
        shape = (self.intermediate_size, self.hidden_size)
        return read_matrix(name, tensors[projection], shape[::-1] if down else shape)

    def _write(
        self, parameters: Mapping[str, Tensor], prefix: str, row: int, matrix: Quantized
    ) -> None:
        _copy(parameters[f"{prefix}_weight"], row, matrix.data)
        name = scale_name(prefix, self.quant)
        if name is not None and matrix.scale is not None:
            _copy(parameters[name], row, matrix.scale)
        if matrix.global_scale is not None:
            _copy(parameters[f"{prefix}_weight_scale_2"], row, matrix.global_scale)

    def forget_input_scales(self, parameters: Mapping[str, Tensor]) -> None:
        """Before the first expert of a checkpoint: static scales of other weights are no good."""
        for name in ("w13_input_scale", "w2_input_scale"):
            if name in parameters:
                parameters[name].fill_(torch.nan)

    def _write_input_scale(
        self, parameters: Mapping[str, Tensor], prefix: str, scales: list[Tensor | None]
    ) -> None:
        """One static scale serves all experts of the rank, so it is the largest of theirs."""
        target = parameters.get(f"{prefix}_input_scale")
        if target is None:
            return
        for scale in scales:
            if scale is not None:
                new = scale.float().reshape(()).to(target.device)
                target.copy_(torch.where(target.isnan(), new, torch.maximum(target, new)))

    def _write_biases(
        self, parameters: Mapping[str, Tensor], row: int, expert: int, tensors: ExpertTensors
    ) -> None:
        found = {p: kinds["bias"] for p, kinds in tensors.items() if "bias" in kinds}
        if not self.has_bias:
            if found:
                raise CheckpointError(
                    f"expert {expert} has biases ({sorted(found)}) and the layer was made without; "
                    "make it with has_bias=True"
                )
            return
        missing = [p for p in (*self._first(), "down_proj") if p not in found]
        if missing:
            raise CheckpointError(
                f"expert {expert} has no bias of {missing} and the layer was made with "
                "has_bias=True"
            )
        start, stop = self._slice()
        first = torch.cat([found[p].float()[start:stop] for p in self._first()])
        _copy(parameters["w13_weight_bias"], row, first)
        second = found["down_proj"].float()
        # Every tensor-parallel rank adds its partial sum, so one alone may add the bias.
        _copy(
            parameters["w2_weight_bias"],
            row,
            second if self.placement.tp_rank == 0 else torch.zeros_like(second),
        )


def _copy(target: Tensor, row: int, value: Tensor) -> None:
    if target[row].shape != value.shape:
        raise CheckpointError(
            f"a tensor of shape {tuple(value.shape)} does not fit {tuple(target[row].shape)}"
        )
    target[row].copy_(value)
