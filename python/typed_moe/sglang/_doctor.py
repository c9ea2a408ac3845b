"""Every model of an installed SGLang that builds a TopK: what it computes, and what its number says.

Read from the source files; nothing of SGLang is imported, and no GPU is needed.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import final

import attrs

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import Family, FromLogits, entry_point
from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.kernels.flashinfer_versions import parse_version
from typed_moe.routing import KernelRules, Llama4, Refused, RoutingShape
from typed_moe.sglang._assumptions import (
    OTHER,
    Assumptions,
    Infeasible,
    Method,
    Thing,
    Unknown,
    every_path,
)
from typed_moe.sglang._constructor import SCORING, Constructor, Routing
from typed_moe.sglang._methods import Agreement, Comparison, compare_method
from typed_moe.sglang._relevance import topk_name
from typed_moe.sglang._sources import Module, Sources
from typed_moe.sglang._topk import TopKSettings
from typed_moe.sglang._translate import RoutedOutside, Translation, strategy_of

_FACTOR = 2.5
_GROUPS, _KEPT = 8, 4
"""What a factor and groups are taken to be where the config is not given."""


class Verdict(Enum):
    """What is to be said of a model's number."""

    AGREES = "agrees"
    NO_NUMBER = "no number"
    WRONG = "wrong number"
    WRONG_SOMETIMES = "wrong number sometimes"
    OUTSIDE = "routed outside the kernel"


@final
@attrs.frozen(kw_only=True)
class Route:
    """One outcome of a constructor.

    Attributes:
        when: the assumptions that lead to it and not to another, as `expression = value`.
        settings: of its TopK.
        translation: the strategy, or why there is none.
        comparison: with the number that the model passes.
        binds: whether `bind_runner_backend` is called.
        by_default: a config that leaves out what it may leave out leads here.
    """

    when: tuple[str, ...]
    settings: TopKSettings
    translation: Translation
    comparison: Comparison
    binds: bool
    by_default: bool


@final
@attrs.frozen(kw_only=True)
class BlockReport:
    """One class that builds a TopK.

    Attributes:
        module: below `sglang.srt.models`.
        name: of the class.
        line: of the TopK.
        models: the registered model classes that build it.
        routes: what it may build.
    """

    module: str
    name: str
    line: int
    models: tuple[str, ...]
    routes: tuple[Route, ...]

    @property
    def verdict(self) -> Verdict:
        """Of all its routes together."""
        told = [one for one in self.routes if one.comparison.agreement is not Agreement.NOT_SAID]
        wrong = [one for one in told if one.comparison.agreement is Agreement.CONFLICT]
        if wrong:
            right_by_default = [one for one in told if one.by_default and one not in wrong]
            return Verdict.WRONG_SOMETIMES if right_by_default else Verdict.WRONG
        if told:
            return Verdict.AGREES
        if all(isinstance(one.translation, RoutedOutside) for one in self.routes):
            return Verdict.OUTSIDE
        return Verdict.NO_NUMBER


def models_folder() -> Path:
    """Where the installed SGLang has its models.

    Raises:
        UnsupportedRouting: SGLang is not installed.
    """
    spec = importlib.util.find_spec("sglang")
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    folder = Path(places[0]) / "srt" / "models" if places else None
    if folder is None or not folder.is_dir():
        raise UnsupportedRouting(
            "sglang is not installed in this environment; pip install sglang, or run this with the "
            "Python that serves"
        )
    return folder


def examine(folder: Path, config: Mapping[str, object] | None = None) -> tuple[BlockReport, ...]:
    """Every class below a folder of models that builds a TopK.

    Args:
        folder: of SGLang's models.
        config: a model's own config, whose values are then not assumed, and whose model classes
            alone are examined.

    Raises:
        UnsupportedRouting: no class that the config names builds a TopK.
    """
    sources = Sources(folder)
    reports = tuple(
        report for module in sources.modules.values() for report in _module(module, sources, config)
    )
    if config is not None and not reports:
        names = _architectures(config)
        raise UnsupportedRouting(
            f"no class that builds a TopK belongs to {', '.join(names) or 'this config'}; its "
            "architectures have to be model classes of the installed SGLang with experts"
        )
    return reports


