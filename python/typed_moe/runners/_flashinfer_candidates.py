"""What FlashInfer's entry points would do with a layer, for the plan to show."""

from __future__ import annotations

from typed_moe.config import Bf16, Fp8BlockScale, Swiglu, Unquantized
from typed_moe.kernels import FromLogits, KernelRequest, Precomputed, entry_point
from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.routing import KernelRules, Refused, RoutingForm, RoutingStrategy
from typed_moe.runners._plan import Candidate


def flashinfer_candidates(
    request: KernelRequest, strategy: RoutingStrategy
) -> tuple[Candidate, ...]:
    """FlashInfer's two entry points for the layer's format, each with why it is refused."""
    family = facts.family_of(request.quant)
    if family is None:
        return (
            Candidate(
                kernel="flashinfer",
                form=RoutingForm.IN_KERNEL,
                taken=False,
                reason=f"no entry point takes unquantised {request.dtype} weights",
            ),
        )
    rules = KernelRules(
        kernel=entry_point(family, FromLogits),
        methods=facts.METHODS,
        weight_on_input=family in facts.WEIGHT_ON_INPUT,
        source=f"flashinfer-python {facts.VERSION}",
    )
    common = _layer_reasons(request)
    in_kernel = strategy.in_kernel(request.shape, rules)
    routing = (in_kernel.reason,) if isinstance(in_kernel, Refused) else ()
    return tuple(
        Candidate(
            kernel=f"flashinfer {entry_point(family, mode)}",
            form=form,
            taken=False,
            reason="; ".join(reasons),
        )
        for form, mode, reasons in (
            (RoutingForm.IN_KERNEL, FromLogits, common + routing),
            (RoutingForm.PRECOMPUTED, Precomputed, common),
        )
    )


def _layer_reasons(request: KernelRequest) -> tuple[str, ...]:
    """Why neither entry point runs this layer, apart from the routing."""
    reasons = []
    if request.device.type != "cuda":
        reasons.append(f"runs on {facts.DEVICES}; this layer is on {request.device}")
    else:
        reasons.append("typed-moe does not call FlashInfer yet")
    family = facts.family_of(request.quant)
    if request.has_bias and family not in facts.EXPERT_BIAS:
        reasons.append("takes no expert biases in this format")
    if isinstance(request.quant, Fp8BlockScale):
        if not isinstance(request.activation, Swiglu):
            reasons.append("takes Swiglu alone in this format")
        if request.shape.num_experts % 4:
            reasons.append(f"num_experts is {request.shape.num_experts}, not a multiple of 4")
    if isinstance(request.quant, Unquantized | Bf16) and request.intermediate_size % 128:
        reasons.append(f"intermediate_size is {request.intermediate_size}, not a multiple of 128")
    return tuple(reasons)
