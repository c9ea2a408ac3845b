"""The plan: what was decided when a layer was made, and why."""

from __future__ import annotations

from typing import Literal, final

import attrs
from typing_extensions import override

from typed_moe.kernels import KernelRequest, UnfinalizedRules
from typed_moe.routing import (
    BiasRule,
    InKernel,
    Refused,
    RoutingForm,
    RoutingStrategy,
    Scale,
    ScaleOwner,
)


@final
@attrs.frozen(kw_only=True)
class Candidate:
    """One kernel that was considered, in one routing form, and what became of it."""

    kernel: str
    form: RoutingForm
    taken: bool
    reason: str

    @override
    def __str__(self) -> str:
        verdict = "taken  " if self.taken else "refused"
        return f"{verdict}  {self.kernel}, {self.form.value} routing: {self.reason}"


@final
@attrs.frozen(kw_only=True)
class Plan:
    """What a layer will do, decided at construction.

    Attributes:
        strategy: the routing rule.
        request: the layer: shape, format, activation, placement, widths, device, dtype.
        kernel: the kernel that runs.
        entry_point: the argument record's entry point.
        form: who routes.
        in_kernel: what the kernel is told to route by, None in the precomputed form.
        fused_routing: in the precomputed form, on a CUDA device: whether the fused routing kernel
            routes, or why the strategy does so in PyTorch. None in the other form and elsewhere.
        scale: the factor on the output and its one owner.
        weight_on_input: the routing weight multiplies the expert's input.
        candidates: every kernel and form considered, in order of preference.
        degraded: what is worse than it could be, one sentence each; `strict=True` refuses any.
        unfinalized: the dtypes of `FusedMoE.forward_unfinalized`, or why it is refused.
        exchange: what adds the ranks' partial sums, by name; None leaves it to the caller.
    """

    strategy: RoutingStrategy
    request: KernelRequest
    kernel: str
    entry_point: str
    form: RoutingForm
    in_kernel: InKernel | None
    scale: Scale
    weight_on_input: bool
    candidates: tuple[Candidate, ...]
    degraded: tuple[str, ...]
    unfinalized: UnfinalizedRules | Refused
    exchange: str | None = None
    fused_routing: Literal[True] | Refused | None = None

    @property
    def differences(self) -> tuple[str, ...]:
        """Where the kernel's routing is not the strategy's, one sentence each."""
        return () if self.in_kernel is None else self.in_kernel.differences

    def rows(self) -> tuple[tuple[str, str], ...]:
        """The plan as (what, decision) pairs, in reading order."""
        request, shape = self.request, self.request.shape
        place = request.placement
        first = place.local_expert_offset(shape.num_experts)
        last = first + place.num_local_experts(shape.num_experts) - 1
        return (
            ("strategy", repr(self.strategy)),
            ("experts", _experts_text(request)),
            ("local experts", f"{first} to {last} (ep {place.ep_rank} of {place.ep_size})"),
            ("tensor parallel", f"rank {place.tp_rank} of {place.tp_size}"),
            ("summed over ranks", _sum_text(self)),
            ("format", repr(request.quant)),
            ("activation", repr(request.activation)),
            ("device, dtype", f"{request.device}, {request.dtype}"),
            ("kernel", f"{self.kernel} ({self.entry_point})"),
            ("routing", _form_text(self)),
            ("router logits", _logits_text(self)),
            ("correction bias", _bias_text(self)),
            ("groups", _groups_text(self)),
            ("scale", _scale_text(self.scale)),
            ("weight goes on", "the expert's input" if self.weight_on_input else "its output"),
            ("unfinalized", _unfinalized_text(self.unfinalized)),
        )

    @override
    def __str__(self) -> str:
        width = max(len(what) for what, _ in self.rows())
        lines = [f"{what:<{width}}  {decision}" for what, decision in self.rows()]
        lines += [f"{'kernel differs':<{width}}  {text}" for text in self.differences]
        lines += [f"{'degraded':<{width}}  {text}" for text in self.degraded]
        lines += ["kernels considered:", *(f"  {candidate}" for candidate in self.candidates)]
        return "\n".join(lines)


def _experts_text(request: KernelRequest) -> str:
    shared = request.num_fused_shared_experts
    extra = f" + {shared} fused shared" if shared else ""
    return (
        f"{request.shape.num_experts}{extra}, top_k {request.shape.top_k}, "
        f"hidden {request.hidden_size}, intermediate {request.intermediate_size}"
    )


def _sum_text(plan: Plan) -> str:
    place = plan.request.placement
    if plan.exchange is not None:
        return f"by the layer: {plan.exchange}"
    shards = place.tp_size * place.ep_size
    return "one rank has all" if shards == 1 else f"by the caller, over {shards} ranks"


def _form_text(plan: Plan) -> str:
    if plan.in_kernel is None:
        name = plan.strategy.name
        if plan.fused_routing is True:
            return (
                f"precomputed: {name} by the fused routing kernel, in one launch before the kernel"
            )
        why = "" if plan.fused_routing is None else f" ({plan.fused_routing.reason})"
        return f"precomputed: {name}.select_experts, in PyTorch, before the kernel{why}"
    return f"in the kernel, from logits, as {plan.in_kernel.routing_method_type}"


def _logits_text(plan: Plan) -> str:
    least = plan.strategy.router_logits_dtype
    asked = "any floating dtype" if least is None else f"{least} or better"
    if plan.in_kernel is None:
        return f"{asked}; routed in float32"
    read = ", ".join(str(dtype) for dtype in plan.in_kernel.logits_dtypes)
    return f"{asked}; the kernel reads {read}"


def _bias_text(plan: Plan) -> str:
    if plan.strategy.bias is BiasRule.NONE:
        return "none"
    cast = None if plan.in_kernel is None else plan.in_kernel.bias_dtype
    return "required, in its stored dtype" if cast is None else f"required, cast to {cast}"


def _groups_text(plan: Plan) -> str:
    if plan.in_kernel is None:
        return "the strategy's own; none are passed"
    groups = plan.in_kernel.n_group, plan.in_kernel.topk_group
    return (
        "none are passed" if groups[0] is None else f"n_group {groups[0]}, topk_group {groups[1]}"
    )


def _scale_text(scale: Scale) -> str:
    if scale.owner is ScaleOwner.HOST:
        return "none here; a factor of the model is the model's to apply"
    return f"{scale.factor} by the {scale.owner.value}"


def _unfinalized_text(rules: UnfinalizedRules | Refused) -> str:
    return f"refused: {rules.reason}" if isinstance(rules, Refused) else str(rules)
