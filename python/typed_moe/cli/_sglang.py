"""`typed-moe sglang doctor`: what the models of an installed SGLang route by, and what they say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import final

import attrs
from rich.console import Console

from typed_moe.cli._errors import user_errors
from typed_moe.cli._output import Fact, print_facts, print_heading, print_paragraph, print_title
from typed_moe.models import load_config
from typed_moe.sglang import (
    FORMATS,
    Agreement,
    BlockReport,
    Route,
    RoutedOutside,
    Verdict,
    examine,
    kernel_path,
    models_folder,
    shape_of,
)

_SHOWN = 4
"""Wrong routes of one class that are printed."""


@final
@attrs.frozen(kw_only=True)
class Diagnosis:
    """What the doctor found.

    Attributes:
        release: of SGLang.
        config: the model's own, or None for all models.
        blocks: every class that builds a TopK.
    """

    release: str
    config: Mapping[str, object] | None
    blocks: tuple[BlockReport, ...]


def doctor(model_path: Path | None) -> Diagnosis:
    """Look at the installed SGLang, or at what it makes of one model.

    Raises:
        UserError: SGLang is not installed, or the model's config is not there or not for it.
    """
    with user_errors():
        config = None if model_path is None else load_config(model_path)
        blocks = examine(models_folder(), config)
    try:
        release = metadata.version("sglang")
    except metadata.PackageNotFoundError:
        release = "(from a checkout)"
    return Diagnosis(release=release, config=config, blocks=blocks)


def print_diagnosis(found: Diagnosis, console: Console) -> None:
    """Wrong numbers first, with the settings that make them wrong; then the rest, a line each."""
    count = Counter(block.verdict for block in found.blocks)
    print_title(
        console,
        f"SGLang {found.release}",
        f"{len(found.blocks)} classes that build a TopK: "
        + ", ".join(f"{number} {verdict.value}" for verdict, number in count.items()),
    )
    for verdict in (Verdict.WRONG, Verdict.WRONG_SOMETIMES):
        blocks = [one for one in found.blocks if one.verdict is verdict]
        if blocks:
            print_heading(console, verdict.value.capitalize())
        for block in blocks:
            print_paragraph(console, _name(block))
            wrong = [("number", _wrong(one)) for one in block.routes if _is_wrong(one)]
            more = [("", f"and {len(wrong) - _SHOWN} more, see --json")] * (len(wrong) > _SHOWN)
            print_facts(console, wrong[:_SHOWN] + more, indent=4)
    for verdict in (Verdict.AGREES, Verdict.NO_NUMBER, Verdict.OUTSIDE):
        said = [(_name(one), _rules(one)) for one in found.blocks if one.verdict is verdict]
        if said:
            print_heading(console, verdict.value.capitalize())
        for name, rules in said:
            print_paragraph(console, f"{name}: {rules}")
    if found.config is not None:
        _print_paths(found, console)


def _print_paths(found: Diagnosis, console: Console) -> None:
    print_heading(console, "Who routes, by format")
    for route in (one for block in found.blocks for one in block.routes):
        if route.when:
            print_paragraph(console, "where " + "; ".join(route.when))
        print_facts(console, [("strategy", rule_text(route)), *_paths(route, found.config)])


def _paths(route: Route, config: Mapping[str, object] | None) -> list[Fact]:
    shape = shape_of(config, route.translation)
    return [(name, kernel_path(route.translation, name, shape)) for name in FORMATS]


def _name(block: BlockReport) -> str:
    models = f" ({', '.join(block.models)})" if block.models else ""
    return f"{block.module}.{block.name}, line {block.line}{models}"


def _is_wrong(route: Route) -> bool:
    return route.comparison.agreement is Agreement.CONFLICT


def _wrong(route: Route) -> str:
    where = f", where {'; '.join(route.when)}" if route.when else ""
    return f"{route.comparison.method}, and its TopK computes {rule_text(route)}{where}"


def rule_text(route: Route) -> str:
    """The strategy with the settings that the model gives, or what there is none for."""
    translation = route.translation
    kind: type = type(translation)
    if isinstance(translation, RoutedOutside) or not attrs.has(kind):
        return translation.name
    settings = [
        f"{field.name}={getattr(translation, field.name)!r}"
        for field in attrs.fields(kind)
        if not field.name.endswith("_dtype") and getattr(translation, field.name) != field.default
    ]
    return f"{translation.name}({', '.join(settings)})"


def _rules(block: BlockReport) -> str:
    names = dict.fromkeys(one.translation.name for one in block.routes)
    bound = "" if all(one.binds for one in block.routes) else "; never bound to its experts"
    return "; ".join(names) + bound


def diagnosis_json(found: Diagnosis) -> dict[str, object]:
    """Everything, as plain values."""
    return {
        "sglang": found.release,
        "blocks": [
            {
                "module": block.module,
                "class": block.name,
                "line": block.line,
                "models": list(block.models),
                "verdict": block.verdict.value,
                "routes": [_route_json(one, found.config) for one in block.routes],
            }
            for block in found.blocks
        ],
    }


def _route_json(route: Route, config: Mapping[str, object] | None) -> dict[str, object]:
    outside = isinstance(route.translation, RoutedOutside)
    return {
        "when": list(route.when),
        "topk": attrs.asdict(route.settings),
        "strategy": None if outside else rule_text(route),
        "routed_outside": route.translation.name if outside else None,
        "routing_method_type": route.comparison.method,
        "agreement": route.comparison.agreement.value,
        "binds": route.binds,
        "by_default": route.by_default,
        "kernel_path": dict(_paths(route, config)),
    }
