"""Deciding: strategy x format x placement x device x kernel, once, at construction."""

from __future__ import annotations

from typing import final

import attrs

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import (
    FromLogits,
    KernelRequest,
    MoeKernel,
    Precomputed,
    ReferenceKernel,
    entry_point,
)
from typed_moe.kernels.flashinfer_facts import family_of
from typed_moe.routing import (
    InKernel,
    KernelRules,
    Refused,
    RoutingForm,
    RoutingStrategy,
)
from typed_moe.runners._flashinfer_candidates import flashinfer_candidates
from typed_moe.runners._plan import Candidate, Plan


@final
@attrs.frozen(kw_only=True)
class Decision:
    """A plan and the kernel that it names."""

    plan: Plan
    kernel: MoeKernel


def decide(
    request: KernelRequest,
    strategy: RoutingStrategy,
    *,
    kernel: MoeKernel | None = None,
    form: RoutingForm | None = None,
    strict: bool = False,
    exchange: str | None = None,
) -> Decision:
    """Choose the kernel and the routing form of a layer.

    Args:
        request: the layer.
        strategy: the routing rule.
        kernel: the only kernel to consider; None chooses.
        form: the only routing form to consider; None prefers the kernel's own routing.
        strict: refuse a plan that is degraded in any way.
        exchange: the name of what adds the ranks' partial sums; None leaves it to the caller.

    Returns:
        The plan and the kernel.

    Raises:
        UnsupportedRouting: nothing serves the layer, or strict refuses what would; the message
            lists every candidate with its reason.
        ValueError: the strategy's maths is not defined for the layer's shape.
    """
    strategy.check(request.shape)
    refused = () if kernel is not None else flashinfer_candidates(request, strategy)
    chosen = kernel if kernel is not None else _embedded(request)
    if isinstance(chosen, Refused):
        raise _nothing_serves((*refused, _refusal("reference", RoutingForm.IN_KERNEL, chosen)))
    rules = chosen.rules(request)
    if isinstance(rules, Refused):
        raise _nothing_serves((*refused, _refusal(chosen.name, RoutingForm.IN_KERNEL, rules)))
    plan = _plan(request, strategy, chosen, rules, refused, form)
    if strict and plan.degraded:
        raise UnsupportedRouting("strict=True refuses: " + "; ".join(plan.degraded))
    return Decision(plan=attrs.evolve(plan, exchange=exchange), kernel=chosen)


def _embedded(request: KernelRequest) -> MoeKernel | Refused:
    """The reference kernel, where it runs without being asked for."""
    if request.device.type == "cuda":
        return Refused(
            "runs on a CUDA device only when asked for; pass kernel=ReferenceKernel() to run it "
            "in float32 PyTorch there"
        )
    return ReferenceKernel()


def _plan(
    request: KernelRequest,
    strategy: RoutingStrategy,
    kernel: MoeKernel,
    rules: KernelRules,
    refused: tuple[Candidate, ...],
    form: RoutingForm | None,
) -> Plan:
    in_kernel = strategy.in_kernel(request.shape, rules)
    if isinstance(in_kernel, Refused) and form is RoutingForm.IN_KERNEL:
        raise UnsupportedRouting(
            f"routing_form=RoutingForm.IN_KERNEL was asked for: {in_kernel.reason}; leave it out "
            "to route before the kernel"
        )
    if isinstance(in_kernel, Refused) or form is RoutingForm.PRECOMPUTED:
        taken, args = RoutingForm.PRECOMPUTED, None
    else:
        taken, args = RoutingForm.IN_KERNEL, in_kernel
    candidates = (*refused, *_considered(kernel.name, in_kernel, taken))
    return Plan(
        strategy=strategy,
        request=request,
        kernel=kernel.name,
        entry_point=entry_point(
            family_of(request.quant) or "bf16", Precomputed if args is None else FromLogits
        ),
        form=taken,
        in_kernel=args,
        scale=strategy.scale(taken),
        weight_on_input=strategy.apply_router_weight_on_input,
        candidates=candidates,
        degraded=_degraded(in_kernel),
    )


def _considered(
    name: str, in_kernel: InKernel | Refused, taken: RoutingForm
) -> tuple[Candidate, ...]:
    """The chosen kernel's two forms."""
    if isinstance(in_kernel, Refused):
        first = _refusal(name, RoutingForm.IN_KERNEL, in_kernel)
        why = "any strategy runs so"
    elif taken is RoutingForm.PRECOMPUTED:
        first = _refusal(name, RoutingForm.IN_KERNEL, Refused("precomputed routing was asked for"))
        why = "it was asked for"
    else:
        return (
            Candidate(
                kernel=name, form=taken, taken=True, reason="serves this layer on this device"
            ),
        )
    return (
        first,
        Candidate(kernel=name, form=RoutingForm.PRECOMPUTED, taken=True, reason=why),
    )


def _degraded(in_kernel: InKernel | Refused) -> tuple[str, ...]:
    if isinstance(in_kernel, Refused):
        return (f"routing runs before the kernel, in PyTorch: {in_kernel.reason}",)
    if in_kernel.bias_dtype is not None:
        return (f"the correction bias is rounded to {in_kernel.bias_dtype} for the kernel",)
    return ()


def _refusal(kernel: str, form: RoutingForm, refused: Refused) -> Candidate:
    return Candidate(kernel=kernel, form=form, taken=False, reason=refused.reason)


def _nothing_serves(candidates: tuple[Candidate, ...]) -> UnsupportedRouting:
    listed = "\n".join(f"  {candidate}" for candidate in candidates)
    return UnsupportedRouting(f"no kernel serves this layer:\n{listed}")
