"""A peer: the experts of Hugging Face's transformers, with its grouped_mm implementation."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Protocol, cast, final

import attrs
import torch
from torch import Tensor, nn

from typed_moe.cli._bench_weights import StoredLayer
from typed_moe.cli._machine import version_of
from typed_moe.cli._peer import Built, Runnable
from typed_moe.cli._peer_routing import route_in_torch
from typed_moe.config import Bf16, Swiglu
from typed_moe.routing import Refused

_MODULE = "transformers.models.qwen3_moe"
_ROUNDINGS = 6  # as in `_peer_torch`


class _Experts(Protocol):
    gate_up_proj: nn.Parameter
    down_proj: nn.Parameter

    def __call__(self, hidden_states: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor: ...


class _Config(Protocol):
    _experts_implementation: str


class _MakeConfig(Protocol):
    def __call__(
        self, *, hidden_size: int, moe_intermediate_size: int, num_experts: int, hidden_act: str
    ) -> _Config: ...


class _MakeExperts(Protocol):
    def __call__(self, config: _Config, /) -> _Experts: ...


@final
@attrs.frozen(kw_only=True)
class Transformers:
    """`Qwen3MoeExperts`, whose experts are those of most SwiGLU models, as transformers runs them.

    Routing is PyTorch's operators, as in transformers' own blocks.
    """

    name: str = "transformers"

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        """Over the stored tensors themselves: transformers keeps them in the same order."""
        first = stored[0]
        if not isinstance(first.quant, Bf16):
            return Refused("transformers' grouped_mm experts take bfloat16 alone")
        plain = first.shape.activation == Swiglu() and not first.shape.has_bias
        if not plain or first.shape.routing.apply_router_weight_on_input:
            return Refused(
                "is timed with plain SwiGLU experts, without biases, weighted at their output"
            )
        version = version_of("transformers")
        if version is None:
            return Refused("transformers is not installed; pip install transformers")
        try:
            layers = tuple(_layer(one) for one in stored)
        except (ImportError, AttributeError) as error:
            return Refused(f"transformers {version} has no such experts ({error})")
        return Built(
            layers=layers,
            about=f"transformers {version}, Qwen3MoeExperts with grouped_mm",
            roundings=_ROUNDINGS,
        )


def _layer(stored: StoredLayer) -> Runnable:
    shape, bias = stored.shape, stored.correction_bias
    experts = _experts(stored)

    def run(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        routed = route_in_torch(shape, router_logits, bias)
        weights = routed.topk_weights.to(hidden_states.dtype)
        return experts(hidden_states, routed.topk_ids.long(), weights)

    return run


def _experts(stored: StoredLayer) -> _Experts:
    configs = importlib.import_module(f"{_MODULE}.configuration_qwen3_moe")
    modeling = importlib.import_module(f"{_MODULE}.modeling_qwen3_moe")
    shape = stored.shape
    config = cast("_MakeConfig", configs.Qwen3MoeConfig)(
        hidden_size=shape.hidden_size,
        moe_intermediate_size=shape.intermediate_size,
        num_experts=shape.num_experts,
        hidden_act="silu",
    )
    config._experts_implementation = "grouped_mm"  # noqa: SLF001 - what the model's option sets
    with torch.device("meta"):
        experts = cast("_MakeExperts", modeling.Qwen3MoeExperts)(config)
    experts.gate_up_proj = nn.Parameter(stored.state["w13_weight"], requires_grad=False)
    experts.down_proj = nn.Parameter(stored.state["w2_weight"], requires_grad=False)
    return experts
