"""Deciding: strategy x format x placement x device x kernel, once, at construction."""

from __future__ import annotations

from typing import final

import attrs
import torch

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import (
    FlashInferKernel,
    FromLogits,
    FusedRouting,
    KernelRequest,
    MoeKernel,
    Precomputed,
    ReferenceKernel,
    Routing,
    TritonKernel,
    UnfinalizedKernel,
    UnfinalizedRules,
    entry_point,
    fused_routing,
    installed_flashinfer,
)
from typed_moe.kernels.flashinfer_facts import family_of
from typed_moe.routing import (
    InKernel,
    KernelRules,
    PrecomputedRules,
    Refused,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
)
from typed_moe.runners._flashinfer_candidates import flashinfer_candidates
from typed_moe.runners._plan import Candidate, Plan
from typed_moe.runners._providers import Offer, provider_offers


@final
@attrs.frozen(kw_only=True)
class Decision:
    """A plan and the kernel that it names.

    `routing`: the fused routing kernel, where the plan says that it routes.
    """

    plan: Plan
    kernel: MoeKernel
    routing: FusedRouting | None = None


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
    considered: list[Candidate] = []
    for option in _options(request, kernel):
        taken = _take(option, request, strategy, form)
        considered += taken.candidates
        if taken.kernel is None:
            continue
        routing = _routing(request, strategy, taken)
        plan = _plan(request, strategy, taken, tuple(considered), routing)
        if strict and plan.degraded:
            raise UnsupportedRouting("strict=True refuses: " + "; ".join(plan.degraded))
        if exchange is not None:
            plan = attrs.evolve(plan, exchange=exchange, unfinalized=_ADDS_UP)
        return Decision(
            plan=plan,
            kernel=taken.kernel,
            routing=routing if isinstance(routing, FusedRouting) else None,
        )
    raise _nothing_serves(considered)


_ADDS_UP = Refused(
    "the layer's exchange adds the ranks' sums up, so there has to be one of each; make the layer "
    "without exchange and add up yourself"
)


@final
@attrs.frozen
class _Absent:
    """A kernel that is not there to be asked, and why."""

    name: str
    refused: Refused


@final
@attrs.frozen
class _Option:
    """A kernel to be asked, and what was measured of it, if it comes before the next one for that."""

    kernel: MoeKernel
    measured: str | None = None

    def said(self, reason: str) -> str:
        """The reason, and what was measured."""
        return reason if self.measured is None else f"{reason}; {self.measured}"


def _options(request: KernelRequest, kernel: MoeKernel | None) -> tuple[_Option | _Absent, ...]:
    """The kernels to consider, the preferred one first."""
    if kernel is not None:
        return (_Option(kernel),)
    library = installed_flashinfer(request.device)
    fused: _Option | _Absent
    if isinstance(library, Refused):
        fused = _Absent("flashinfer", library)
    else:
        fused = _Option(FlashInferKernel(library))
    if request.device.type != "cuda":
        return (fused, _Option(ReferenceKernel()))
    only_if_asked = Refused(
        "runs on a CUDA device only when asked for; pass kernel=ReferenceKernel() to run it in "
        "float32 PyTorch there"
    )
    measured = (_measured(offer) for offer in provider_offers(request))
    return (fused, *measured, _Option(TritonKernel()), _Absent("reference", only_if_asked))


def _measured(offer: Offer) -> _Option | _Absent:
    """A library's kernel: by what was measured faster than the next one, or not to be asked."""
    if offer.kernel is None:
        return _Absent(offer.name, Refused(offer.why))
    return _Option(offer.kernel, offer.why)


@final
@attrs.frozen(kw_only=True)
class _Taken:
    """What became of one kernel: its candidates, and the kernel if it is the one."""

    candidates: tuple[Candidate, ...]
    kernel: MoeKernel | None = None
    form: RoutingForm = RoutingForm.PRECOMPUTED
    in_kernel: InKernel | Refused | None = None
    packed: bool = False


