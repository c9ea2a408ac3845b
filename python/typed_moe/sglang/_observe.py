"""`observe`: the first call of each layer, SGLang's beside ours."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import final
from weakref import WeakSet

import attrs
import torch

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.sglang._differences import Call, Difference, differences
from typed_moe.sglang._layers import SglangExperts
from typed_moe.sglang._methods import Agreement, compare_method
from typed_moe.sglang._ours import (
    GivenIds,
    OurExperts,
    is_bypassed,
    method_of,
    our_experts,
    top_k_of,
    translated,
)
from typed_moe.sglang._protocols import DispatchLike, LayerLike, RunnerConfigLike, TopKLike
from typed_moe.sglang._topk import TopKSettings, read_topk_config
from typed_moe.sglang._translate import RoutedOutside, Translation, strategy_of
from typed_moe.sglang._watch import UncalledFlashInfer, watch

logger = logging.getLogger("typed_moe.sglang")


@final
@attrs.frozen(kw_only=True, eq=False)
class Finding:
    """Something to know about a model, reported once.

    Attributes:
        model: its architecture, or where it is from.
        about: what is found: an argument's name, "routing method", or "no plan".
        message: the sentence.
    """

    model: str
    about: str
    message: str


@final
class Observer:
    """What the plugin has seen in this process.

    Args:
        model: names the model that this process serves.
        library: the FlashInfer that SGLang calls.
    """

    def __init__(self, model: Callable[[], str], library: Callable[[], FlashInferLibrary]) -> None:
        self._model, self._library = model, library
        self._seen: WeakSet[LayerLike] = WeakSet()
        self.findings: dict[tuple[str, str, str], Finding] = {}
        self.compared: list[tuple[Call, tuple[Difference, ...]]] = []

    def bound(self, topk: TopKLike, method: str | None) -> None:
        """A TopK and the number of its experts' routing method, at construction."""
        settings = read_topk_config(topk.topk_config)
        try:
            translation = strategy_of(settings, method)
        except (TypeError, ValueError) as error:
            # SGLang may still serve it; where the calls are ours this is raised at the first.
            self._report("no strategy", str(error), f"{error} ({settings})", logging.WARNING)
            return
        comparison = compare_method(method, translation)
        if comparison.agreement is Agreement.CONFLICT:
            self._report(
                "routing method",
                f"{method} {translation}",
                f"routing_method_type is {method}, and its TopK computes {_rule(translation)} "
                f"({settings})",
                logging.WARNING,
            )

    def wants(self, config: RunnerConfigLike, dispatch: DispatchLike) -> bool:
        """Whether this call is the first of its layer, and one that may be looked at.

        Not inside torch.compile or a CUDA graph's capture, which would keep what is done here; not
        without tokens, when nothing is launched.
        """
        layer = config.layer
        if layer is None or layer in self._seen:
            return False
        return not (
            torch.compiler.is_compiling()
            or dispatch.hidden_states.shape[0] == 0
            or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        )

    def observe(
        self,
        read: Callable[[DispatchLike, int], SglangExperts],
        config: RunnerConfigLike,
        dispatch: DispatchLike,
        call: Callable[[], object],
    ) -> object:
        """Make SGLang's call, and build ours beside it. Returns SGLang's result."""
        assert config.layer is not None, "wants() has looked"
        self._seen.add(config.layer)
        # The default mode only watches: a mistake in here must not end a server that runs.
        try:
            library = self._library()  # imports FlashInfer's functions, which are watched
        except Exception:
            logger.exception("typed-moe could not look at FlashInfer")
            return call()
        with watch() as calls:
            result = call()
        try:
            self._compare(read, config, dispatch, calls, library)
        except Exception:
            logger.exception("typed-moe could not compare the call of %s", config.layer.layer_name)
        return result

    def _compare(
        self,
        read: Callable[[DispatchLike, int], SglangExperts],
        config: RunnerConfigLike,
        dispatch: DispatchLike,
        calls: list[Call],
        library: FlashInferLibrary,
    ) -> None:
        method = method_of(config)
        uncalled = UncalledFlashInfer(library)
        settings = _settings(dispatch)
        strategy: Translation | None = None
        try:
            dispatch = _as_routed(dispatch, calls)
            strategy = translated(dispatch, config)
            ours = our_experts(read(dispatch, top_k_of(dispatch.topk_output)), strategy, uncalled)
        except UnsupportedRouting as refused:
            self._report("no plan", str(refused), f"no plan of ours: {refused}", logging.WARNING)
            return
        if len(calls) != 1:
            names = ", ".join(call.entry_point for call in calls) or "none"
            self._report(
                "calls",
                names,
                f"one call to FlashInfer was expected, and SGLang made {len(calls)} ({names})",
                logging.WARNING,
            )
            return
        ours(dispatch, _buffer_like(calls[0]))
        found = differences(calls[0], uncalled.calls[-1])
        self.compared.append((calls[0], found))
        for one in found:
            self._report_difference(one, calls[0], method, settings, strategy, ours)

    def _report_difference(
        self,
        one: Difference,
        call: Call,
        method: str | None,
        settings: TopKSettings | None,
        strategy: Translation,
        ours: OurExperts,
    ) -> None:
        where = f"{call.entry_point}: {one}"
        if one.reason is not None:
            self._report(one.argument, call.entry_point, f"{where}; {one.reason}", logging.DEBUG)
            return
        self._report(
            one.argument,
            call.entry_point,
            f"{where} (routing_method_type {method}, {settings}, strategy {_rule(strategy)}, "
            f"{ours.plan.form.value} routing)",
            logging.WARNING,
        )

    def _report(self, about: str, which: str, message: str, level: int) -> None:
        model = self._model()
        key = (model, about, which)
        if key in self.findings:
            return
        self.findings[key] = Finding(model=model, about=about, message=message)
        logger.log(level, "typed-moe: %s: %s", model, message)


def _settings(dispatch: DispatchLike) -> TopKSettings | None:
    topk = dispatch.topk_output
    return read_topk_config(topk.topk_config) if is_bypassed(topk) else None


def _as_routed(dispatch: DispatchLike, calls: list[Call]) -> DispatchLike:
    """With the ids that SGLang gave its kernel, where it was left to it whether to route before.

    SGLang's FP8 path routes by itself if tokens are masked or ids remapped. Asking its TopK again
    would count the experts a second time.
    """
    given = calls[0].arguments.get("topk_ids") if calls else None
    if not is_bypassed(dispatch.topk_output) or not isinstance(given, tuple):
        return dispatch
    return dispatch._replace(topk_output=GivenIds(topk_ids=given[0], topk_weights=given[1]))


def _buffer_like(call: Call) -> torch.Tensor | None:
    output = call.arguments.get("output")
    return torch.empty_like(output) if isinstance(output, torch.Tensor) else None


def _rule(translation: Translation) -> str:
    if isinstance(translation, RoutedOutside):
        return translation.name
    return repr(translation)
