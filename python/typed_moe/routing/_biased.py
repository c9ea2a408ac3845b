"""Kernel arguments of the methods that add a correction bias and multiply by a factor."""

from __future__ import annotations

import torch

from typed_moe.routing._limits import beyond, bias_dtype_for, rules_for
from typed_moe.routing._records import InKernel, KernelRules, Refused, RoutingShape


def grouped_refusal(
    name: str,
    shape: RoutingShape,
    rules: KernelRules,
    *,
    num_expert_group: int,
    topk_group: int,
) -> Refused | None:
    """Why a kernel does not take these groups; None if it does, or if there are none."""
    if num_expert_group == 1:
        return None
    method = rules_for(name, rules)
    if isinstance(method, Refused):
        return method
    limits = method.groups
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
    if limits.top_k_below_kept and shape.top_k >= topk_group * per_group:
        return Refused(
            f"{rules.kernel} routes {name} with top_k below topk_group * experts per group = "
            f"{topk_group * per_group}; here it is {shape.top_k}"
        )
    return None


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
    )
