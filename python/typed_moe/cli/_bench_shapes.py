"""The layers that `bench` and `tune` time: shapes of released models, one rank's where they are large."""

from __future__ import annotations

from typing import final

import attrs

from typed_moe.cli._errors import UserError
from typed_moe.config import Activation
from typed_moe.models import MoeSpec, load_config, moe_layer_ids, moe_spec
from typed_moe.routing import DeepSeekV3, RoutingShape, RoutingStrategy

ALL_TOKENS = (1, 8, 64, 512, 4096, 16384)
FEW_TOKENS = (8, 4096)


@final
@attrs.frozen(kw_only=True)
class LayerShape:
    """One layer, as it is timed.

    Attributes:
        name: on the command line.
        about: what it is.
        routing, num_experts, top_k, hidden_size, intermediate_size, activation, has_bias: the
            layer's arguments.
        tokens: T by default.
    """

    name: str
    about: str
    routing: RoutingStrategy
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    activation: Activation
    has_bias: bool
    tokens: tuple[int, ...]

    @property
    def shape(self) -> RoutingShape:
        """E and k."""
        return RoutingShape(num_experts=self.num_experts, top_k=self.top_k)

    @property
    def sizes(self) -> str:
        """In one line."""
        return (
            f"E {self.num_experts}, k {self.top_k}, H {self.hidden_size}, "
            f"I {self.intermediate_size}, {self.routing.name}"
        )


@final
@attrs.frozen(kw_only=True)
class _Entry:
    """A shipped config, and how many of its experts a rank holds; None: all."""

    config: str
    tokens: tuple[int, ...] = FEW_TOKENS
    local: int | None = None

    @property
    def name(self) -> str:
        """On the command line."""
        return self.config if self.local is None else f"{self.config}-{self.local}"


_ENTRIES: tuple[_Entry, ...] = (
    _Entry(config="qwen3-30b-a3b", tokens=ALL_TOKENS),
    _Entry(config="deepseek-v3", tokens=ALL_TOKENS, local=32),
    _Entry(config="qwen3-next-80b-a3b"),
    _Entry(config="llama4-scout"),
    _Entry(config="gpt-oss-120b", local=32),
    _Entry(config="glm-4.5-air"),
)
SHAPE_NAMES: tuple[str, ...] = tuple(entry.name for entry in _ENTRIES)
"""What `--model` takes."""


def layer_shapes() -> tuple[LayerShape, ...]:
    """Every shape, those that are timed at every T first."""
    return tuple(_shape(entry) for entry in _ENTRIES)


def chosen_shapes(names: tuple[str, ...]) -> tuple[LayerShape, ...]:
    """Those of these names; all, where there are none.

    Raises:
        UserError: no such name.
    """
    unknown = [name for name in names if name not in SHAPE_NAMES]
    if unknown:
        raise UserError(f"--model is {unknown[0]!r}; allowed: {', '.join(SHAPE_NAMES)}")
    known = {shape.name: shape for shape in layer_shapes()}
    return tuple(known[name] for name in dict.fromkeys(names or SHAPE_NAMES))


def _shape(entry: _Entry) -> LayerShape:
    config = load_config(entry.config)
    spec = moe_spec(config, moe_layer_ids(config)[0])
    about, routing = entry.config, spec.routing
    if entry.local is not None:
        about = (
            f"{entry.local} of {entry.config}'s {spec.num_experts} experts, every token's "
            f"{spec.top_k} among them: the load of {spec.num_experts // entry.local} ranks' tokens"
        )
        routing = _without_groups(spec)
    return LayerShape(
        name=entry.name,
        about=about,
        routing=routing,
        num_experts=entry.local or spec.num_experts,
        top_k=spec.top_k,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        activation=spec.activation,
        has_bias=spec.has_bias,
        tokens=entry.tokens,
    )


def _without_groups(spec: MoeSpec) -> RoutingStrategy:
    """A rank's experts are one group of the whole layer's."""
    if isinstance(spec.routing, DeepSeekV3):
        return attrs.evolve(spec.routing, num_expert_group=1, topk_group=1)
    return spec.routing
