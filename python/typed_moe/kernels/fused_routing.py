"""From logits to experts and weights in one launch, for every strategy that says how it routes.

A Triton kernel, so for a CUDA device with Triton installed (PyTorch's CUDA builds bring it). Triton
is imported at the first call, not before. A strategy says how it routes with `in_kernel`: asked
with `FUSED_RULES`, every strategy of this package answers; one that knows only how to select
experts is routed in PyTorch, and joins at `sort_slots`.

Shapes: T tokens, E experts, k chosen.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Protocol, cast, final

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels._fused_rules import (
    FUSED_RULES,
    Divide,
    FusedRule,
    Rank,
    RouteSettings,
    Weigh,
    route_settings,
)
from typed_moe.kernels._slots import SortedSlots, SortRequest
from typed_moe.routing import (
    BiasRule,
    Refused,
    Routed,
    RoutingShape,
    RoutingStrategy,
    check_inputs,
)

_LEAST_CAPABILITY = (8, 0)
_READ = FUSED_RULES.methods["Default"].logits_dtypes
_MOST_SLOTS = 2**30


def fused_routing_refusal(device: torch.device) -> Refused | None:
    """Why the fused routing kernel does not run on a device; None if it does."""
    if find_spec("triton") is None:
        return Refused("needs Triton, which PyTorch's CUDA builds bring and this one has not")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return Refused(f"runs on CUDA devices; this layer is on {device}")
    if not torch.cuda.is_available():
        return Refused(f"runs on CUDA devices; this layer is on {device} and there is none here")
    capability = torch.cuda.get_device_capability(device)
    if capability < _LEAST_CAPABILITY:
        return Refused(
            f"runs on compute capability 8.0 and above; {device} has {capability[0]}.{capability[1]}"
        )
    return None


@final
@attrs.frozen(kw_only=True)
class FusedRouting:
    """A strategy on the fused kernel, for one layer. Made by `fused_routing`."""

    name: str
    shape: RoutingShape
    settings: RouteSettings
    bias: BiasRule
    router_logits_dtype: torch.dtype | None

    def __attrs_post_init__(self) -> None:
        if _NAME not in _operators:
            _operators[_NAME] = _operator()

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Made again, so that a copy in another process has its operator."""
        fields = (self.name, self.shape, self.settings, self.bias, self.router_logits_dtype)
        return _made, fields

    def __call__(self, router_logits: Tensor, e_score_correction_bias: Tensor | None) -> Routed:
        """The strategy's `select_experts`, in one launch.

        Ties go to the lower expert id; a row with a NaN, or of -inf alone, gives the ids 0 to
        k - 1 (with a bias: the k largest biases) with weight 0. Nothing is launched for T = 0.
        No host synchronisation; under torch.compile one operator.

        Args:
            router_logits: (T, E) floating point, any row stride.
            e_score_correction_bias: (E,) floating point, or None where the maths has none.

        Returns:
            (T, k) int32 ids, best first, and float32 weights.

        Raises:
            ValueError, TypeError: as `RoutingStrategy.select_experts`.
        """
        logits, bias = self._checked(router_logits, e_score_correction_bias)
        settings, rule = self.settings, self.settings.rule
        if torch.compiler.is_compiling():
            ids, weights = _operators[_NAME](
                logits,
                bias,
                settings.top_k,
                rule.rank,
                rule.weigh,
                rule.divide,
                settings.num_expert_group,
                settings.topk_group,
                settings.two_best,
                settings.scale,
            )
            return Routed(topk_ids=ids, topk_weights=weights)
        ids, weights, _ = _launch().route(settings, logits, bias, None)
        return Routed(topk_ids=ids, topk_weights=weights)

    def with_slots(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, request: SortRequest
    ) -> tuple[Routed, SortedSlots]:
        """The same, with the slots of the local experts sorted: one launch for few rows, else two or three.

        Bit for bit the same from run to run: no atomics. Not for code under torch.compile.

        Raises:
            ValueError, TypeError: as above; or T * k is above 2**30.
        """
        logits, bias = self._checked(router_logits, e_score_correction_bias)
        _check_slots(logits.shape[0] * self.shape.top_k)
        ids, weights, slots = _launch().route(self.settings, logits, bias, request)
        assert slots is not None, "slots were asked for"
        return Routed(topk_ids=ids, topk_weights=weights), slots

    def _checked(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        check_inputs(
            self.name,
            router_logits,
            e_score_correction_bias,
            shape=self.shape,
            bias=self.bias,
            minimum=self.router_logits_dtype,
        )
        bias = e_score_correction_bias
        if router_logits.dtype not in _READ:
            router_logits = router_logits.float()
        if bias is not None and bias.dtype not in _READ:
            bias = bias.float()
        return router_logits, bias


def _made(
    name: str,
    shape: RoutingShape,
    settings: RouteSettings,
    bias: BiasRule,
    router_logits_dtype: torch.dtype | None,
) -> FusedRouting:
    return FusedRouting(
        name=name,
        shape=shape,
        settings=settings,
        bias=bias,
        router_logits_dtype=router_logits_dtype,
    )


def fused_routing(
    strategy: RoutingStrategy, *, shape: RoutingShape, device: torch.device
) -> FusedRouting | Refused:
    """The strategy on the fused kernel, or why it cannot be.

    Args:
        strategy: the routing rule; its `in_kernel` is asked with `FUSED_RULES`.
        shape: E and k of the layer.
        device: where the logits are.

    Raises:
        ValueError: the strategy's maths is not defined for the shape.
    """
    strategy.check(shape)
    absent = fused_routing_refusal(device)
    if absent is not None:
        return absent
    told = strategy.in_kernel(shape, FUSED_RULES)
    settings = told if isinstance(told, Refused) else route_settings(told, shape)
    if isinstance(settings, Refused):
        return settings
    return FusedRouting(
        name=strategy.name,
        shape=shape,
        settings=settings,
        bias=strategy.bias,
        router_logits_dtype=strategy.router_logits_dtype,
    )


def fused_route(
    strategy: RoutingStrategy,
    router_logits: Tensor,
    e_score_correction_bias: Tensor | None,
    *,
    shape: RoutingShape,
) -> Routed:
    """`strategy.select_experts` in one launch. For one call; a layer keeps a `FusedRouting`.

    Raises:
        UnsupportedRouting: no Triton, no CUDA device, or the strategy says not how it routes.
        ValueError, TypeError: as `RoutingStrategy.select_experts`.
    """
    made = fused_routing(strategy, shape=shape, device=router_logits.device)
    if isinstance(made, Refused):
        raise UnsupportedRouting(
            f"{strategy.name} on the fused routing kernel: {made.reason}. "
            "strategy.select_experts routes in PyTorch, on any device"
        )
    return made(router_logits, e_score_correction_bias)


def sort_slots(topk_ids: Tensor, request: SortRequest) -> SortedSlots:
    """The sorted slots of ids that any routing gave: two or three launches. Not under torch.compile.

    Args:
        topk_ids: (T, k) integers, global expert ids; -1 marks a slot that is skipped.
        request: whose slots, and the block size.

    Raises:
        UnsupportedRouting: no Triton, or no CUDA device.
        ValueError: T * k is above 2**30.
    """
    absent = fused_routing_refusal(topk_ids.device)
    if absent is not None:
        raise UnsupportedRouting(f"sorting slots {absent.reason}")
    _check_slots(topk_ids.numel())
    return _launch().sort_slots(topk_ids, request)


def _check_slots(num_slots: int) -> None:
    if num_slots > _MOST_SLOTS:
        raise ValueError(
            f"num_tokens * top_k is {num_slots}; allowed: up to 2**30. Split the batch"
        )


class _Launch(Protocol):
    """`typed_moe.kernels._triton_launch`, which is imported late."""

    def route(
        self,
        settings: RouteSettings,
        logits: Tensor,
        bias: Tensor | None,
        sort: SortRequest | None,
    ) -> tuple[Tensor, Tensor, SortedSlots | None]: ...

    def sort_slots(self, ids: Tensor, sort: SortRequest) -> SortedSlots: ...


def _launch() -> _Launch:
    from typed_moe.kernels import _triton_launch  # noqa: PLC0415 - heavy

    return _triton_launch


class _Operator(Protocol):
    def __call__(
        self,
        logits: Tensor,
        bias: Tensor | None,
        top_k: int,
        rank: str,
        weigh: str,
        divide: str,
        num_expert_group: int,
        topk_group: int,
        two_best: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]: ...


def _operator() -> _Operator:
    """`typed_moe::fused_route`, with its shapes for tracing; registering it takes 60 ms."""

    def launch(
        logits: Tensor,
        bias: Tensor | None,
        top_k: int,
        rank: str,
        weigh: str,
        divide: str,
        num_expert_group: int,
        topk_group: int,
        two_best: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        rule = FusedRule(
            rank=cast("Rank", rank),
            weigh=cast("Weigh", weigh),
            divide=cast("Divide", divide),
            biased=bias is not None,
        )
        settings = RouteSettings(
            rule=rule,
            num_experts=logits.shape[1],
            top_k=top_k,
            num_expert_group=num_expert_group,
            topk_group=topk_group,
            two_best=two_best,
            scale=scale,
        )
        ids, weights, _ = _launch().route(settings, logits, bias, None)
        return ids, weights

    def shapes(
        logits: Tensor,
        bias: Tensor | None,
        top_k: int,
        rank: str,
        weigh: str,
        divide: str,
        num_expert_group: int,
        topk_group: int,
        two_best: bool,
        scale: float,
    ) -> tuple[Tensor, Tensor]:
        del bias, rank, weigh, divide, num_expert_group, topk_group, two_best, scale
        size = (logits.shape[0], top_k)
        return (
            logits.new_empty(size, dtype=torch.int32),
            logits.new_empty(size, dtype=torch.float32),
        )

    name = f"typed_moe::{_NAME}"
    torch.library.define(name, torch.library.infer_schema(launch, mutates_args=()))
    torch.library.impl(name, "CompositeExplicitAutograd", launch)
    torch.library.register_fake(name, shapes)
    return cast("_Operator", torch.ops.typed_moe.fused_route.default)


_NAME = "fused_route"
_operators: dict[str, _Operator] = {}
"""Empty until something is routed by the kernel."""
