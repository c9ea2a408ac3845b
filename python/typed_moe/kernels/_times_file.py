"""Times that `typed-moe bench layer --json` measured: this machine's, then the built-in ones.

`TYPED_MOE_TIMES` names this machine's file. It is read once per process, and refused as a whole where
anything in it that is read is wrong. The built-in ones are such reports too, as they were written, in
`typed_moe/kernels/times`: a new measurement is a new file there, or takes an old one's place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Final

from typed_moe.kernels._measured import OURS, PROVIDERS, MeasuredLayer

TIMES_VARIABLE: Final = "TYPED_MOE_TIMES"
"""The environment variable that names a file of `typed-moe bench layer --json`."""
BUILT_IN: Final = Path(__file__).parent / "times"
"""The folder of the reports that are shipped."""
_SIZES = ("num_experts", "top_k", "hidden_size", "intermediate_size")


def measured_layers(card: str) -> tuple[MeasuredLayer, ...]:
    """The file's, then the built-in ones.

    Raises:
        ValueError: as `read_times_file`; or the file is another card's.
    """
    path = os.environ.get(TIMES_VARIABLE)
    if not path:
        return built_in()
    own = _read(path)
    if own[0].card != card:
        raise ValueError(
            f"{TIMES_VARIABLE}={path} was measured on {own[0].card}, and this card is {card}; run "
            "typed-moe bench layer here, or unset the variable for the built-in times"
        )
    return (*own, *built_in())


@cache
def built_in() -> tuple[MeasuredLayer, ...]:
    """Of every report that is shipped, by the files' names."""
    files = sorted(BUILT_IN.glob("*.json"))
    return tuple(layer for file in files for layer in read_times_file(file, shipped=True))


@cache
def _read(path: str) -> tuple[MeasuredLayer, ...]:
    return read_times_file(Path(path))


def read_times_file(path: Path, *, shipped: bool = False) -> tuple[MeasuredLayer, ...]:
    """Read and check a file: the layers that were timed with kernels by name.

    Args:
        path: of the file.
        shipped: it is the package's own, which no variable names.

    Raises:
        ValueError: it cannot be read, is no such report, or has no time of two kernels.
    """
    wrong = f"typed_moe's own {path}" if shipped else f"{TIMES_VARIABLE}={path}"
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong} cannot be read as JSON: {error}") from error
    try:
        layers = tuple(_layers(_object(data, "the file")))
    except ValueError as error:
        raise ValueError(
            f"{wrong}: {error}; typed-moe bench layer --json writes such files"
        ) from error
    if not layers:
        named = " ".join(f"--kernel {name}" for name in (OURS, *PROVIDERS))
        raise ValueError(
            f"{wrong} has no time of {OURS} beside one of {', '.join(PROVIDERS)}; they are timed by "
            f"typed-moe bench layer {named} --json {path}"
        )
    return layers


def _layers(report: Mapping[str, object]) -> Iterator[MeasuredLayer]:
    machine = _object(_of(report, "machine", "the file"), "machine")
    card = _text(machine, "device_name", "machine")
    date = _text(report, "date", "the file")
    rows = [_object(one, "a row") for one in _list(report, "rows")]
    for one in _list(report, "blocks"):
        block = _object(one, "a block")
        model, name = _text(block, "model", "a block"), _text(block, "format", "a block")
        mine = [row for row in rows if (row.get("model"), row.get("format")) == (model, name)]
        times = _times(mine)
        if not times:
            continue
        sizes = {size: _whole(block, size, "a block") for size in _SIZES}
        libraries = _object(block.get("libraries", {}), "libraries")
        versions = "".join(f"{version}, " for version in libraries.values())
        yield MeasuredLayer(
            card=card,
            format=name,
            model=model,
            microseconds=times,
            source=versions + date,
            **sizes,
        )


def _times(rows: list[Mapping[str, object]]) -> dict[int, dict[str, float]]:
    """By T and kernel; T with the Triton kernels and a library's alone.

    Infinity where the library's kernel was wrong or failed: no size from there down is its.
    """
    times: dict[int, dict[str, float]] = {}
    for row in rows:
        side, taken = row.get("side"), row.get("graph_us")
        if side not in (OURS, *PROVIDERS):
            continue
        if taken is None and side != OURS:
            taken = math.inf
        if taken is None:
            continue
        # bool is an int in Python, and no time.
        if isinstance(taken, bool) or not isinstance(taken, int | float) or not taken > 0:
            raise ValueError(f"graph_us is {taken!r}; allowed: microseconds above 0, or null")
        times.setdefault(_whole(row, "tokens", "a row"), {})[str(side)] = float(taken)
    both = {tokens: by for tokens, by in times.items() if OURS in by and len(by) > 1}
    timed = any(
        math.isfinite(us) for by in both.values() for name, us in by.items() if name != OURS
    )
    return both if timed else {}


def _of(data: Mapping[str, object], name: str, where: str) -> object:
    if name not in data:
        raise ValueError(f"{where} lacks {name!r}")
    return data[name]


def _object(data: object, where: str) -> Mapping[str, object]:
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a JSON {type(data).__name__}; allowed: an object")
    return {str(name): value for name, value in data.items()}


def _list(data: Mapping[str, object], name: str) -> list[object]:
    found = _of(data, name, "the file")
    if not isinstance(found, list):
        raise ValueError(f"{name} is a JSON {type(found).__name__}; allowed: a list")
    return found


def _text(data: Mapping[str, object], name: str, where: str) -> str:
    found = _of(data, name, where)
    if not isinstance(found, str) or not found:
        raise ValueError(f"{where}'s {name} is {found!r}; allowed: text")
    return found


def _whole(data: Mapping[str, object], name: str, where: str) -> int:
    found = _of(data, name, where)
    if isinstance(found, bool) or not isinstance(found, int) or found < 1:
        raise ValueError(f"{where}'s {name} is {found!r}; allowed: a whole number from 1 on")
    return found
