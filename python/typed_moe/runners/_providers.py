"""Kernels that installed libraries bring, and what was measured of them: which a layer takes, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from types import MappingProxyType
from typing import final

import attrs

from typed_moe.kernels import (
    BySizeKernel,
    DeepGemmKernel,
    KernelRequest,
    MoeKernel,
    TritonKernel,
    deep_gemm_layer_refusal,
)
from typed_moe.kernels._measured import PROVIDERS, Choice, card_of, choose
from typed_moe.kernels._times_file import TIMES_VARIABLE, measured_layers
from typed_moe.kernels.by_size import SizedKernel
from typed_moe.routing import Refused


@final
@attrs.frozen(kw_only=True)
class _Provider:
    """How its kernel is made, and what it says to a layer before the library is imported."""

    kernel: Callable[[], SizedKernel]
    refuses: Callable[[KernelRequest], Refused | None]


_PROVIDERS: Mapping[str, _Provider] = MappingProxyType(
    {"deep_gemm": _Provider(kernel=DeepGemmKernel, refuses=deep_gemm_layer_refusal)}
)


@final
@attrs.frozen(kw_only=True)
class Offer:
    """A library's kernel for a layer: with its reason, or refused with one."""

    name: str
    why: str
    kernel: MoeKernel | None


def provider_offers(request: KernelRequest) -> tuple[Offer, ...]:
    """Of every library that was measured in this layer, or is installed and could serve it.

    Raises:
        ValueError: the file that TYPED_MOE_TIMES names is wrong.
    """
    card = card_of(request.device)
    if card is None:
        return ()
    layers = measured_layers(card)
    offers = (_offer(name, request, choose(name, request, layers, card)) for name in PROVIDERS)
    return tuple(offer for offer in offers if offer is not None)


def _offer(name: str, request: KernelRequest, found: Choice | Refused | None) -> Offer | None:
    if isinstance(found, Refused):
        return Offer(name=name, why=found.reason, kernel=None)
    if isinstance(found, Choice):
        kernel = BySizeKernel(
            few=TritonKernel(), many=_PROVIDERS[name].kernel(), least_rows=found.least_rows
        )
        return Offer(name=kernel.name, why=found.why, kernel=kernel)
    return _unmeasured(name, request)


def _unmeasured(name: str, request: KernelRequest) -> Offer | None:
    """Where the library is there and would serve the layer: that nobody knows whether it is faster."""
    if find_spec(name) is None or _PROVIDERS[name].refuses(request) is not None:
        return None
    return Offer(
        name=name,
        why=(
            "could serve this layer, and was not timed at these widths on this card; typed-moe bench "
            f"layer --kernel triton --kernel {name} --json times.json times it, and "
            f"{TIMES_VARIABLE}=times.json takes it where it is faster; kernel= asks for it by name"
        ),
        kernel=None,
    )
