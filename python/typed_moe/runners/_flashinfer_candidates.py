"""What FlashInfer would do with a layer that is not on one of its GPUs, for the plan to show."""

from __future__ import annotations

from importlib import metadata

from typed_moe.kernels import (
    FromLogits,
    KernelRequest,
    Precomputed,
    entry_point,
    flashinfer_layer_refusal,
)
from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.kernels.flashinfer_versions import Version, parse_version
from typed_moe.routing import KernelRules, Refused, RoutingForm, RoutingStrategy
from typed_moe.runners._plan import Candidate


def flashinfer_candidates(
    request: KernelRequest, strategy: RoutingStrategy, absent: Refused
) -> tuple[Candidate, ...]:
    """The two entry points of the layer's format, each with every reason against it.

    Args:
        request: the layer.
        strategy: its routing rule.
        absent: why FlashInfer is not asked itself.
    """
    family = facts.family_of(request.quant)
    if family is None:
        reason = f"no entry point takes unquantised {request.dtype} weights"
        return (
            Candidate(kernel="flashinfer", form=RoutingForm.IN_KERNEL, taken=False, reason=reason),
        )
    version = _version()
    methods, refused = facts.methods(version, family)
    rules = KernelRules(
        kernel=entry_point(family, FromLogits),
        methods=methods,
        refused_methods=refused,
        weight_on_input=family in facts.WEIGHT_ON_INPUT,
        source="the table of releases",
    )
    layer = flashinfer_layer_refusal(request)
    reasons = [absent.reason] if layer is None else [absent.reason, layer.reason]
    routing = strategy.in_kernel(request.shape, rules)
    in_kernel = [*reasons, routing.reason] if isinstance(routing, Refused) else reasons
    return tuple(
        Candidate(
            kernel=f"flashinfer {entry_point(family, mode)}",
            form=form,
            taken=False,
            reason="; ".join(against),
        )
        for form, mode, against in (
            (RoutingForm.IN_KERNEL, FromLogits, in_kernel),
            (RoutingForm.PRECOMPUTED, Precomputed, reasons),
        )
    )


def _version() -> Version:
    """Of the installed FlashInfer, which is not imported for this; else the newest in the table."""
    try:
        text = metadata.version("flashinfer-python")
    except metadata.PackageNotFoundError:
        text = facts.NEWEST
    version = parse_version(text)
    return facts.OLDEST if isinstance(version, Refused) else version
