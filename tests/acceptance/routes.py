"""The ways a layer gets its experts chosen, as one kind of function, so that one check runs all.

`direct`: the strategy's own `select_experts`. `in_kernel`: the reference kernel's routing from
logits, told what the strategy's `in_kernel` says. `whole_layer`: a `FusedMoE` in one routing form
whose experts give their own number back, so that its output is the weight on each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import CASES, Case
from typed_moe import (
    FusedMoE,
    InKernel,
    Relu2,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
)
from typed_moe.kernels import FromLogits, fused_route
from typed_moe.kernels._reference_routing import METHODS, route
from typed_moe.kernels.reference import REFERENCE_RULES


@attrs.frozen(kw_only=True, eq=False)
class Chosen:
    """What a route gave: (T, E) float64 weights, and the (T, k) ids where it tells them."""

    dense: Tensor
    ids: Tensor | None


Route = Callable[[Case, Tensor, Tensor | None], Chosen]
"""(case, logits, bias) to the experts chosen."""


def direct(case: Case, logits: Tensor, bias: Tensor | None) -> Chosen:
    """By the strategy."""
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    routed = case.strategy.select_experts(logits, bias, shape=shape)
    assert routed.topk_ids.dtype is torch.int32
    assert routed.topk_weights.dtype is torch.float32
    return Chosen(
        dense=oracle.dense(routed.topk_ids, routed.topk_weights, case.num_experts),
        ids=routed.topk_ids.long(),
    )


def in_kernel(case: Case, logits: Tensor, bias: Tensor | None) -> Chosen:
    """By the reference kernel, from logits."""
    told = told_by(case)
    if bias is not None and told.bias_dtype is not None:
        bias = bias.to(told.bias_dtype)
    routed = route(
        FromLogits(
            routing_logits=logits,
            routing_bias=bias,
            n_group=told.n_group,
            topk_group=told.topk_group,
            routed_scaling_factor=told.routed_scaling_factor,
            routing_method_type=told.routing_method_type,
            norm_topk_prob=told.norm_topk_prob,
            use_routing_scales_on_input=told.use_routing_scales_on_input,
        ),
        case.top_k,
    )
    return Chosen(
        dense=oracle.dense(routed.topk_ids, routed.topk_weights, case.num_experts),
        ids=routed.topk_ids.long(),
    )


def fused_kernel(case: Case, logits: Tensor, bias: Tensor | None) -> Chosen:
    """By the fused routing kernel: on the card where there is one, else in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    routed = fused_route(
        case.strategy,
        logits.to(device),
        None if bias is None else bias.to(device),
        shape=RoutingShape(num_experts=case.num_experts, top_k=case.top_k),
    )
    assert routed.topk_ids.dtype is torch.int32
    assert routed.topk_weights.dtype is torch.float32
    ids, weights = routed.topk_ids.cpu(), routed.topk_weights.cpu()
    return Chosen(dense=oracle.dense(ids, weights, case.num_experts), ids=ids.long())


def layer_in_kernel(case: Case, logits: Tensor, bias: Tensor | None) -> Chosen:
    """By a whole layer whose kernel routes."""
    return _whole_layer(case, logits, bias, RoutingForm.IN_KERNEL)


def layer_precomputed(case: Case, logits: Tensor, bias: Tensor | None) -> Chosen:
    """By a whole layer that routes before its kernel."""
    return _whole_layer(case, logits, bias, RoutingForm.PRECOMPUTED)


def told_by(case: Case) -> InKernel:
    """What the strategy tells the reference kernel."""
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    told = case.strategy.in_kernel(shape, REFERENCE_RULES)
    assert isinstance(told, InKernel), told
    return told


def layer_of(
    strategy: RoutingStrategy,
    num_experts: int,
    top_k: int,
    form: RoutingForm | None = None,
    device: str = "cpu",
) -> FusedMoE:
    """A layer whose expert e gives 1 in output column e for the input (1, 0, 0, ...).

    Width 1 and relu squared: with a weight w on the input the output is w * w.
    """
    layer = FusedMoE(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=num_experts,
        intermediate_size=1,
        routing=strategy,
        activation=Relu2(),
        routing_form=form,
        dtype=torch.float32,
        device=device,
    )
    layer.get_parameter("w13_weight").data.zero_()
    layer.get_parameter("w13_weight").data[:, 0, 0] = 1.0
    layer.get_parameter("w2_weight").data.copy_(torch.eye(num_experts).unsqueeze(-1))
    return layer


def probe(tokens: int, hidden_size: int) -> Tensor:
    """The input that `layer_of` answers with its routing weights."""
    x = torch.zeros(tokens, hidden_size)
    x[:, 0] = 1.0
    return x


def _whole_layer(case: Case, logits: Tensor, bias: Tensor | None, form: RoutingForm) -> Chosen:
    layer = layer_of(case.strategy, case.num_experts, case.top_k, form)
    assert layer.plan.form is form
    if bias is not None:
        layer.load_weights([("e_score_correction_bias", bias)])
    out = layer(probe(logits.shape[0], case.num_experts), logits).double()
    return Chosen(dense=out.sqrt() if case.rule.on_input else out, ids=None)


def fused(case: Case) -> bool:
    """Whether the reference kernel routes this method by itself."""
    return case.strategy.name in METHODS


def routes(cases: tuple[Case, ...] = CASES) -> Iterator[tuple[str, Case, Route]]:
    """(id, case, route) for every case in every way of routing that it has."""
    for case in cases:
        yield f"{case.id}-strategy", case, direct
        yield f"{case.id}-layer-precomputed", case, layer_precomputed
        if fused(case):
            yield f"{case.id}-kernel", case, in_kernel
            yield f"{case.id}-layer-in-kernel", case, layer_in_kernel
