"""What `bench` and `tune` read from their options alike."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from typed_moe.cli._errors import UserError, user_errors
from typed_moe.config import FORMATS, Format

_MOST_TOKENS = 1 << 20


def read_formats(names: tuple[str, ...], default: tuple[Format, ...]) -> tuple[Format, ...]:
    """The formats of these names.

    Raises:
        UserError: no such name.
    """
    known: Mapping[str, Format] = {str(name): quant for name, quant in FORMATS.items()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"--format is {unknown[0]!r}; allowed: {', '.join(known)}")
    return tuple(known[name] for name in names) if names else default


def read_tokens(tokens: tuple[int, ...]) -> tuple[int, ...]:
    """Each T once, in order.

    Raises:
        UserError: one is below 1, or beyond what any card's memory holds.
    """
    wrong = [count for count in tokens if not 1 <= count <= _MOST_TOKENS]
    if wrong:
        raise UserError(f"--tokens is {wrong[0]}; allowed: 1 to {_MOST_TOKENS}")
    return tuple(dict.fromkeys(tokens))


def check_writable(*files: Path | None) -> None:
    """Before minutes of measuring: the files can be written.

    Raises:
        UserError: one is not.
    """
    for file in files:
        if file is not None and not file.parent.is_dir():
            raise UserError(f"{file}: there is no folder {file.parent}; make it first")
        if file is not None and file.is_dir():
            raise UserError(f"{file} is a folder; name a file in it")
        if file is not None and not os.access(file if file.exists() else file.parent, os.W_OK):
            raise UserError(f"{file} cannot be written; name another file")


def write_json(file: Path, data: Mapping[str, object]) -> None:
    """One JSON object.

    Raises:
        UserError: it cannot be written.
    """
    with user_errors("the report could not be written: "):
        file.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
