"""Weights read from a checkpoint: for the layer as stored, for the oracle as plain values.

The oracle's reading of layouts and formats is written out here and shares nothing with
`FusedMoE.load_weights`, so that a matrix that is loaded the wrong way round is seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never, final

import attrs
import torch
from torch import Tensor

from typed_moe.checkpoint import Checkpoint
from typed_moe.cli._weights import Each, activation_settings
from typed_moe.errors import CheckpointError
from typed_moe.models import CheckpointLayout, MoeSpec
from typed_moe.routing import BiasRule
from typed_moe.testing._oracle import OracleExperts

_SHARED = ("shared_experts", "shared_expert")
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}


@final
@attrs.frozen(kw_only=True, eq=False)
class StoredWeights:
    """One layer of a checkpoint.

    Attributes:
        checkpoint: the folder.
        spec: the layer.
        num_fused_shared_experts: slices of the shared expert that run as experts E, E + 1, ...
    """

    checkpoint: Checkpoint
    spec: MoeSpec
    num_fused_shared_experts: int

    @property
    def origin(self) -> str:
        """Where they are from, in words."""
        return f"read from {self.checkpoint.folder}"

    @property
    def verb(self) -> str:
        """They are read."""
        return "read"

    @property
    def held_bytes(self) -> int:
        """None of its own: the values stay in the mapped files."""
        return 0

    @property
    def layout(self) -> CheckpointLayout:
        """The published one."""
        return self.spec.layout

    @property
    def total(self) -> int | None:
        """Tensors in the stream: not counted."""
        return None

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name below the experts' prefix, tensor as stored)."""
        spec = self.spec
        # Step's router is in the same place as its experts.
        routers = (spec.gate_name, spec.gate_bias_name, spec.correction_bias_name)
        others = {name.removeprefix(f"{spec.experts_prefix}.") for name in routers if name}
        for name, tensor in self.checkpoint.under(spec.experts_prefix):
            if name not in others:
                yield name, tensor
        if self.num_fused_shared_experts:
            yield from self._shared_stream()

    def gate(self) -> tuple[Tensor, Tensor | None]:
        """The router's weight and bias, as stored."""
        shape = (self.spec.num_experts, self.spec.router_hidden_size)
        weight = self._checked(self.spec.gate_name, shape)
        if self.spec.gate_bias_name is None:
            return weight, None
        return weight, self._checked(self.spec.gate_bias_name, shape[:1])

    def correction_bias(self) -> Tensor | None:
        """As stored."""
        if self.spec.routing.bias is BiasRule.NONE:
            return None
        name = self.spec.correction_bias_name
        assert name is not None, "a family whose strategy reads a bias names it"
        return self.checkpoint.tensor(name)

    def for_oracle(self) -> OracleExperts:
        """Every expert's plain values, read again, one at a time."""
        biases = self.spec.has_bias
        experts = OracleExperts(
            w13=Each(make=lambda expert: self._first(expert, "weight")),
            w2=Each(make=lambda expert: self._matrix(expert, "down_proj", "weight")),
            activation="",
            w13_bias=Each(make=lambda expert: self._first(expert, "bias")) if biases else None,
            w2_bias=(
                Each(make=lambda expert: self._matrix(expert, "down_proj", "bias"))
                if biases
                else None
            ),
        )
        return activation_settings(experts, self.spec)

    def _checked(self, name: str, shape: tuple[int, ...]) -> Tensor:
        tensor = self.checkpoint.tensor(name)
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            raise CheckpointError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; allowed: floating point "
                f"of shape {shape}. Is the config this checkpoint's?"
            )
        if not bool(tensor.float().isfinite().all()):
            raise CheckpointError(f"{name} has a NaN or an infinity; allowed: finite values")
        return tensor

    def _first(self, expert: int, kind: str) -> Tensor:
        """w13 or its bias: the gate's rows, then the up projection's."""
        ungated = self.spec.layout is CheckpointLayout.SEPARATE_UNGATED
        names = ("up_proj",) if ungated else ("gate_proj", "up_proj")
        return torch.cat([self._matrix(expert, name, kind) for name in names])

    def _matrix(self, expert: int, projection: str, kind: str) -> Tensor:
        """One projection's weight with the outputs first, or its bias."""
        if expert >= self.spec.num_experts:
            return self._shared_values(expert - self.spec.num_experts, projection)
        prefix, layout = self.spec.experts_prefix, self.spec.layout
        match layout:
            case CheckpointLayout.SEPARATE | CheckpointLayout.SEPARATE_UNGATED:
                return self._values(f"{prefix}.{expert}.{projection}.{kind}")
            case CheckpointLayout.MIXTRAL:
                return self._values(f"{prefix}.{expert}.{_MIXTRAL[projection]}.{kind}")
            case CheckpointLayout.STACKED:
                return self._values(f"{prefix}.{projection}.{kind}", expert)
            case (
                CheckpointLayout.FUSED
                | CheckpointLayout.FUSED_TRANSPOSED
                | CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED
            ):
                return self._fused(expert, projection, kind)
            case _:
                assert_never(layout)

    def _fused(self, expert: int, projection: str, kind: str) -> Tensor:
        stored = "down_proj" if projection == "down_proj" else "gate_up_proj"
        name = f"{self.spec.experts_prefix}.{stored}"
        if kind == "bias":
            rows = self.checkpoint.tensor(f"{name}_bias")[expert]
        elif f"{name}_blocks" in self.checkpoint.files:
            blocks = self.checkpoint.tensor(f"{name}_blocks")[expert]
            scales = self.checkpoint.tensor(f"{name}_scales")[expert]
            rows = _mxfp4_values(blocks.flatten(1), scales)
        else:
            rows = self.checkpoint.tensor(name)[expert]
            if self.spec.layout is not CheckpointLayout.FUSED:
                rows = rows.T
        if projection == "down_proj":
            return rows
        second = projection == "up_proj"
        if self.spec.layout is CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED:
            return rows[int(second) :: 2]
        half = rows.shape[0] // 2
        return rows[half:] if second else rows[:half]

    def _values(self, name: str, expert: int | None = None) -> Tensor:
        """A tensor's plain values, with the scales that are beside it."""

        def part(kind: str) -> Tensor | None:
            full = f"{name.removesuffix('weight')}{kind}"
            if full not in self.checkpoint.files:
                return None
            tensor = self.checkpoint.tensor(full)
            return tensor if expert is None else tensor[expert]

        packed = part("weight_packed") if name.endswith(".weight") else None
        if packed is not None:
            return _packed_int4_values(packed, part("weight_scale"))
        whole = self.checkpoint.tensor(name)
        stored = whole if expert is None else whole[expert]
        if not name.endswith(".weight"):
            return stored
        inverse = part("weight_scale_inv")
        scale = part("weight_scale") if inverse is None else inverse
        return _plain(stored, scale, part("weight_scale_2"))

    def _shared_prefix(self) -> str:
        parent = self.spec.experts_prefix.rpartition(".")[0]
        for name in _SHARED:
            if any(known.startswith(f"{parent}.{name}.") for known in self.checkpoint.files):
                return f"{parent}.{name}"
        raise CheckpointError(
            f"{self.checkpoint.folder} has no shared expert below {parent} "
            f"({' or '.join(_SHARED)}); leave out --fused-shared"
        )

    def _shared_stream(self) -> Iterator[tuple[str, Tensor]]:
        """The shared expert cut into experts of the routed width."""
        count, first = self.num_fused_shared_experts, self.spec.num_experts
        for name, tensor in self.checkpoint.under(self._shared_prefix()):
            if count == 1:
                yield f"{first}.{name}", tensor
                continue
            axis = 1 if name.startswith(("down_proj", "w2")) else 0
            # A cut through a block of 128 would need a scale on both of its sides.
            whole = name.endswith(".weight") or self.spec.intermediate_size % 128 == 0
            if tensor.dim() != 2 or tensor.shape[axis] % count or not whole:
                raise CheckpointError(
                    f"{name} of the shared expert has shape {tuple(tensor.shape)} and does not "
                    f"cut into {count} experts that are {self.spec.intermediate_size} wide; leave "
                    "out --fused-shared"
                )
            for slot, part in enumerate(tensor.chunk(count, dim=axis)):
                yield f"{first + slot}.{name}", part

    def _shared_values(self, slot: int, projection: str) -> Tensor:
        names = _MIXTRAL if self.spec.layout is CheckpointLayout.MIXTRAL else {}
        stored = names.get(projection, projection)
        whole = self._values(f"{self._shared_prefix()}.{stored}.weight")
        width = self.spec.intermediate_size
        mine = slice(slot * width, (slot + 1) * width)
        return whole[:, mine] if projection == "down_proj" else whole[mine]


