"""Our runner for one of SGLang's layers, on SGLang's own weights."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor
from typing_extensions import TypeIs, override

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import FlashInferKernel
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.routing import Routed, RoutingForm, RoutingShape, RoutingStrategy
from typed_moe.runners import CallBuffers, MoeRunner, Plan, decide, make_runner
from typed_moe.sglang._layers import SglangExperts
from typed_moe.sglang._protocols import (
    BypassedLike,
    DispatchLike,
    PackedLike,
    RunnerConfigLike,
    StandardLike,
)
from typed_moe.sglang._topk import read_topk_config
from typed_moe.sglang._translate import RoutedOutside, Translation, strategy_of


@final
@attrs.frozen(kw_only=True)
class RoutedBySglang(RoutingStrategy):
    """A place in a plan for routing that SGLang's TopK has done: its ids and weights are final.

    Attributes:
        weight_on_input: the layer's `apply_router_weight_on_input`.
        why: what the TopK routes by, and why it is left to it.
    """

    weight_on_input: bool = False
    why: str = ""

    @property
    @override
    def name(self) -> str:
        """What plans print."""
        return "RoutedBySglang"

    @property
    @override
    def apply_router_weight_on_input(self) -> bool:
        """As the layer says."""
        return self.weight_on_input

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
        ids, weights = ids_of(topk)
        routed = Routed(topk_ids=ids, topk_weights=weights)
        return self.runner(dispatch.hidden_states, routed, None, buffers)


@final
@attrs.define(kw_only=True, eq=False)
class GivenIds:
    """Ids and weights that SGLang gave a kernel."""

    topk_ids: Tensor
    topk_weights: Tensor


def is_bypassed(topk: BypassedLike | StandardLike | PackedLike) -> TypeIs[BypassedLike]:
    """Whether SGLang leaves the routing to the kernel."""
    return hasattr(topk, "topk_config")


def translated(dispatch: DispatchLike, config: RunnerConfigLike) -> Translation:
    """The strategy of a call: by its TopK's settings, or that SGLang has routed."""
    topk = dispatch.topk_output
    if is_bypassed(topk):
        return strategy_of(read_topk_config(topk.topk_config), method_of(config))
    return RoutedBySglang(weight_on_input=config.apply_router_weight_on_input)


def method_of(config: RunnerConfigLike) -> str | None:
    """The name of the number that the layer has; None: it has none.

    A config.json may hold the number itself, which is then the layer's.
    """
    method = config.routing_method_type
    return getattr(method, "name", None)


def ids_of(topk: StandardLike | PackedLike) -> tuple[Tensor, Tensor]:
    """Ids and weights of what SGLang has routed; of one word, the id is the upper half."""
    if not is_packed(topk):
        return topk.topk_ids, topk.topk_weights
    words = topk.packed_topk_ids
    weights = (words & 0xFFFF).to(torch.int16).view(torch.bfloat16)
    return words >> 16, weights.float()


def is_packed(topk: StandardLike | PackedLike) -> TypeIs[PackedLike]:
    """Whether ids and weights are in one word."""
    return not hasattr(topk, "topk_ids")


def top_k_of(topk: BypassedLike | StandardLike | PackedLike) -> int:
    """Experts per token."""
    return topk.topk_config.top_k if is_bypassed(topk) else ids_of(topk)[0].shape[1]


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
