"""A FlashInfer release by its signature table: calls are bound and kept, nothing runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from tests.kernels import launcher
from tests.kernels.signatures import table
from typed_moe import FusedMoE
from typed_moe.kernels._flashinfer_library import EnumName
from typed_moe.routing import Refused


def fill(layer: FusedMoE) -> FusedMoE:
    """The layer with finite weights and scales, for calls whose values nobody looks at."""
    for parameter in layer.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            parameter.data.fill_(0.5)
        else:
            parameter.data.view(torch.uint8).fill_(1)
    return layer


class RecordedLibrary:
    """One of the ten releases. A call that its function would not take raises TypeError.

    `mislabels` puts another release's fault, or its absence, in this one's place.
    """

    def __init__(self, version: str) -> None:
        self._table = table(version)
        self.calls: list[tuple[str, dict[str, object]]] = []
        self.mislabels: bool | None = None

    @property
    def version(self) -> str:
        """Of the table."""
        return self._table.version

    def parameters(self, entry_point: str) -> frozenset[str]:
        """From the wheel."""
        found = self._table.functions.get(entry_point)
        return frozenset() if found is None else frozenset(found.parameters)

    def number(self, enum: EnumName, member: str) -> int | None:
        """From the wheel."""
        return self._table.enums.get(enum, {}).get(member)

    def refuses(self, device: torch.device) -> Refused | None:
        """Nothing runs, so anywhere."""
        del device
        return None

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """Zeros of the right shape, once the arguments bind."""
        self._table.functions[entry_point].bind(**arguments)
        self.calls.append((entry_point, dict(arguments)))
        hidden = cast("Tensor", arguments["hidden_states"])
        width = hidden.shape[1] * (2 if hidden.dtype is torch.uint8 else 1)
        return torch.zeros(hidden.shape[0], width, dtype=torch.bfloat16, device=hidden.device)

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the release's launcher would return, with a row of its expert's id for each slot."""
        self._table.functions[entry_point].bind(**arguments)
        self.calls.append((entry_point, dict(arguments)))
        methods = {value: name for name, value in self._table.enums["RoutingMethodType"].items()}
        slots = launcher.slots_of(arguments, methods)
        mislabelled = launcher.mislabels(entry_point, self.version)
        if self.mislabels is not None:
            mislabelled = self.mislabels
        return launcher.returned(arguments, slots, mislabelled=mislabelled)
