"""What released FlashInfer wheels define, written down without importing them.

    python tests/kernels/extract_signatures.py WHEEL...

Each wheel gives `flashinfer_signatures/<version>.json`: the public `trtllm_*_moe` functions and the
enums whose numbers they take, read from the sources by `ast`. A wheel comes from
`pip download --no-deps flashinfer-python==<version>`; the tables are kept here, the wheels are not.
"""

from __future__ import annotations

import ast
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypedDict

FOLDER = Path(__file__).parent / "flashinfer_signatures"
# The functions are in the first in every release so far; between 0.6.3 and 0.6.7 the enums moved to
# the second.
FUNCTIONS_FILE = "flashinfer/fused_moe/core.py"
ENUMS_FILE = "flashinfer/tllm_enums.py"
ENTRY_POINT = re.compile(r"trtllm_\w+_moe")
ENUMS = frozenset(
    {
        "ActivationType",
        "Fp8QuantizationType",
        "GatedActType",
        "RoutingInputMode",
        "RoutingMethodType",
        "SfLayout",
        "WeightLayout",
    }
)

Kind = Literal["positional_or_keyword", "keyword_only"]


class ParameterJson(TypedDict):
    """One parameter; its default as it stands in the source."""

    name: str
    kind: Kind
    required: bool
    default: str | None


class TableJson(TypedDict):
    """One file of `flashinfer_signatures/`."""

    version: str
    functions: dict[str, list[ParameterJson]]
    enums: dict[str, dict[str, int]]


def parameter(argument: ast.arg, kind: Kind, default: ast.expr | None) -> ParameterJson:
    """One parameter, as it is written."""
    return {
        "name": argument.arg,
        "kind": kind,
        "required": default is None,
        "default": None if default is None else ast.unparse(default),
    }


def parameters(function: ast.FunctionDef) -> list[ParameterJson]:
    """In order; what this does not expect, `*args` and the like, stops the extraction."""
    given = function.args
    if given.posonlyargs or given.vararg or given.kwarg:
        raise ValueError(f"{function.name} has a kind of parameter that no table holds yet.")
    # Defaults belong to the last of the positional parameters.
    required: list[ast.expr | None] = [None] * (len(given.args) - len(given.defaults))
    by_position = zip(given.args, required + list(given.defaults), strict=True)
    by_name = zip(given.kwonlyargs, given.kw_defaults, strict=True)
    return [
        *(
            parameter(argument, "positional_or_keyword", default)
            for argument, default in by_position
        ),
        *(parameter(argument, "keyword_only", default) for argument, default in by_name),
    ]


def members(enum: ast.ClassDef) -> Iterator[tuple[str, int]]:
    """Names and numbers; a number may be written `0` or `(0,)`."""
    for line in enum.body:
        match line:
            case ast.Assign(targets=[ast.Name(id=name)], value=written):
                value: object = ast.literal_eval(written)
                number = value[0] if isinstance(value, tuple) else value
                if not isinstance(number, int):
                    raise ValueError(f"{enum.name}.{name} is no number: {ast.unparse(written)}.")
                yield name, number
            case _:
                pass


def table(version: str, sources: list[str]) -> TableJson:
    """What the sources of one version define at the top level."""
    made: TableJson = {"version": version, "functions": {}, "enums": {}}
    for statement in (line for source in sources for line in ast.parse(source).body):
        match statement:
            case ast.FunctionDef(name=name) if ENTRY_POINT.fullmatch(name):
                made["functions"][name] = parameters(statement)
            case ast.ClassDef(name=name) if name in ENUMS:
                made["enums"][name] = dict(members(statement))
            case _:
                pass
    return made


def table_of_wheel(wheel: Path) -> TableJson:
    """The table of `flashinfer_python-<version>-....whl`."""
    with zipfile.ZipFile(wheel) as archive:
        present = [name for name in (FUNCTIONS_FILE, ENUMS_FILE) if name in archive.namelist()]
        sources = [archive.read(name).decode() for name in present]
    return table(wheel.name.split("-")[1], sources)


def to_text(made: TableJson) -> str:
    """JSON with one parameter or member a line, names sorted: two versions are easy to diff.

    The order of parameters and of enum members stays the source's.
    """
    functions = {
        name: [json.dumps(entry) for entry in entries]
        for name, entries in sorted(made["functions"].items())
    }
    enums = {
        name: [f"{json.dumps(member)}: {number}" for member, number in numbers.items()]
        for name, numbers in sorted(made["enums"].items())
    }
    return "\n".join(
        [
            "{",
            f'  "version": {json.dumps(made["version"])},',
            '  "functions": {',
            ",\n".join(block(name, "[", lines, "]") for name, lines in functions.items()),
            "  },",
            '  "enums": {',
            ",\n".join(block(name, "{", lines, "}") for name, lines in enums.items()),
            "  }",
            "}",
            "",
        ]
    )


def block(name: str, opening: str, lines: list[str], closing: str) -> str:
    """One named list or object, an entry a line."""
    inner = ",\n".join(f"      {line}" for line in lines)
    return f"    {json.dumps(name)}: {opening}\n{inner}\n    {closing}"


def main() -> None:
    """A table for every wheel that is named on the command line."""
    for wheel in map(Path, sys.argv[1:]):
        made = table_of_wheel(wheel)
        target = FOLDER / f"{made['version']}.json"
        target.write_text(to_text(made))
        print(target)


if __name__ == "__main__":
    main()
