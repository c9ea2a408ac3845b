"""A peer: FlashInfer's cuTile backend, which runs on compute capability 8.9, 9.0 and 12.x."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Protocol, cast, final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_shapes import ALL_TOKENS
from typed_moe.cli._bench_weights import StoredLayer
from typed_moe.cli._machine import version_of
from typed_moe.cli._peer import Built, Runnable
from typed_moe.cli._peer_routing import route_in_torch
from typed_moe.config import Bf16, Format, MxFp4, Swiglu
from typed_moe.routing import Refused

_ROUNDINGS = 3  # the first product's rows, in bfloat16 before the activation, and its factors


@final
@attrs.frozen(kw_only=True)
class _Backend:
    """FlashInfer's names for a format, and the tensors that its layout is made of."""

    key: str
    config: str
    weight: str
    tensors: tuple[str, ...]


_BACKENDS: Mapping[Format, _Backend] = MappingProxyType(
    {
        Bf16(): _Backend(
            key="cutile_bf16",
            config="CuTileBf16Config",
            weight="BF16",
            tensors=("w13_weight", "w2_weight"),
        ),
        MxFp4(activation="bf16"): _Backend(
            key="cutile_mxfp4",
            config="CuTileMxfp4Bf16Config",
            weight="MXFP4",
            tensors=("w13_weight", "w13_weight_scale", "w2_weight", "w2_weight_scale"),
        ),
    }
)


class _MoELayer(Protocol):
    """`flashinfer.fused_moe.MoELayer`."""

    def __call__(self, act_pack: object, weight_pack: object, /) -> Tensor: ...


@final
@attrs.frozen(kw_only=True)
class FlashInferCuTile:
    """`flashinfer.fused_moe.MoELayer` with the cuTile backend alone, autotuned at each T.

    It takes precomputed routing, which is PyTorch's operators here.
    """

    name: str = "flashinfer-cutile"

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        """With the weights in its own layout, a second copy."""
        first = stored[0]
        if first.quant not in _BACKENDS:
            return Refused(
                "FlashInfer's cuTile backend is timed in bf16, and in mxfp4 with bfloat16 activations"
            )
        plain = first.shape.activation == Swiglu() and not first.shape.has_bias
        if not plain or first.shape.routing.apply_router_weight_on_input:
            return Refused(
                "is timed with plain SwiGLU experts, without biases, weighted at their output"
            )
        version = version_of("flashinfer-python")
        if version is None:
            return Refused("flashinfer is not installed; pip install typed-moe[flashinfer]")
        try:
            made = _make(stored)
        except torch.OutOfMemoryError:
            raise
        # An installation in parts fails in many ways, each with its own sentence.
        except Exception as error:  # noqa: BLE001
            return Refused(f"flashinfer {version}: {' '.join(str(error).split())[:300]}")
        return attrs.evolve(made, about=f"flashinfer {version}, cuTile, autotuned at each T")


def _make(stored: Sequence[StoredLayer]) -> Built:
    fused_moe = importlib.import_module("flashinfer.fused_moe")
    autotune = importlib.import_module("flashinfer.autotuner").autotune
    layer = _layer(fused_moe, stored[0])
    runs = tuple(_run(fused_moe, layer, one) for one in stored)

    def tune(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        with autotune(True):
            return runs[0](hidden_states, router_logits)

    return Built(layers=runs, about="", roundings=_ROUNDINGS, tune=tune)


def _layer(fused_moe: ModuleType, stored: StoredLayer) -> _MoELayer:
    shape, backend = stored.shape, _BACKENDS[stored.quant]
    weight = getattr(fused_moe.QuantFormat, backend.weight)
    config = fused_moe.MoEConfig(
        routing=fused_moe.RoutingConfig(num_experts=shape.num_experts, top_k=shape.top_k),
        quant=fused_moe.QuantConfig(weight=weight),
        experts=fused_moe.ExpertConfig(intermediate_size=shape.intermediate_size),
        backend=fused_moe.BackendOptions(candidates=(getattr(fused_moe, backend.config)(),)),
        execution=fused_moe.ExecutionConfig(tune_max_num_tokens=max(ALL_TOKENS)),
    )
    return cast("_MoELayer", fused_moe.MoELayer(config))


def weight_view(fused_moe: ModuleType, stored: StoredLayer) -> Mapping[str, Tensor]:
    """The weights in the backend's layout. FlashInfer's own order is the up projection's rows first."""
    shape, backend = stored.shape, _BACKENDS[stored.quant]
    given = []
    for name in backend.tensors:
        tensor = stored.state[name]
        if name.startswith("w13"):
            gate, up = tensor.chunk(2, dim=1)
            tensor = torch.cat((up, gate), dim=1)
        given.append(tensor)
    view: Mapping[str, Tensor] = getattr(fused_moe, backend.config).prepare_weights(
        *given,
        num_local_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
    )
    return view


def _run(fused_moe: ModuleType, layer: _MoELayer, stored: StoredLayer) -> Runnable:
    shape, bias = stored.shape, stored.correction_bias
    weights = fused_moe.MoEWeightPack()
    weights.prepare_for(_BACKENDS[stored.quant].key, weight_view(fused_moe, stored))

    def run(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        routed = route_in_torch(shape, router_logits, bias)
        given = fused_moe.MoEActivationPack(
            hidden_states,
            None,
            topk_ids=routed.topk_ids.int(),
            topk_weights=routed.topk_weights,
        )
        return layer(given, weights)

    return run
