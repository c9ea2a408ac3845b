"""The entry points of released FlashInfer versions, as signatures that a test can bind.

`table("0.6.12").functions["trtllm_bf16_moe"].bind(**keywords)` raises as that version would. The
tables are written by `extract_signatures.py`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import re
from collections.abc import Mapping

import attrs

from tests.kernels.extract_signatures import FOLDER, Kind, ParameterJson, TableJson

Numbers = Mapping[str, Mapping[str, int]]
KINDS: dict[Kind, inspect._ParameterKind] = {
    "positional_or_keyword": inspect.Parameter.POSITIONAL_OR_KEYWORD,
    "keyword_only": inspect.Parameter.KEYWORD_ONLY,
}


def by_release(version: str) -> tuple[int, ...]:
    """Sorts 0.6.12 after 0.6.8, and 0.7.2.post1 after 0.7.0."""
    return tuple(map(int, re.findall(r"\d+", version)))


VERSIONS: tuple[str, ...] = tuple(
    sorted((file.stem for file in FOLDER.glob("*.json")), key=by_release)
)


@attrs.frozen(kw_only=True)
class Table:
    """What one version defines: entry points by name, and enum members' numbers by enum."""

    version: str
    functions: Mapping[str, inspect.Signature]
    enums: Numbers


def default_value(written: str, enums: Numbers) -> object:
    """A default's value; an enum member, `.value` or not, is its number in that version."""
    match written.split("."):
        case [enum, member] | [enum, member, "value"] if enum in enums:
            return enums[enum][member]
        case _:
            value: object = ast.literal_eval(written)
            return value


def parameter(entry: ParameterJson, enums: Numbers) -> inspect.Parameter:
    """One parameter, without its annotation."""
    written = entry["default"]
    default = inspect.Parameter.empty if written is None else default_value(written, enums)
    return inspect.Parameter(entry["name"], KINDS[entry["kind"]], default=default)


def from_json(raw: TableJson) -> Table:
    """A table as it was extracted, with signatures in place of lists."""
    return Table(
        version=raw["version"],
        functions={
            name: inspect.Signature([parameter(entry, raw["enums"]) for entry in entries])
            for name, entries in raw["functions"].items()
        },
        enums=raw["enums"],
    )


@functools.cache
def table(version: str) -> Table:
    """The table of one of `VERSIONS`."""
    raw: TableJson = json.loads((FOLDER / f"{version}.json").read_text())
    return from_json(raw)
