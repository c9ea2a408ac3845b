"""`--moe-runner-backend typed_moe`, and `FusedMoE(..., routing=...)`: SGLang's layer, our runners."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Protocol, cast

from torch import Tensor, nn

from typed_moe.errors import UnsupportedRouting
from typed_moe.layer._checks import check_routing
from typed_moe.routing import RoutingStrategy
from typed_moe.runners import Plan
from typed_moe.sglang._function import PackedExperts
from typed_moe.sglang._method import TypedMoeMethod, method_of
from typed_moe.sglang._protocols import Function, TopKLike
from typed_moe.sglang._scale import Block
from typed_moe.sglang._seam import SeamLayerLike

BACKEND = "typed_moe"
"""The name that `--moe-runner-backend` takes."""

_MOE = "sglang.srt.layers.moe"
_CORE = "run_moe_core"


class _Named(Protocol):
    value: str


def offer_backend() -> None:
    """Make SGLang take the name, on its command line and in its own configuration."""
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    if BACKEND not in choices.MOE_RUNNER_BACKEND_CHOICES:
        choices.add_moe_runner_backend_choices([BACKEND])
    importlib.import_module(f"{_MOE}.utils").register_moe_runner_backend_name(BACKEND)


def build_layer(
    original: Function, layer: SeamLayerLike, args: tuple[object, ...], kwargs: Mapping[str, object]
) -> None:
    """SGLang's `FusedMoE.__init__`, with our quantisation method where it is asked for.

    Args:
        original: the constructor.
        layer: what it makes.
        args: as it was called.
        kwargs: as it was called; `routing` and `e_score_correction_bias` are ours, and with
            `routing` the layer is ours whatever backend the server has.

    Raises:
        TypeError: `routing` is no strategy.
        ValueError: `e_score_correction_bias` without `routing`.
        UnsupportedRouting: nothing of ours serves the layer.
    """
    given = dict(kwargs)
    routing = cast("RoutingStrategy | None", given.pop("routing", None))
    bias = cast("Tensor | None", given.pop("e_score_correction_bias", None))
    if routing is None and bias is not None:
        raise ValueError(
            "e_score_correction_bias was given without routing=; SGLang's own layers take the bias "
            "in their TopK"
        )
    if routing is None and server_backend() != BACKEND:
        original(layer, *args, **given)
        return
    if routing is not None:
        check_routing(routing)
    _refuse_own_core(layer)
    bound = inspect.signature(original).bind(layer, *args, **given).arguments
    given["quant_method"] = _method_class()(
        quant_config=bound.get("quant_config"),
        quant_method=bound.get("quant_method"),
        prefix=str(bound.get("prefix", "")),
        routing=routing,
        e_score_correction_bias=bias,
        block=_block(layer),
    )
    original(layer, *args, **given)
    ours = cast("TypedMoeMethod", layer.quant_method)
    ours.finish(layer)


def _refuse_own_core(layer: object) -> None:
    """Refuse a subclass of SGLang's layer that runs its experts without its quantisation method.

    Raises:
        UnsupportedRouting: it is one, such as DeepEPMoE, which takes what DeepEP has dispatched.
    """
    plain = importlib.import_module(f"{_MOE}.fused_moe_triton.layer").FusedMoE
    if getattr(type(layer), _CORE) is not getattr(plain, _CORE):
        raise UnsupportedRouting(
            f"{type(layer).__name__} runs its experts itself ({_CORE}), on tokens that its own "
            "dispatcher has sent; typed-moe's runners are there for FusedMoE, with "
            "--moe-a2a-backend none"
        )


def server_backend() -> str:
    """The value of `--moe-runner-backend` in this process."""
    get = cast(
        "Callable[[], _Named]", importlib.import_module(f"{_MOE}.utils").get_moe_runner_backend
    )
    return get().value


@functools.cache
def _method_class() -> type[TypedMoeMethod]:
    """`TypedMoeMethod` as one of SGLang's own, which its model loader asks for by class."""
    base = cast(
        "type",
        importlib.import_module("sglang.srt.layers.quantization.base_config").FusedMoEMethodBase,
    )
    made: object = type("TypedMoeMethod", (TypedMoeMethod, base), {"__module__": __name__})
    return cast("type[TypedMoeMethod]", made)


def _block(layer: object) -> Block:
    """The model's block that makes the layer: the nearest module whose constructor is running.

    On CUDA no block of SGLang's multiplies by itself, and nothing is looked at.
    """
    if _on_cuda():
        return Block(name=None, multiplies=False)
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - who calls is not said otherwise
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner is not layer:
            return Block.of(type(owner))
        frame = frame.f_back
    return Block(name=None, multiplies=False)


def _on_cuda() -> bool:
    return bool(importlib.import_module("sglang.srt.utils").is_cuda())


def plans_of(layer: object) -> tuple[Plan, ...]:
    """What was decided for one of SGLang's layers, for each way of routing it.

    Args:
        layer: a `FusedMoE` of SGLang's; empty for one that is not on our runners.
    """
    method: object = getattr(layer, "quant_method", None)
    return method.experts.plans if isinstance(method, TypedMoeMethod) else ()


def bind_topk(topk: TopKLike, runner_backend: object, method: str | None) -> None:
    """What a model binds to its TopK: if it is a layer of ours, the two are planned together.

    Args:
        topk: SGLang's.
        runner_backend: of the layer.
        method: the name of the model's routing method.

    Raises:
        ValueError: the TopK computes another rule than the layer's `routing`.
        UnsupportedRouting: no kernel of ours serves what it computes.
    """
    ours = method_of(runner_backend)
    if ours is None or not ours.bind(topk, method):
        return
    formats = importlib.import_module(f"{_MOE}.topk").TopKOutputFormat
    topk.topk_config.output_format = formats.BYPASSED
    # Off CUDA SGLang's TopK would route all the same; this is the one that hands on the logits.
    topk._forward_method = topk.forward_cuda  # noqa: SLF001 - as SGLang's own classes pin it


def around_packed(original: Function, *args: object, **kwargs: object) -> object:
    """SGLang's `fused_moe`, which is ours where the server's backend is.

    Raises:
        UnsupportedRouting: nothing of ours serves the call.
    """
    if server_backend() != BACKEND:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.apply_defaults()
    return _packed(**bound.arguments)


_packed = PackedExperts()
