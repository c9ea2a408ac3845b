"""`typed-moe strategies`, `configs`, `--version` and the help: told by the classes themselves."""

from __future__ import annotations

import importlib.metadata
import inspect

import attrs
import pytest

from tests.cli.calls import Cli, items
from typed_moe import load_config, moe_spec, routing, shipped_configs
from typed_moe.cli._strategies import strategies, strategy_classes

_METHODS = {
    "Default",
    "Renormalize",
    "DeepSeekV3",
    "Llama4",
    "RenormalizeNaive",
    "TopK",
    "SigmoidRenorm",
    "MiniMax2",
    "Sigmoid",
    "TopKSigmoid",
    "SqrtSoftplus",
    "BiasedSigmoid",
    "ScaledSoftmax",
    "GroupedSoftmax",
}


def test_every_strategy_is_told() -> None:
    """The ten of FlashInfer and the four of ours, each with maths, models and a source."""
    found = strategies()

    assert {one.name for one in found} == _METHODS
    for one in found:
        assert all((one.summary, one.maths, one.models, one.source)), one.name
        assert "Attributes" not in one.maths
        assert "Models:" not in one.maths + one.models + one.source
        assert "Source:" not in one.maths + one.models


def test_nothing_of_a_docstring_is_lost() -> None:
    """Every word of a strategy's docstring is in what is told of it, but for the labels."""
    for kind, told in zip(strategy_classes(), strategies(), strict=True):
        words = set((inspect.getdoc(kind) or "").split()) - {"Attributes:", "Models:", "Source:"}
        text = f"{told.summary} {told.maths} {told.models} {told.source}"
        settings = " ".join(f"{one.name}: {one.about}" for one in told.settings)
        assert words <= set(f"{text} {settings}".split()), kind.__name__


def test_settings_are_the_fields_with_their_defaults() -> None:
    """Names and defaults as attrs has them, and every field has a line in the docstring."""
    for kind, told in zip(strategy_classes(), strategies(), strict=True):
        fields = {
            field.name: None if field.default is attrs.NOTHING else repr(field.default)
            for field in attrs.fields(kind)
        }
        assert {one.name: one.default for one in told.settings} == fields
        assert all(one.about for one in told.settings)


def test_the_models_of_a_strategy_are_the_shipped_ones(cli: Cli) -> None:
    """Each shipped config is listed under the strategy that its config leads to, and nowhere else."""
    told = items(cli("strategies", "--json").json(), "strategies")

    users = {str(one["name"]): one["configs"] for one in told}
    for name in shipped_configs():
        method = moe_spec(load_config(name)).routing.name
        listed = [strategy for strategy, names in users.items() if name in str(names).split("'")]
        assert listed == [method]


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("command", ["strategies", "configs"])
def test_the_text_fits_the_terminal(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, command: str, columns: int
) -> None:
    """No line is wider than the terminal; every entry is there."""
    monkeypatch.setenv("COLUMNS", str(columns))

    done = cli(command)

    lines = done.out.splitlines()
    entries = shipped_configs() if command == "configs" else _METHODS
    assert done.status == 0
    assert max(map(len, lines)) <= columns
    assert set(entries) <= {line.split("  ")[0] for line in lines if line}


def test_configs_have_their_sources(cli: Cli) -> None:
    """Name, strategy and sizes as the config says, and the repository that it is from."""
    told = items(cli("configs", "--json").json(), "configs")

    assert [one["name"] for one in told] == list(shipped_configs())
    for one in told:
        spec = moe_spec(load_config(str(one["name"])))
        assert one["strategy"] == spec.routing.name
        assert (one["num_experts"], one["top_k"]) == (spec.num_experts, spec.top_k)
        assert "/" in str(one["source"])


def test_the_strategies_are_the_routing_rooms() -> None:
    """A strategy that the room exports is not forgotten."""
    exported = {name for name in routing.__all__ if name in _METHODS}

    assert {kind.__name__ for kind in strategy_classes()} == exported == _METHODS


def test_version(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The installed version, or that there is none."""

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", lambda name: f"9.8.7 of {name}")
    assert cli("--version").out == "typed-moe 9.8.7 of typed-moe\n"

    monkeypatch.setattr(importlib.metadata, "version", missing)
    done = cli("--version")
    assert (done.status, done.out) == (0, "typed-moe (from a checkout, not installed)\n")


def test_no_command_shows_the_help(cli: Cli) -> None:
    """The four commands, and exit status 2."""
    done = cli()

    assert done.status == 2
    for command in ("run", "explain", "strategies", "configs"):
        assert command in done.out
