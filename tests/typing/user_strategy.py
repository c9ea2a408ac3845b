"""Strategies that a user writes, accepted. Never executed: read by mypy and pyright.

The near misses are in near_misses.py.
"""

from __future__ import annotations

from typing import Literal, assert_type, final

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe import (
    BiasRule,
    DeepSeekV3,
    Default,
    Fp8BlockScale,
    FusedMoE,
    GlobalExpertIds,
    InKernel,
    KernelRules,
    Llama4,
    MiniMax2,
    Refused,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingForm,
    RoutingShape,
    RoutingStrategy,
    Scale,
    ScaleOwner,
    Sigmoid,
    SigmoidRenorm,
    TopK,
    TopKSigmoid,
)


class TwoMembers(RoutingStrategy):
    """By inheritance: a name and the maths are all that a strategy needs."""

    @property
    @override
    def name(self) -> str:
        return "TwoMembers"

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        weights, ids = torch.topk(router_logits.float().sigmoid(), shape.top_k)
        return Routed(topk_ids=ids.to(torch.int32), topk_weights=weights)


class WithoutOverride(RoutingStrategy):
    """`@override` is this project's own rule; a user's mypy asks for it only when told to."""

    @property
    def name(self) -> str:  # type: ignore[explicit-override]
        return "WithoutOverride"

    def select_experts(  # type: ignore[explicit-override]
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        raise NotImplementedError


@final
@attrs.frozen(kw_only=True)
class Settings(RoutingStrategy):
    """With settings, as an attrs value; one default is replaced."""

    temperature: float = 1.0

    @property
    @override
    def name(self) -> str:
        return "Settings"

    @property
    @override
    def bias(self) -> BiasRule:
        return BiasRule.REQUIRED

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        raise NotImplementedError


@final
@attrs.frozen(kw_only=True)
class ByShape:
    """No base class: having every member is enough. A field will do where a property is asked."""

    name: Literal["ByShape"] = attrs.field(default="ByShape", init=False)
    bias: BiasRule = BiasRule.NONE

    @property
    def router_logits_dtype(self) -> torch.dtype | None:
        return torch.float32

    @property
    def apply_router_weight_on_input(self) -> bool:
        return False

    def scale(self, form: RoutingForm) -> Scale:
        return Scale(factor=1.0, owner=ScaleOwner.HOST)

    def check(self, shape: RoutingShape) -> None:
        pass

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        return Refused("computed in PyTorch only")

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None = None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        raise NotImplementedError


two_members: RoutingStrategy = TwoMembers()
without_override: RoutingStrategy = WithoutOverride()
settings: RoutingStrategy = Settings(temperature=0.5)
by_shape: RoutingStrategy = ByShape()

built_in: list[RoutingStrategy] = [
    Default(),
    Renormalize(),
    DeepSeekV3(num_expert_group=8, topk_group=4, routed_scaling_factor=2.5),
    Llama4(),
    RenormalizeNaive(),
    TopK(),
    SigmoidRenorm(),
    MiniMax2(),
    Sigmoid(),
    TopKSigmoid(),
]

# What a strategy gives back is named and typed, for a user's own and for a built-in one.


def results(router_logits: Tensor, shape: RoutingShape) -> None:
    """The types of what comes back."""
    routed = TwoMembers().select_experts(router_logits, None, shape=shape)
    assert_type(routed, Routed)
    assert_type(routed.topk_ids, GlobalExpertIds)
    assert_type(routed.topk_weights, Tensor)
    assert_type(RenormalizeNaive().select_experts(router_logits, None, shape=shape), Routed)
    assert_type(TwoMembers().bias, BiasRule)
    assert_type(TwoMembers().scale(RoutingForm.PRECOMPUTED), Scale)
    assert_type(TwoMembers().name, str)
    assert_type(DeepSeekV3().name, Literal["DeepSeekV3"])
    assert_type(DeepSeekV3().routed_scaling_factor, float)


# A layer takes any of them.

FusedMoE(
    num_experts=64,
    top_k=6,
    hidden_size=2048,
    intermediate_size=1408,
    routing=TwoMembers(),
    quant=Fp8BlockScale(),
)
FusedMoE(
    num_experts=64,
    top_k=6,
    hidden_size=2048,
    intermediate_size=1408,
    routing=ByShape(),
    quant=Fp8BlockScale(),
)
