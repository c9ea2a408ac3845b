"""Where a run's weights come from: drawn here, or (`_stored`) read from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import is_gated
from typed_moe.layer import FusedMoE
from typed_moe.models import CheckpointLayout, MoeSpec
from typed_moe.routing import BiasRule
from typed_moe.testing._oracle import OracleExperts

LOGITS_STD = 1.5
"""Of drawn router logits: between the flat logits of a new router and the sharp ones of a
trained one, so that neither every row is a near tie nor one expert takes the weight of all."""

_BIAS_STD = 0.02  # a correction bias that moves some choices, as trained ones do
_EXPERT_BIAS_STD = 0.1
_KEPT_BYTES = 4 << 30  # up to here drawn weights are kept for the oracle; beyond, drawn again


class Weights(Protocol):
    """**Protocol:** a layer's unquantised weights."""

    @property
    def origin(self) -> str:
        """Where they are from, in words."""
        ...

    @property
    def verb(self) -> str:
        """What making them is called, where it is timed."""
        ...

    @property
    def layout(self) -> CheckpointLayout:
        """How `stream` names them."""
        ...

    @property
    def held_bytes(self) -> int:
        """Memory that they take while the layer is loaded."""
        ...

    @property
    def total(self) -> int | None:
        """How many tensors `stream` gives, where that is known."""
        ...

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) for `FusedMoE.load_weights`."""
        ...

    def gate(self) -> tuple[Tensor, Tensor | None]:
        """The router's weight (E, router_hidden_size), and its bias (E,) where it has one."""
        ...

    def correction_bias(self) -> Tensor | None:
        """(E,), where the strategy reads one."""
        ...

    def for_oracle(self) -> OracleExperts:
        """The experts as the oracle takes them, one at a time."""
        ...


@final
@attrs.frozen(kw_only=True)
class Each:
    """One tensor per expert, made when it is asked for."""

    make: Callable[[int], Tensor]

    def __getitem__(self, expert: int, /) -> Tensor:
        return self.make(expert)


def activation_settings(experts: OracleExperts, spec: MoeSpec) -> OracleExperts:
    """With the plain values of the spec's activation."""
    settings = attrs.asdict(spec.activation)
    return attrs.evolve(experts, activation=spec.activation.name, **settings)


