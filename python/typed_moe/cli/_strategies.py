"""`typed-moe strategies` and `typed-moe configs`: what there is, told by the classes themselves."""

from __future__ import annotations

import inspect
import re
from typing import final

import attrs
from rich.console import Console

from typed_moe import routing
from typed_moe.cli._output import (
    Fact,
    print_facts,
    print_paragraph,
    print_title,
)
from typed_moe.models import MoeSpec, load_config, moe_spec, shipped_configs


@final
@attrs.frozen(kw_only=True)
class Setting:
    """One field of a strategy.

    Attributes:
        name: of the field.
        default: its repr; None: it has to be given.
        about: what the class says of it.
    """

    name: str
    default: str | None
    about: str


@final
@attrs.frozen(kw_only=True)
class StrategyFacts:
    """What a strategy's class says of itself.

    Attributes:
        name: of the routing method.
        summary: one sentence.
        maths: the formulas, and what there is to know about them.
        settings: its fields.
        models: who uses it.
        source: where the maths is from.
        configs: shipped configs that use it.
    """

    name: str
    summary: str
    maths: str
    settings: tuple[Setting, ...]
    models: str
    source: str
    configs: tuple[str, ...]


def strategy_classes() -> tuple[type, ...]:
    """Every strategy of the routing room, by name."""
    public = (getattr(routing, name) for name in routing.__all__)
    return tuple(one for one in public if inspect.isclass(one) and _is_strategy(one))


def _is_strategy(one: type) -> bool:
    return attrs.has(one) and hasattr(one, "select_experts")


def strategies() -> tuple[StrategyFacts, ...]:
    """Every strategy, from its docstring and its fields."""
    users: dict[str, list[str]] = {}
    for name, spec in shipped_specs():
        users.setdefault(spec.routing.name, []).append(name)
    return tuple(_facts(one, users) for one in strategy_classes())


def shipped_specs() -> tuple[tuple[str, MoeSpec], ...]:
    """Each shipped config with its first MoE layer."""
    return tuple((name, moe_spec(load_config(name))) for name in shipped_configs())


def _facts(one: type, users: dict[str, list[str]]) -> StrategyFacts:
    summary, *paragraphs = (inspect.getdoc(one) or "").split("\n\n")
    maths: list[str] = []
    labelled: dict[str, str] = {}
    about: dict[str, str] = {}
    for paragraph in paragraphs:
        if paragraph.startswith("Attributes:"):
            about = _attributes(paragraph)
        elif re.match("(Models|Source):", paragraph):
            labelled |= _labelled(paragraph)
        else:
            maths.append(_joined(paragraph))
    settings = tuple(
        Setting(
            name=field.name,
            default=None if field.default is attrs.NOTHING else repr(field.default),
            about=about.get(field.name, ""),
        )
        for field in attrs.fields(one)
    )
    return StrategyFacts(
        name=one.__name__,
        summary=_joined(summary),
        maths=" ".join(maths),
        settings=settings,
        models=labelled.get("Models", ""),
        source=labelled.get("Source", ""),
        configs=tuple(users.get(one.__name__, ())),
    )


def _labelled(paragraph: str) -> dict[str, str]:
    """What follows each of `Models:` and `Source:`."""
    _, *parts = re.split(r"^(Models|Source):", paragraph, flags=re.MULTILINE)
    return {label: _joined(text) for label, text in zip(parts[::2], parts[1::2], strict=True)}


def _attributes(paragraph: str) -> dict[str, str]:
    """The entries of the docstring's `Attributes:`."""
    _, *parts = re.split(r"^    (\w+): ", paragraph, flags=re.MULTILINE)
    return {name: _joined(text) for name, text in zip(parts[::2], parts[1::2], strict=True)}


def _joined(text: str) -> str:
    return " ".join(text.split())


def strategies_json(found: tuple[StrategyFacts, ...]) -> dict[str, object]:
    """The strategies as plain values."""
    return {"strategies": [attrs.asdict(one) for one in found]}


def print_strategies(found: tuple[StrategyFacts, ...], console: Console) -> None:
    """The strategies for people."""
    for number, one in enumerate(found):
        if number:
            console.print()
        print_title(console, one.name, "")
        print_paragraph(console, one.summary)
        rows: list[Fact] = [("maths", one.maths)]
        rows += [("setting", _setting(setting)) for setting in one.settings]
        rows += [("models", one.models), ("source", one.source)]
        rows += [("configs", ", ".join(one.configs))]
        print_facts(console, [row for row in rows if row[1]])


def _setting(setting: Setting) -> str:
    default = "(required)" if setting.default is None else f"= {setting.default}"
    return f"{setting.name} {default}: {setting.about}"


@final
@attrs.frozen(kw_only=True)
class ConfigFacts:
    """One shipped config."""

    name: str
    source: str
    model_type: str
    strategy: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    note: str


def configs() -> tuple[ConfigFacts, ...]:
    """Every shipped config, with where its values are from."""
    found = []
    for name, spec in shipped_specs():
        source = load_config(name).get("_source")
        about = source if isinstance(source, dict) else {}
        found.append(
            ConfigFacts(
                name=name,
                source=f"{about.get('repository', '')} {about.get('file', '')}".strip(),
                model_type=spec.model_type,
                strategy=spec.routing.name,
                num_experts=spec.num_experts,
                top_k=spec.top_k,
                hidden_size=spec.hidden_size,
                intermediate_size=spec.intermediate_size,
                note=str(about.get("note", "")),
            )
        )
    return tuple(found)


def configs_json(found: tuple[ConfigFacts, ...]) -> dict[str, object]:
    """The configs as plain values."""
    return {"configs": [attrs.asdict(one) for one in found]}


def print_configs(found: tuple[ConfigFacts, ...], console: Console) -> None:
    """The configs for people."""
    for one in found:
        print_title(
            console,
            one.name,
            f"{one.strategy}, {one.num_experts} experts, top_k {one.top_k}, hidden "
            f"{one.hidden_size}, intermediate {one.intermediate_size}",
        )
        print_facts(console, [("from", one.source), ("note", one.note)])