def _take(
    option: _Option | _Absent,
    request: KernelRequest,
    strategy: RoutingStrategy,
    form: RoutingForm | None,
) -> _Taken:
    if isinstance(option, _Absent):
        if option.name == "flashinfer":
            return _Taken(candidates=flashinfer_candidates(request, strategy, option.refused))
        candidate = _candidate(option.name, RoutingForm.IN_KERNEL, option.refused.reason)
        return _Taken(candidates=(candidate,))
    kernel = option.kernel
    name, rules = kernel.name, kernel.rules(request)
    if isinstance(rules, Refused):
        candidate = _candidate(name, RoutingForm.IN_KERNEL, option.said(rules.reason))
        return _Taken(candidates=(candidate,))
    in_kernel = strategy.in_kernel(request.shape, rules)
    if form is RoutingForm.PRECOMPUTED and isinstance(in_kernel, InKernel):
        in_kernel = Refused("precomputed routing was asked for")
    if isinstance(in_kernel, InKernel):
        why = option.said("serves this layer on this device")
        candidate = _candidate(name, RoutingForm.IN_KERNEL, why, taken=True)
        return _Taken(
            candidates=(candidate,),
            kernel=kernel,
            form=RoutingForm.IN_KERNEL,
            in_kernel=in_kernel,
        )
    first = _candidate(name, RoutingForm.IN_KERNEL, in_kernel.reason)
    given = _precomputed(rules, request)
    if form is RoutingForm.IN_KERNEL:
        given = Refused(
            "routing_form=RoutingForm.IN_KERNEL was asked for; leave it out to route before the "
            "kernel"
        )
    if isinstance(given, Refused):
        second = _candidate(name, RoutingForm.PRECOMPUTED, given.reason)
        return _Taken(candidates=(first, second))
    why = "it was asked for" if form is RoutingForm.PRECOMPUTED else "any strategy runs so"
    second = _candidate(name, RoutingForm.PRECOMPUTED, option.said(why), taken=True)
    return _Taken(
        candidates=(first, second), kernel=kernel, in_kernel=in_kernel, packed=given.packed
    )


def _precomputed(rules: KernelRules, request: KernelRequest) -> PrecomputedRules | Refused:
    """What the kernel takes in place of logits at this size."""
    given = rules.precomputed
    shared = request.num_fused_shared_experts
    shape = RoutingShape(
        num_experts=request.shape.num_experts + shared, top_k=request.shape.top_k + shared
    )
    if isinstance(given, Refused) or any(tier.holds(shape) for tier in given.tiers):
        return given
    sizes = " or ".join(str(tier) for tier in given.tiers)
    return Refused(
        f"takes ids for {sizes}; this layer has {shape.num_experts} experts with "
        f"top_k {shape.top_k}, fused shared experts among them"
    )


def _routing(
    request: KernelRequest, strategy: RoutingStrategy, taken: _Taken
) -> FusedRouting | Refused | None:
    """What routes before the kernel: the fused routing kernel, or why not; None off a CUDA device.

    On a CPU the strategy's own `select_experts` is the road, not a fallback.
    """
    if isinstance(taken.in_kernel, InKernel) or request.device.type != "cuda":
        return None
    return fused_routing(strategy, shape=request.shape, device=request.device)


def _plan(
    request: KernelRequest,
    strategy: RoutingStrategy,
    taken: _Taken,
    candidates: tuple[Candidate, ...],
    routing: FusedRouting | Refused | None,
) -> Plan:
    assert taken.kernel is not None, "a kernel was taken"
    args = taken.in_kernel if isinstance(taken.in_kernel, InKernel) else None
    mode = Precomputed if args is None else FromLogits
    return Plan(
        strategy=strategy,
        request=request,
        kernel=taken.kernel.name,
        entry_point=entry_point(family_of(request.quant) or "bf16", mode),
        form=taken.form,
        in_kernel=args,
        scale=strategy.scale(taken.form),
        weight_on_input=strategy.apply_router_weight_on_input,
        candidates=candidates,
        degraded=_degraded(
            taken,
            weight_on_input=strategy.apply_router_weight_on_input,
            fused=isinstance(routing, FusedRouting),
        ),
        unfinalized=_unfinalized(taken.kernel, request, mode),
        fused_routing=True if isinstance(routing, FusedRouting) else routing,
    )


def _unfinalized(
    kernel: MoeKernel, request: KernelRequest, mode: type[Routing]
) -> UnfinalizedRules | Refused:
    if isinstance(kernel, UnfinalizedKernel):
        return kernel.unfinalized_rules(request, mode)
    return Refused(f"{kernel.name} has no unfinalized(), as UnfinalizedKernel asks")


def _degraded(taken: _Taken, *, weight_on_input: bool, fused: bool) -> tuple[str, ...]:
    told = taken.in_kernel
    assert told is not None, "a kernel was taken"
    if isinstance(told, InKernel):
        rounded = []
        if told.bias_dtype is not None:
            rounded.append(f"the correction bias is rounded to {told.bias_dtype} for the kernel")
        if torch.float32 not in told.logits_dtypes:
            rounded.append(f"router logits are rounded to {told.logits_dtypes[0]} for the kernel")
        return tuple(rounded)
    where = "in one launch of its own" if fused else "in PyTorch"
    reasons = [f"routing runs before the kernel, {where}: {told.reason}"]
    # A weight that was put on the input is 1 in the packed word.
    if taken.packed and not weight_on_input:
        reasons.append("the weights are rounded to bfloat16: this release takes them packed")
    return tuple(reasons)


def _candidate(name: str, form: RoutingForm, reason: str, *, taken: bool = False) -> Candidate:
    return Candidate(kernel=name, form=form, taken=taken, reason=reason)


def _nothing_serves(candidates: list[Candidate]) -> UnsupportedRouting:
    listed = "\n".join(f"  {candidate}" for candidate in candidates)
    return UnsupportedRouting(f"no kernel serves this layer:\n{listed}")
