"""`enforce`: what can be refused before a layer is called, when it is made and when its TopK is bound.

What a call is made of is there by then but for its tensors: shape, format, place, activation, and from
the TopK the strategy. SGLang's payload of a call says the same again, and is read then.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, cast, final
from weakref import ReferenceType, ref

import torch

from typed_moe.config import Bf16, Format, Fp8BlockScale, Fp8PerTensor, MxFp4, MxFp8, Nvfp4
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import FlashInferKernel, KernelRequest
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.routing import Refused, RoutingForm, RoutingShape
from typed_moe.runners import decide
from typed_moe.sglang._layers import activation_of, placement_of, refuse_shared_experts
from typed_moe.sglang._ours import RoutedBySglang
from typed_moe.sglang._protocols import LayerLike, RunnerConfigLike, TopKLike
from typed_moe.sglang._topk import TopKConfigLike, read_topk_config
from typed_moe.sglang._translate import RoutedOutside, strategy_of

BACKENDS = frozenset({"flashinfer_trtllm", "flashinfer_trtllm_routed", "flashinfer_mxfp4"})
"""SGLang's names of the backends whose calls are ours in `enforce`."""
LEADING_THERE = BACKENDS | {"experimental_sgl_trtllm"}
"""And of one more whose layers call the same functions where there is no LoRA."""


class EnforcedLayerLike(LayerLike, Protocol):
    """**Protocol:** more of `FusedMoE`."""

    quant_method: object
    runner_backend: object
    moe_runner_config: RunnerConfigLike


class _Fp8(Protocol):
    block_quant: bool
    use_mxfp8: bool


class _MxFp4(Protocol):
    flashinfer_mxfp4_moe_precision: str


def _fp8(method: object) -> Format:
    fp8 = cast("_Fp8", method)
    if fp8.block_quant:
        return MxFp8() if fp8.use_mxfp8 else Fp8BlockScale()
    return Fp8PerTensor()


def _mxfp4(method: object) -> Format:
    bf16 = cast("_MxFp4", method).flashinfer_mxfp4_moe_precision == "bf16"
    return MxFp4(activation="bf16" if bf16 else "mxfp8")


_FORMATS: Mapping[str, Callable[[object], Format]] = MappingProxyType(
    {
        "UnquantizedFusedMoEMethod": lambda _: Bf16(),
        "Fp8MoEMethod": _fp8,
        "ModelOptFp8MoEMethod": lambda _: Fp8PerTensor(),
        "ModelOptNvFp4FusedMoEMethod": lambda _: Nvfp4(),
        "Mxfp4MoEMethod": _mxfp4,
    }
)
"""SGLang's methods whose payload follows from the method; of the others it is read at the first call."""


@final
class LayersAhead:
    """The layers of this process that `enforce` will serve.

    Args:
        library: the FlashInfer to call.
    """

    def __init__(self, library: Callable[[], FlashInferLibrary]) -> None:
        self._library = library
        self._made: dict[tuple[int | None, bool], ReferenceType[LayerLike]] = {}

    def made(self, layer: EnforcedLayerLike) -> None:
        """A layer, as SGLang has constructed it.

        Raises:
            UnsupportedRouting: FlashInfer does not serve it.
        """
        if not runs_trtllm(layer):
            return
        self._made[layer.layer_id, layer.is_draft] = ref(layer)
        request = self._request(layer, layer.moe_runner_config.top_k or 1)
        if request is None:
            return
        refused = FlashInferKernel(self._library()).rules(request)
        if isinstance(refused, Refused):
            raise _not_served(layer, refused.reason)

    def bound(self, topk: TopKLike, method: str | None) -> None:
        """A TopK, after SGLang has bound it to a layer's backend.

        Raises:
            UnsupportedRouting: FlashInfer does not serve what it computes.
            ValueError: its settings are no routing rule.
        """
        held = self._made.get((topk.layer_id, topk.is_draft))
        layer = None if held is None else cast("EnforcedLayerLike | None", held())
        if layer is None:
            return
        config = topk.topk_config
        try:
            rule = strategy_of(read_topk_config(config), method)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{layer.layer_name}: {error}") from error
        request = self._request(layer, config.top_k)
        if request is None:
            return
        # Where no strategy computes it, or SGLang does not leave it to the kernel, its TopK routes.
        given = isinstance(rule, RoutedOutside) or not _is_left_to_the_kernel(config)
        on_input = layer.moe_runner_config.apply_router_weight_on_input
        strategy = RoutedBySglang(weight_on_input=on_input) if given else rule
        assert not isinstance(strategy, RoutedOutside), "SGLang routes those"
        try:
            decide(
                request,
                strategy,
                kernel=FlashInferKernel(self._library()),
                form=RoutingForm.PRECOMPUTED if given else None,
            )
        except UnsupportedRouting as refused:
            raise _not_served(layer, str(refused)) from refused

    def _request(self, layer: EnforcedLayerLike, top_k: int) -> KernelRequest | None:
        """The layer as a kernel sees it; None where only its first call says what it is."""
        make = _FORMATS.get(type(layer.quant_method).__name__)
        if make is None:  # its parameters may have other names, or none yet
            return None
        device = layer.w13_weight.device
        # Off Blackwell SGLang has other kernels for MXFP4, which are not ours to make.
        if _backend(layer) == "flashinfer_mxfp4" and self._library().refuses(device):
            return None
        config = layer.moe_runner_config
        try:
            refuse_shared_experts(config)
            placement = placement_of(layer)
            activation = activation_of(config)
        except UnsupportedRouting as refused:
            raise _not_served(layer, str(refused)) from refused
        quant = make(layer.quant_method)
        # The parameters' widths are the padded ones that a call has.
        rows = layer.w13_weight.shape[1] // (2 if config.is_gated else 1)
        return KernelRequest(
            shape=RoutingShape(num_experts=layer.num_experts, top_k=top_k),
            quant=quant,
            activation=activation,
            placement=placement,
            hidden_size=layer.w2_weight.shape[1],
            intermediate_size=rows * placement.tp_size,
            num_fused_shared_experts=0,
            has_bias=isinstance(quant, MxFp4),
            device=device,
            dtype=torch.bfloat16,
        )


def _backend(layer: EnforcedLayerLike) -> str | None:
    return backend_name(layer.runner_backend)


def backend_name(runner_backend: object) -> str | None:
    """SGLang's name of a backend; None where there is none."""
    value: object = getattr(runner_backend, "value", None)
    return value if isinstance(value, str) else None


def runs_trtllm(layer: EnforcedLayerLike) -> bool:
    """Whether SGLang runs a layer with FlashInfer's trtllm kernels."""
    return _backend(layer) in BACKENDS


def _is_left_to_the_kernel(config: TopKConfigLike) -> bool:
    return getattr(config.output_format, "name", None) == "BYPASSED"


def _not_served(layer: LayerLike, why: str) -> UnsupportedRouting:
    return UnsupportedRouting(
        f"{layer.layer_name}: {why}. TYPED_MOE_SGLANG=observe serves it with SGLang's own call"
    )