def _plain(stored: Tensor, scale: Tensor | None, global_scale: Tensor | None) -> Tensor:
    """What stored values are worth: unquantised as they are, others in float64."""
    if scale is None:
        return stored
    if stored.dtype is torch.uint8:
        if scale.dtype is torch.uint8:
            return _mxfp4_values(stored, scale)
        if scale.dtype is torch.bfloat16:
            return _int4_values(stored) * _spread(scale, 1, 32)
        values = _e2m1_values(stored) * _spread(scale, 1, 16)
        return values if global_scale is None else values * global_scale.double()
    if scale.dtype is torch.uint8:
        return stored.double() * _spread(_e8m0_values(scale), 1, 32)
    if scale.numel() == 1:
        return stored.double() * scale.double()
    if tuple(scale.shape) in ((stored.shape[0],), (stored.shape[0], 1)):
        return stored.double() * scale.double().reshape(-1, 1)
    # Blocks of 128 x 128, the last of which may be cut short.
    return stored.double() * _spread(scale, 128, 128)[: stored.shape[0], : stored.shape[1]]


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    return scale.double().repeat_interleave(rows, 0).repeat_interleave(columns, 1)


def _e8m0_values(exponents: Tensor) -> Tensor:
    return torch.exp2(exponents.double() - 127.0)


def _e2m1_values(packed: Tensor) -> Tensor:
    return _looked_up(packed, (*_E2M1, *(-value for value in _E2M1)))


def _int4_values(packed: Tensor) -> Tensor:
    return _looked_up(packed, (*range(8), *range(-8, 0)))


def _packed_int4_values(packed: Tensor, scale: Tensor | None) -> Tensor:
    """compressed-tensors' int4: eight values + 8 in an int32, the first in its lowest bits."""
    assert scale is not None, "a layer that loads has its scales"
    nibbles = [(packed >> (4 * place) & 0xF) - 8 for place in range(8)]
    return torch.stack(nibbles, dim=2).flatten(1).double() * _spread(scale, 1, 32)


def _looked_up(packed: Tensor, table: tuple[float, ...]) -> Tensor:
    """(rows, K / 2) bytes, the low nibble first, as (rows, K) float64: each code's value."""
    codes = torch.stack((packed & 0xF, packed >> 4), dim=2).flatten(1)
    return torch.tensor(table, dtype=torch.float64)[codes.long()]


def _mxfp4_values(packed: Tensor, exponents: Tensor) -> Tensor:
    return _e2m1_values(packed) * _spread(_e8m0_values(exponents), 1, 32)
