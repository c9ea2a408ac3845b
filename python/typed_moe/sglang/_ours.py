"""Our runner for one of SGLang's layers, on SGLang's own weights."""

from __future__ import annotations

from typing import final

import attrs
from torch import Tensor
from typing_extensions import TypeIs, override

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import FlashInferKernel
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.routing import Routed, RoutingForm, RoutingShape, RoutingStrategy
from typed_moe.runners import CallBuffers, MoeRunner, Plan, decide, make_runner
from typed_moe.sglang._layers import SglangExperts
from typed_moe.sglang._protocols import BypassedLike, DispatchLike, StandardLike
from typed_moe.sglang._topk import read_topk_config
from typed_moe.sglang._translate import RoutedOutside, Translation, strategy_of


@final
class RoutedBySglang(RoutingStrategy):
    """A place in a plan for routing that SGLang's TopK has done: its ids and weights are final.

    Args:
        weight_on_input: the layer's `apply_router_weight_on_input`.
    """

    def __init__(self, *, weight_on_input: bool = False) -> None:
        self._weight_on_input = weight_on_input

    @property
    @override
    def apply_router_weight_on_input(self) -> bool:
        """As the layer says."""
        return self._weight_on_input

    @property
    @override
    def name(self) -> str:
        """What plans print."""
        return "RoutedBySglang"

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        """Never asked.

        Raises:
            RuntimeError: always; the runner is given SGLang's ids and weights.
        """
        raise RuntimeError("SGLang's TopK routes this layer; the runner is given its result")


@final
@attrs.frozen(kw_only=True, eq=False)
class OurExperts:
    """A runner, and the plan that it is made from."""

    plan: Plan
    runner: MoeRunner

    def __call__(self, dispatch: DispatchLike, output: Tensor | None = None) -> Tensor:
        """(T, H): this rank's experts, on what SGLang's dispatcher gives."""
        topk = dispatch.topk_output
        buffers = CallBuffers(output=output)
        if is_bypassed(topk):
            return self.runner(
                dispatch.hidden_states,
                topk.router_logits,
                topk.topk_config.correction_bias,
                buffers,
            )
        routed = Routed(topk_ids=topk.topk_ids, topk_weights=topk.topk_weights)
        return self.runner(dispatch.hidden_states, routed, None, buffers)


@final
@attrs.define(kw_only=True, eq=False)
class GivenIds:
    """Ids and weights that SGLang gave a kernel."""

    topk_ids: Tensor
    topk_weights: Tensor


def is_bypassed(topk: BypassedLike | StandardLike) -> TypeIs[BypassedLike]:
    """Whether SGLang leaves the routing to the kernel."""
    return hasattr(topk, "topk_config")


def translated(dispatch: DispatchLike, method: str | None) -> Translation:
    """The strategy of a call: by its TopK's settings, or that SGLang has routed."""
    topk = dispatch.topk_output
    if is_bypassed(topk):
        return strategy_of(read_topk_config(topk.topk_config), method)
    return RoutedBySglang()


def our_experts(
    experts: SglangExperts, strategy: Translation, library: FlashInferLibrary
) -> OurExperts:
    """The plan and the runner.

    Args:
        experts: SGLang's layer.
        strategy: of its TopK. Where there is none and SGLang leaves the routing to the kernel,
            nothing can be built.
        library: the FlashInfer to call.

    Raises:
        UnsupportedRouting: no strategy, or FlashInfer does not serve the layer.
        ValueError: the strategy's maths is not defined for the layer's shape.
    """
    if isinstance(strategy, RoutedOutside):
        raise UnsupportedRouting(f"SGLang leaves the routing to the kernel, and {strategy.reason}")
    form = RoutingForm.PRECOMPUTED if isinstance(strategy, RoutedBySglang) else None
    decision = decide(experts.request, strategy, kernel=FlashInferKernel(library), form=form)
    return OurExperts(plan=decision.plan, runner=make_runner(decision, experts.weights))
