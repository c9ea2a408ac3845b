"""Reading a kernel's rules: does it route this method at this size, and in which dtypes."""

from __future__ import annotations

import torch

from typed_moe.routing._records import (
    BrokenRows,
    InKernel,
    KernelRules,
    MethodRules,
    Refused,
    RoutingShape,
    Tier,
)


def rules_for(name: str, rules: KernelRules) -> MethodRules | Refused:
    """The kernel's rules for a method, or that it has none."""
    found = rules.methods.get(name)
    if found is not None:
        return found
    reason = rules.refused_methods.get(name)
    return Refused(reason or f"{rules.kernel} has no routing method for {name}")


def beyond(tiers: tuple[Tier, ...], shape: RoutingShape, kernel: str, name: str) -> Refused | None:
    """The refusal of a size that no compiled tier holds; None if one does."""
    if any(tier.holds(shape) for tier in tiers):
        return None
    sizes = " or ".join(str(tier) for tier in tiers) or "no size"
    return Refused(
        f"{kernel} routes {name} for {sizes}; this layer has {shape.num_experts} experts with "
        f"top_k {shape.top_k}"
    )


def plain_in_kernel(
    name: str, shape: RoutingShape, rules: KernelRules, *, norm_topk_prob: bool = True
) -> InKernel | Refused:
    """The arguments of a method that has neither groups, nor bias, nor scale."""
    method = rules_for(name, rules)
    if isinstance(method, Refused):
        return method
    refused = beyond(method.tiers, shape, rules.kernel, name)
    if refused is not None:
        return refused
    return InKernel(
        routing_method_type=name,
        n_group=None,
        topk_group=None,
        routed_scaling_factor=None,
        norm_topk_prob=norm_topk_prob,
        use_routing_scales_on_input=False,
        logits_dtypes=method.logits_dtypes,
        differences=differences(method),
    )


def differences(method: MethodRules) -> tuple[str, ...]:
    """Where a kernel's result is not the strategy's, one sentence each."""
    return (*_score_sentences(method.score_error), *_row_sentences(method.broken_rows))


def _score_sentences(error: float) -> tuple[str, ...]:
    """Half a bfloat16's step, in which weights are given, is a 512th of a value."""
    if not error:
        return ()
    sentence = (
        f"its scores are off by up to {error:.0e} in themselves, so the weights of a token whose "
        f"chosen scores are all below {512 * error:.0e} are off by more than bfloat16 rounds them"
    )
    return (sentence,)


def _row_sentences(rows: BrokenRows) -> tuple[str, ...]:
    said = {"nan": "are NaN", "other": "are not all 0"}
    kinds = (
        ("of NaN", rows.nan),
        ("of -inf", rows.minus_infinity),
        ("with one NaN", rows.one_nan),
    )
    return tuple(
        f"the weights of a row {kind} {said[weights]}; the strategy's are 0"
        for kind, weights in kinds
        if weights != "zero"
    )


def bias_dtype_for(
    name: str, read: tuple[torch.dtype, ...], allowed: torch.dtype, kernel: str
) -> torch.dtype | Refused | None:
    """What to cast the correction bias to for a kernel that reads `read`.

    None if it reads float32, so that the bias goes as stored. bfloat16 only where the
    strategy allows it: 238 distinct float32 biases of one model become 8 in bfloat16
    (sglang#37133).
    """
    if torch.float32 in read:
        return None
    if allowed in read:
        return allowed
    wanted = " or ".join(str(dtype) for dtype in read) or "no dtype at all"
    return Refused(
        f"{kernel} reads the correction bias as {wanted}, which would round it; allow that with "
        f"{name}(correction_bias_dtype=torch.bfloat16)"
    )