@final
@attrs.frozen(kw_only=True, eq=False)
class DrawnWeights:
    """Normal weights in bfloat16 from a seed: each tensor has a seed of its own.

    A matrix has standard deviation 1 / sqrt(fan in), so that widths do not change the sizes of
    what goes through it.
    """

    spec: MoeSpec
    hidden_size: int
    router_hidden_size: int
    intermediate_size: int
    num_fused_shared_experts: int
    seed: int
    _kept: dict[tuple[int, str], Tensor] = attrs.field(factory=dict, init=False)

    @property
    def origin(self) -> str:
        """Where they are from, in words."""
        return f"drawn, seed {self.seed}"

    @property
    def verb(self) -> str:
        """They are drawn."""
        return "draw"

    @property
    def held_bytes(self) -> int:
        """All of them: `load_weights` sorts the whole stream before it stores the first."""
        matrix = self.hidden_size * self.intermediate_size * torch.bfloat16.itemsize
        return self._experts() * len(self._projections()) * matrix

    @property
    def layout(self) -> CheckpointLayout:
        """Each expert's projections by themselves."""
        return CheckpointLayout.SEPARATE

    @property
    def total(self) -> int | None:
        """Tensors in the stream."""
        per_expert = len(self._projections()) * (2 if self.spec.has_bias else 1)
        return self._experts() * per_expert

    def stream(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor), drawn on the way."""
        for expert in range(self._experts()):
            for projection in self._projections():
                yield f"{expert}.{projection}.weight", self._matrix(expert, projection)
                if self.spec.has_bias:
                    yield f"{expert}.{projection}.bias", self._vector(expert, projection)

    def gate(self) -> tuple[Tensor, Tensor | None]:
        """Logits of standard deviation `LOGITS_STD` for standard normal tokens."""
        shape = (self.spec.num_experts, self.router_hidden_size)
        weight = self._draw((0, "gate"), shape, LOGITS_STD / self.router_hidden_size**0.5)
        if self.spec.gate_bias_name is None:
            return weight, None
        return weight, self._draw((0, "gate bias"), shape[:1], _EXPERT_BIAS_STD)

    def correction_bias(self) -> Tensor | None:
        """Small and not zero, in float32."""
        if self.spec.routing.bias is BiasRule.NONE:
            return None
        return self._draw((0, "correction bias"), (self.spec.num_experts,), _BIAS_STD).float()

    def for_oracle(self) -> OracleExperts:
        """The same tensors: kept, or drawn again."""
        first = self._projections()[:-1]

        def w13(expert: int) -> Tensor:
            return torch.cat([self._matrix(expert, projection) for projection in first])

        def w13_bias(expert: int) -> Tensor:
            return torch.cat([self._vector(expert, projection) for projection in first])

        biases = self.spec.has_bias
        experts = OracleExperts(
            w13=Each(make=w13),
            w2=Each(make=lambda expert: self._matrix(expert, "down_proj")),
            activation="",
            w13_bias=Each(make=w13_bias) if biases else None,
            w2_bias=Each(make=lambda expert: self._vector(expert, "down_proj")) if biases else None,
        )
        return activation_settings(experts, self.spec)

    def _experts(self) -> int:
        return self.spec.num_experts + self.num_fused_shared_experts

    def _projections(self) -> tuple[str, ...]:
        gated = is_gated(self.spec.activation)
        return ("gate_proj", "up_proj", "down_proj") if gated else ("up_proj", "down_proj")

    def _matrix(self, expert: int, projection: str) -> Tensor:
        key = expert, projection
        if key in self._kept:
            return self._kept[key]
        rows, columns = self.intermediate_size, self.hidden_size
        shape = (columns, rows) if projection == "down_proj" else (rows, columns)
        matrix = self._draw(key, shape, shape[1] ** -0.5)
        if self.held_bytes <= _KEPT_BYTES:
            self._kept[key] = matrix
        return matrix

    def _vector(self, expert: int, projection: str) -> Tensor:
        size = self.hidden_size if projection == "down_proj" else self.intermediate_size
        return self._draw((expert, f"{projection} bias"), (size,), _EXPERT_BIAS_STD)

    def _draw(self, key: tuple[int, str], shape: tuple[int, ...], std: float) -> Tensor:
        expert, what = key
        generator = torch.Generator().manual_seed(
            (self.seed << 24) + (expert << 4) + _STREAMS.index(what)
        )
        return torch.empty(shape).normal_(0.0, std, generator=generator).to(torch.bfloat16)


_STREAMS = (
    "gate",
    "gate bias",
    "correction bias",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_proj bias",
    "up_proj bias",
    "down_proj bias",
    "tokens",
    "router input",
    "calibration tokens",
    "calibration router input",
)
"""What is drawn, each from a random stream of its own."""


@final
@attrs.frozen(kw_only=True, eq=False)
class Tokens:
    """Hidden states (T, H) and what the router sees of the same tokens (T, router_hidden_size)."""

    hidden_states: Tensor
    router_input: Tensor


def draw_tokens(
    count: int, hidden_size: int, router_hidden_size: int, *, seed: int, calibration: bool = False
) -> Tokens:
    """Standard normal tokens in bfloat16.

    Args:
        count: T.
        hidden_size: H.
        router_hidden_size: where it is not H the router's input is drawn apart.
        seed: of the run.
        calibration: others than the measured ones.
    """
    before = "calibration " if calibration else ""

    def draw(what: str, width: int) -> Tensor:
        generator = torch.Generator().manual_seed((seed << 24) + _STREAMS.index(before + what))
        return torch.empty(count, width).normal_(generator=generator).to(torch.bfloat16)

    hidden = draw("tokens", hidden_size)
    same = hidden_size == router_hidden_size
    return Tokens(
        hidden_states=hidden,
        router_input=hidden if same else draw("router input", router_hidden_size),
    )


def router_logits(
    spec: MoeSpec, router_input: Tensor, gate: tuple[Tensor, Tensor | None]
) -> Tensor:
    """(T, E) as the model's gate gives them: float32 where its code or its strategy says so."""
    weight, bias = gate
    dtype = weight.dtype
    if spec.router_weight_fp32 or spec.routing.router_logits_dtype is torch.float32:
        dtype = torch.float32
    return torch.nn.functional.linear(
        router_input.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    )


def needs_calibration(experts: FusedMoE) -> bool:
    """Whether the format has static activation scales that the checkpoint did not bring."""
    return any(
        name.endswith("input_scale") and bool(tensor.isnan().any())
        for name, tensor in experts.named_parameters()
    )
