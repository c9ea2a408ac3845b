"""What a test knows of a command that it called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Protocol

import attrs


@attrs.frozen(kw_only=True)
class Done:
    """A command that has ended."""

    status: int
    out: str
    err: str

    def json(self) -> dict[str, object]:
        """Everything on stdout, which is one JSON object."""
        data: object = json.loads(self.out)
        assert isinstance(data, dict)
        return data


class Cli(Protocol):
    """`typed-moe` with these arguments."""

    def __call__(self, *argv: str) -> Done: ...


def part(data: Mapping[str, object], *path: str) -> dict[str, object]:
    """An object inside of a JSON object."""
    found: object = data
    for name in path:
        assert isinstance(found, dict)
        found = found[name]
    assert isinstance(found, dict)
    return found


def number(data: Mapping[str, object], name: str) -> float:
    """A number of a JSON object."""
    value = data[name]
    assert isinstance(value, int | float)
    return float(value)


def items(data: Mapping[str, object], name: str) -> list[dict[str, object]]:
    """A list of objects in a JSON object."""
    value = data[name]
    assert isinstance(value, list)
    return value
