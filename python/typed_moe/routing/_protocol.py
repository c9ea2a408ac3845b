"""The contract between a routing rule and everything that runs it."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from typed_moe.routing._records import (
    BiasRule,
    InKernel,
    KernelRules,
    Refused,
    Routed,
    RoutingForm,
    RoutingShape,
    Scale,
    ScaleOwner,
)


class RoutingStrategy(Protocol):
    """**Protocol:** how the tokens of one MoE layer choose their experts.

    A layer holds one strategy, injected by the model. A strategy is a value: no tensors, no
    state between calls. Two members are enough for a new one: inherit from this class, give
    `name` and `select_experts`, and it runs on every runner, routed before the kernel is
    called. The other members have defaults that say so.

    Nothing outside a strategy decides what it owns: the dtype of the logits, the normal form
    of the groups, what a missing bias means, who multiplies by the scale, on which side of the
    expert the weight goes, and what a kernel that routes by itself is told.
    """

    @property
    def name(self) -> str:
        """The routing method's name, as plans and errors print it."""
        ...

    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """Choose `shape.top_k` experts for every token.

        Ties go to the lower expert id. A row with a NaN, or of -inf alone, gives valid
        distinct ids with weight 0. No host synchronisation.

        Args:
            router_logits: (T, E) floating point, the gate's output; T may be 0.
            e_score_correction_bias: (E,) floating point, or None where `bias` is NONE.
            shape: E and k of the layer.

        Returns:
            (T, k) ids and weights, see `Routed`.

        Raises:
            ValueError: a tensor's shape is not the layer's, or the bias is missing or unwanted.
            TypeError: the logits' dtype is below what the strategy asks for.
        """
        ...

    @property
    def bias(self) -> BiasRule:
        """Whether the maths has an `e_score_correction_bias`. Default: it has none."""
        return BiasRule.NONE

    @property
    def router_logits_dtype(self) -> torch.dtype | None:
        """The least precise dtype the gate may emit; None: any. Default: None.

        Logits that were rounded to bfloat16 before they get here choose other experts without
        any error, so a strategy whose models keep a float32 gate refuses bfloat16 logits.
        """
        return None

    @property
    def apply_router_weight_on_input(self) -> bool:
        """The weight multiplies the expert's input, not its output. Default: False."""
        return False

    def scale(self, form: RoutingForm) -> Scale:
        """The factor on the routed output in this form, and who applies it.

        Default: 1.0, the host's.
        """
        del form
        return Scale(factor=1.0, owner=ScaleOwner.HOST)

    def check(self, shape: RoutingShape) -> None:
        """Refuse a layer that the maths is not defined for. Default: every layer is fine.

        Raises:
            ValueError: with the numbers, what is allowed, and what to do.
        """
        del shape

    def in_kernel(self, shape: RoutingShape, rules: KernelRules) -> InKernel | Refused:
        """What a kernel that routes by itself is told, or why it cannot be used so.

        Default: no kernel knows this rule, so it is routed before the call.
        """
        del shape
        return Refused(f"{rules.kernel} has no routing method for {self.name}")
