"""Wrong calls, each of them a type error. Never executed: read by mypy and pyright.

Every wrong line carries the error that each checker must report there, with its code. A wrong
call that becomes legal leaves an ignore without use, which is an error too.
tests/test_typing.py also removes the ignores and looks for an error at every one of these lines.
"""

from __future__ import annotations

from typing import Literal

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe import (
    BiasRule,
    DeepSeekV3,
    Fp8BlockScale,
    FusedMoE,
    GlobalExpertIds,
    InKernel,
    KernelRules,
    Llama4,
    LocalExpertIds,
    Refused,
    RenormalizeNaive,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    Scale,
    ScaleOwner,
)

# --- what a layer takes as its strategy ---

quant = Fp8BlockScale()

FusedMoE(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, routing=2, quant=quant)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
FusedMoE(num_experts=128, top_k=8, hidden_size=2048, intermediate_size=768, quant=quant)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
FusedMoE(
    num_experts=128,
    top_k=8,
    hidden_size=2048,
    intermediate_size=768,
    routing=None,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    quant=quant,
)
FusedMoE(
    num_experts=128,
    top_k=8,
    hidden_size=2048,
    intermediate_size=768,
    routing="deepseek_v3",  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    quant=quant,
)
FusedMoE(
    num_experts=128,
    top_k=8,
    hidden_size=2048,
    intermediate_size=768,
    routing=RenormalizeNaive,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    quant=quant,
)

as_int: RoutingStrategy = 2  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
as_none: RoutingStrategy = None  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
as_class: RoutingStrategy = RenormalizeNaive  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


# --- what a strategy gives back ---


class Unnamed(RoutingStrategy):
    """A bare tuple: nobody knows which of the two comes first."""

    @property
    @override
    def name(self) -> str:
        return "Unnamed"

    @override
    def select_experts(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> tuple[Tensor, Tensor]:
        weights, ids = torch.topk(router_logits, shape.top_k)
        return weights, ids


class UnnamedInside(RoutingStrategy):
    """The right promise, and a bare tuple all the same."""

    @property
    @override
    def name(self) -> str:
        return "UnnamedInside"

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        weights, ids = torch.topk(router_logits, shape.top_k)
        return ids, weights  # type: ignore[return-value]  # pyright: ignore[reportReturnType]


class Positional(RoutingStrategy):
    """By position a swapped pair would look right."""

    @property
    @override
    def name(self) -> str:
        return "Positional"

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        weights, ids = torch.topk(router_logits, shape.top_k)
        return Routed(weights, ids)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


@attrs.frozen(kw_only=True)
class UnnamedByShape:
    """The tuple again, without the base class; every other member is right."""

    name: Literal["UnnamedByShape"] = attrs.field(default="UnnamedByShape", init=False)
    bias: BiasRule = BiasRule.NONE
    router_logits_dtype: torch.dtype | None = None
    apply_router_weight_on_input: bool = False

    def scale(self, form: RoutingForm) -> Scale:
        return Scale(factor=1.0, owner=ScaleOwner.HOST)

    def check(self, shape: RoutingShape) -> None:
        pass

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        return Refused("computed in PyTorch only")

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


by_shape: RoutingStrategy = UnnamedByShape()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]


class ShapeForgotten(RoutingStrategy):
    """The layer passes `shape`; a strategy that does not take it cannot be called."""

    @property
    @override
    def name(self) -> str:
        return "ShapeForgotten"

    @override
    def select_experts(  # type: ignore[override]  # pyright: ignore[reportIncompatibleMethodOverride]
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None
    ) -> Routed:
        raise NotImplementedError


class MathsForgotten(RoutingStrategy):
    """A name alone."""

    @property
    @override
    def name(self) -> str:
        return "MathsForgotten"


MathsForgotten()  # type: ignore[abstract]  # pyright: ignore[reportAbstractUsage]


# --- strategies are values: keyword-only, frozen, final, without fields they cannot honour ---

DeepSeekV3(8, 4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
DeepSeekV3(num_expert_groups=8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
DeepSeekV3(num_expert_group="8")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
Llama4(routed_scaling_factor=2.5)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]

deepseek = DeepSeekV3(num_expert_group=8, topk_group=4)
deepseek.topk_group = 2  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


class Mine(Llama4):  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    """A subclass would inherit its parent's kernel label."""


# --- global ids and local ids are different types ---


def takes_global(topk_ids: GlobalExpertIds) -> None:
    """Wants ids of the whole layer."""


def takes_local(topk_ids: LocalExpertIds) -> None:
    """Wants ids of one rank."""


def ids(local: LocalExpertIds, plain: Tensor, routed: Routed) -> None:
    """Each the wrong way round."""
    takes_global(local)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    takes_global(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    takes_local(routed.topk_ids)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    takes_local(plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    Routed(topk_ids=local, topk_weights=plain)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    routed.topk_ids = GlobalExpertIds(plain)  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]


def records(shape: RoutingShape) -> None:
    """Records are keyword-only and frozen."""
    RoutingShape(256, 8)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    shape.top_k = 4  # type: ignore[misc]  # pyright: ignore[reportAttributeAccessIssue]
    RenormalizeNaive().select_experts(torch.zeros(1, 8), None)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    RenormalizeNaive().select_experts(torch.zeros(1, 8), None, shape)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