def _architectures(config: Mapping[str, object]) -> tuple[str, ...]:
    names = config.get("architectures")
    return tuple(str(one) for one in names) if isinstance(names, list) else ()


def _fields(config: Mapping[str, object] | None) -> Mapping[str, object] | None:
    """The text model's own values, over the wrapper's."""
    if config is None:
        return None
    nested = config.get("text_config")
    return {**config, **nested} if isinstance(nested, Mapping) else config


def _module(
    module: Module, sources: Sources, config: Mapping[str, object] | None
) -> Iterator[BlockReport]:
    for block in module.classes:
        for function in (one for one in block.body if isinstance(one, ast.FunctionDef)):
            lines = [
                one.lineno
                for one in ast.walk(function)
                if isinstance(one, ast.Call) and topk_name(one)
            ]
            if not lines:
                continue
            models = sources.model_classes((module.name, block.name))
            if config is not None and not set(models) & set(_architectures(config)):
                continue
            routes = _routes(function, module.name, _fields(config), sources.tensors(module))
            yield BlockReport(
                module=module.name, name=block.name, line=lines[0], models=models, routes=routes
            )


@final
@attrs.frozen(kw_only=True)
class _Outcome:
    settings: TopKSettings
    hashed: bool
    method: str | None
    binds: bool


def _routes(
    function: ast.FunctionDef,
    module: str,
    config: Mapping[str, object] | None,
    parts: Mapping[str, frozenset[str]],
) -> tuple[Route, ...]:
    def run(assumptions: Assumptions) -> tuple[_Outcome, ...]:
        constructor = Constructor(function, assumptions, config, parts)
        return tuple(_outcome(constructor, one, module) for one in constructor.run())

    found: dict[_Outcome, list[dict[str, object]]] = {}
    by_default: set[_Outcome] = set()
    for assumptions, outcomes in every_path(run):
        for outcome in outcomes:
            found.setdefault(outcome, []).append(dict(assumptions.listed()))
            if assumptions.by_default:
                by_default.add(outcome)
    everywhere = [one for many in found.values() for one in many]
    return tuple(
        _route(outcome, _when(paths, everywhere), by_default=outcome in by_default)
        for outcome, paths in found.items()
    )


def _when(paths: list[dict[str, object]], everywhere: list[dict[str, object]]) -> tuple[str, ...]:
    """What all these paths assume and not all paths do."""
    common = {
        text: value
        for text, value in paths[0].items()
        if all(one.get(text, OTHER) == value for one in paths)
    }
    return tuple(
        f"{text} = {_shown(value)}"
        for text, value in common.items()
        if not all(one.get(text, OTHER) == value for one in everywhere)
    )


def _shown(value: object) -> str:
    return value.text if isinstance(value, Thing) else repr(value)


def _route(outcome: _Outcome, when: tuple[str, ...], *, by_default: bool) -> Route:
    translation: Translation
    if outcome.hashed:
        translation = RoutedOutside(
            name="hash of the token id", reason="the experts are looked up by the token's id"
        )
    else:
        translation = strategy_of(outcome.settings, outcome.method)
    return Route(
        when=when,
        settings=outcome.settings,
        translation=translation,
        comparison=compare_method(outcome.method, translation),
        binds=outcome.binds,
        by_default=by_default,
    )


