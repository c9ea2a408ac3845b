"""What every runner shares: its settings, its weights, and the routing half of a call."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, final

import torch
from torch import Tensor

from typed_moe.kernels import (
    ExpertArgs,
    ExpertWeights,
    FromLogits,
    Precomputed,
    Routing,
    activation_arguments,
    append_shared,
)
from typed_moe.routing import Routed, as_global_ids, check_inputs, check_routed
from typed_moe.runners._planning import Decision


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CallBuffers:
    """Tensors of the caller's that a call writes to.

    Attributes:
        output: (T, H) in the dtype of `hidden_states`: the result, which is then this tensor.
        routing_replay_out: (T or more, k) int16, contiguous: the global ids of each token's
            experts; fused shared experts are not among them.
    """

    output: Tensor | None = None
    routing_replay_out: Tensor | None = None


NO_BUFFERS = CallBuffers()


class MoeRunner(Protocol):
    """**Protocol:** a strategy and prepared weights; a call is one argument record, one launch.

    What no call changes is computed when the runner is made: a tensor that is replaced or
    written to afterwards needs a new runner.
    """

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers = NO_BUFFERS,
    ) -> Tensor:
        """(T, H) in the dtype of `hidden_states`; a partial sum if the rank is one of several.

        Args:
            hidden_states: (T, H).
            router_logits: (T, E); or what a host's dispatcher has routed already, for a plan in
                the precomputed form.
            e_score_correction_bias: (E,), or None.
            buffers: tensors of the caller's to write to.
        """
        ...


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class CallInputs:
    """A call's tensors after the routing half.

    Attributes:
        routing: what the record's `routing` field gets.
        hidden_states: (T * copies, H), with the weight applied where it goes on the input.
        copies: rows per token; above 1 only for weights on the input with top_k > 1.
    """

    routing: Routing
    hidden_states: Tensor
    copies: int


def route(
    decision: Decision,
    hidden_states: Tensor,
    router_logits: Tensor | Routed,
    e_score_correction_bias: Tensor | None,
    buffers: CallBuffers,
) -> CallInputs:
    """The routing half of a call, in the form that the plan decided; or as the host has routed."""
    plan = decision.plan
    if isinstance(router_logits, Routed):
        if plan.in_kernel is not None:
            raise ValueError(
                f"{plan.entry_point} routes by itself and was given ids and weights; make the plan "
                "with routing_form=RoutingForm.PRECOMPUTED"
            )
        return _given(decision, router_logits, hidden_states, buffers)
    check_inputs(
        plan.strategy.name,
        router_logits,
        e_score_correction_bias,
        shape=plan.request.shape,
        bias=plan.strategy.bias,
        minimum=plan.strategy.router_logits_dtype,
    )
    told = plan.in_kernel
    if told is not None:
        logits, bias = router_logits, e_score_correction_bias
        if logits.dtype not in told.logits_dtypes:
            logits = logits.to(told.logits_dtypes[0])
        if bias is not None and told.bias_dtype is not None:
            bias = bias.to(told.bias_dtype)
        routing = FromLogits(
            routing_logits=logits,
            routing_bias=bias,
            n_group=told.n_group,
            topk_group=told.topk_group,
            routed_scaling_factor=told.routed_scaling_factor,
            routing_method_type=told.routing_method_type,
            norm_topk_prob=told.norm_topk_prob,
            use_routing_scales_on_input=told.use_routing_scales_on_input,
            group_score=told.group_score,
            routing_replay_out=buffers.routing_replay_out,
        )
        return CallInputs(routing=routing, hidden_states=hidden_states, copies=1)
    routed = _routed(decision, router_logits, e_score_correction_bias)
    return _given(decision, routed, hidden_states, buffers)


def _routed(
    decision: Decision, router_logits: Tensor, e_score_correction_bias: Tensor | None
) -> Routed:
    """The experts of every token, by the fused kernel or by the strategy, as the plan says."""
    if decision.routing is not None:
        return decision.routing(router_logits, e_score_correction_bias)
    plan = decision.plan
    return plan.strategy.select_experts(
        router_logits, e_score_correction_bias, shape=plan.request.shape
    )


def _given(
    decision: Decision, routed: Routed, hidden_states: Tensor, buffers: CallBuffers
) -> CallInputs:
    """Ids and weights, the strategy's or a host's, looked at and written where asked for."""
    plan, num_tokens = decision.plan, hidden_states.shape[0]
    check_routed(plan.strategy.name, routed, num_tokens=num_tokens, shape=plan.request.shape)
    if buffers.routing_replay_out is not None:
        buffers.routing_replay_out[:num_tokens].copy_(routed.topk_ids)
    return _precomputed(decision, routed, hidden_states)


def _precomputed(decision: Decision, routed: Routed, hidden_states: Tensor) -> CallInputs:
    """Final ids and weights; a weight that belongs on the input is applied to it here."""
    request = decision.plan.request
    copies = 1
    # A strategy of one's own may give int64 or float64, or views; kernels read pointers.
    ids = as_global_ids(routed.topk_ids.to(torch.int32).contiguous())
    weights = routed.topk_weights.to(torch.float32).contiguous()
    if decision.plan.weight_on_input:
        copies = ids.shape[1]
        hidden_states = hidden_states.repeat_interleave(copies, dim=0)
        hidden_states = (hidden_states * weights.reshape(-1, 1)).to(hidden_states.dtype)
        ids = as_global_ids(ids.reshape(-1, 1))
        weights = torch.ones_like(weights).reshape(-1, 1)
    routing = Precomputed(topk_ids=ids, topk_weights=weights)
    if request.num_fused_shared_experts:
        routing = append_shared(
            routing, request.shape.num_experts, request.num_fused_shared_experts
        )
    return CallInputs(routing=routing, hidden_states=hidden_states, copies=copies)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast where there is something to cast: torch's own way of finding out takes a microsecond."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def expert_args(decision: Decision, weights: ExpertWeights) -> ExpertArgs:
    """What no call changes, on the layer's device."""
    request = decision.plan.request
    shape, place = request.shape, request.placement
    local = place.num_local_experts(shape.num_experts)
    name, alpha, beta, limit = activation_arguments(request.activation)

    def vector(value: float | None) -> Tensor | None:
        if value is None:
            return None
        count = local + request.num_fused_shared_experts
        return torch.full((count,), value, dtype=torch.float32, device=request.device)

    return ExpertArgs(
        num_experts=shape.num_experts,
        top_k=shape.top_k,
        intermediate_size=place.local_intermediate_size(request.intermediate_size),
        local_expert_offset=place.local_expert_offset(shape.num_experts),
        local_num_experts=local,
        activation_type=name,
        num_fused_shared_experts=request.num_fused_shared_experts,
        gemm1_alpha=vector(alpha),
        gemm1_beta=vector(beta),
        gemm1_clamp_limit=vector(limit),
        gemm1_bias=weights.w13_bias,
        gemm2_bias=weights.w2_bias,
    )


def with_raw_limit(experts: ExpertArgs, gate: Tensor | None) -> ExpertArgs:
    """The arguments with the clamp's limit in units of the gate's output scale (L,), if any."""
    limit = experts.gemm1_clamp_limit
    if limit is None or gate is None:
        return experts
    return replace(experts, gemm1_raw_clamp_limit=limit / gate)


def present(tensor: Tensor | None, name: str) -> Tensor:
    """A tensor that the layer's format has. Not having it is our own fault."""
    assert tensor is not None, f"the format stores {name}"
    return tensor
