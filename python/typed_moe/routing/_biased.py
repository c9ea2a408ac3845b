"""Kernel arguments of the methods that add a correction bias and multiply by a factor."""

from __future__ import annotations

import torch

from typed_moe.routing._limits import beyond, bias_dtype_for, differences, rules_for
from typed_moe.routing._records import GroupLimits, InKernel, KernelRules, Refused, RoutingShape


def grouped_refusal(
    name: str,
    shape: RoutingShape,
    rules: KernelRules,
    *,
    num_expert_group: int,
    topk_group: int,
) -> Refused | None:
    """Why a kernel does not take these groups; None if it does. No groups are one of all experts."""
    method = rules_for(name, rules)
    if isinstance(method, Refused):
        return method
    limits = method.groups
    if num_expert_group == 1:
        return _beyond_kept(name, shape, rules, limits, kept=shape.num_experts)
    if limits is None:
        return Refused(
            f"{rules.kernel} routes {name} without groups; num_expert_group is {num_expert_group}"
        )
    per_group = shape.num_experts // num_expert_group
    for what, got, most in (
        ("num_expert_group", num_expert_group, limits.max_groups),
        ("topk_group", topk_group, limits.max_topk_group),
        ("experts per group", per_group, limits.max_experts_per_group),
    ):
        if got > most:
            return Refused(
                f"{rules.kernel} routes {name} with {what} up to {most}; here it is {got}"
            )
    return _beyond_kept(name, shape, rules, limits, kept=topk_group * per_group)


def _beyond_kept(
    name: str, shape: RoutingShape, rules: KernelRules, limits: GroupLimits | None, *, kept: int
) -> Refused | None:
    if limits is None or not limits.top_k_below_kept or shape.top_k < kept:
        return None
    return Refused(
        f"{rules.kernel} routes {name} with top_k below topk_group * experts per group = {kept}; "
        f"here it is {shape.top_k}"
    )


def biased_in_kernel(
    name: str,
    shape: RoutingShape,
    rules: KernelRules,
    *,
    grouped: bool,
    factor: float,
    correction_bias_dtype: torch.dtype,
) -> InKernel | Refused:
    """The arguments without the groups, or the refusal: size, or a bias that would be rounded."""
    method = rules_for(name, rules)
    if isinstance(method, Refused):
        return method
    tiers = method.grouped_tiers if grouped else method.tiers
    refused = beyond(tiers, shape, rules.kernel, name)
    if refused is not None:
        return refused
    read = method.bias_dtypes
    if grouped and method.grouped_bias_dtype is not None:
        read = (method.grouped_bias_dtype,)
    bias = bias_dtype_for(name, read, correction_bias_dtype, rules.kernel)
    if isinstance(bias, Refused):
        return bias
    return InKernel(
        routing_method_type=name,
        n_group=None,
        topk_group=None,
        routed_scaling_factor=factor,
        norm_topk_prob=True,
        use_routing_scales_on_input=False,
        logits_dtypes=method.logits_dtypes,
        bias_dtype=bias,
        differences=differences(method),
    )