def _outcome(constructor: Constructor, routing: Routing, module: str) -> _Outcome:
    get, resolve = routing.topk.get, constructor.resolve
    grouped = bool(resolve(get("use_grouped_topk", False), (True, False)))
    bias = resolve(get("correction_bias"), (Thing("a bias"), None))
    custom = get("custom_routing_function")
    # Not read by SGLang for these, so not assumed.
    read = custom is None and not (grouped and bias is not None)
    scoring = resolve(get("scoring_func", "softmax"), SCORING) if read else "softmax"
    if scoring not in SCORING:
        raise Infeasible  # SGLang refuses it
    factor = resolve(get("routed_scaling_factor"), _factors(get("routed_scaling_factor")))
    applied = bool(resolve(get("apply_routed_scaling_factor_on_output", False), (True, False)))
    groups = resolve(get("num_expert_group"), (_GROUPS,)) if grouped else None
    kept = resolve(get("topk_group"), (_KEPT,)) if grouped else None
    settings = TopKSettings(
        top_k=1,
        scoring_func=str(scoring),
        renormalize=bool(resolve(get("renormalize", True), (True, False))),
        use_grouped_topk=grouped,
        num_expert_group=groups if isinstance(groups, int) else _GROUPS if grouped else None,
        topk_group=kept if isinstance(kept, int) else _KEPT if grouped else None,
        has_correction_bias=bias is not None,
        routed_scaling_factor=float(factor)
        if applied and isinstance(factor, int | float)
        else None,
        custom_routing_function=_custom(custom, module),
    )
    method = routing.method
    if isinstance(method, Unknown):
        method = resolve(method, (None,))
    return _Outcome(
        settings=settings,
        hashed=routing.hashed,
        method=method.name if isinstance(method, Method) else None,
        binds=routing.binds,
    )


def _factors(value: object) -> tuple[object, ...]:
    """What a factor is assumed to be: what the config may leave out, and another."""
    if isinstance(value, Unknown) and isinstance(value.default, float | None):
        return (value.default, _FACTOR)
    return (_FACTOR,)


def _custom(value: object, module: str) -> str | None:
    match value:
        case None:
            return None
        case Unknown(text=text) | Thing(text=text):
            return f"sglang.srt.models.{module}.{text}"
        case _:
            return repr(value)


FORMATS: Mapping[str, Family] = MappingProxyType(
    {
        "bf16": "bf16",
        "fp8_block": "fp8_block_scale",
        "fp8_per_tensor": "fp8_per_tensor_scale",
        "nvfp4": "fp4_block_scale",
        "mxfp4": "fp4_block_scale",
    }
)
"""The formats that SGLang has a trtllm kernel for, and the kernel's family."""


def kernel_path(translation: Translation, quant: str, shape: RoutingShape) -> str:
    """Who routes a layer, by the facts of the newest FlashInfer that is known here.

    Args:
        translation: of its TopK.
        quant: a name of `FORMATS`.
        shape: of the layer.
    """
    if isinstance(translation, RoutedOutside):
        return f"precomputed: {translation.reason}"
    family = FORMATS[quant]
    version = parse_version(facts.NEWEST)
    assert not isinstance(version, Refused), "a release that is known here"
    served, refused = facts.methods(version, family)
    rules = KernelRules(
        kernel=entry_point(family, FromLogits),
        methods=served,
        refused_methods=refused,
        weight_on_input=family in facts.WEIGHT_ON_INPUT,
        source=f"flashinfer-python {facts.NEWEST}",
    )
    told = translation.in_kernel(shape, rules)
    if isinstance(told, Refused):
        return f"precomputed: {told.reason}"
    return f"in the kernel, as {told.routing_method_type}"


def shape_of(config: Mapping[str, object] | None, translation: Translation) -> RoutingShape:
    """A config's experts and top_k; without one, a size of the method's models."""
    small = isinstance(translation, Llama4)
    fields = _fields(config) or {}
    experts = _first(fields, ("num_experts", "n_routed_experts", "num_local_experts"))
    top_k = _first(fields, ("num_experts_per_tok", "moe_top_k", "top_k"))
    return RoutingShape(
        num_experts=experts or (16 if small else 256), top_k=top_k or (1 if small else 8)
    )


def _first(fields: Mapping[str, object], names: tuple[str, ...]) -> int | None:
    found = (fields.get(name) for name in names)
    return next((one for one in found if isinstance(one, int) and one > 0), None)
