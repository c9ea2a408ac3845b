"""Tiles that `typed-moe tune` measured on this machine's card, in place of the built-in tables.

`TYPED_MOE_TILES` names the file. It is read once per process, and refused as a whole where anything in
it is wrong: a tile that half fits computes nonsense or stops the card.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Final, cast, final, get_args

import attrs

from typed_moe.kernels._expert_tiles import (
    FP8_BLOCK,
    LEAST_GROUPED_ROWS,
    PERSISTENT_STEPS,
    UNPACKED,
    ExpertTile,
    GemmTile,
    Operand,
    Table,
    tile_refusal,
)

TILES_VARIABLE: Final = "TYPED_MOE_TILES"
"""The environment variable that names a file of `typed-moe tune`."""
_FORMAT = 1
_OPERANDS: tuple[str, ...] = get_args(Operand)
_LAST = 2.0**31
"""Rows per expert: more than any call has."""

_HEIGHTS = (16, 32, 64, 128, 256)
_LEAST_FP4_STEP = 64
_SIZES: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "block_n": (16, 32, 64, 128, 256),
        "block_k": (32, 64, 128, 256),
        "warps": (1, 2, 4, 8, 16),
        "stages": tuple(range(1, 9)),
        "group_m": tuple(range(1, 65)),
    }
)
_SWITCHES = ("tma", "persistent")
_LATER: Mapping[str, bool] = MappingProxyType({"persistent": False})
"""What older files do not have, and what it is in them."""


@final
@attrs.frozen(kw_only=True)
class TileFile:
    """What such a file holds: the card's name as the driver gives it, and tables by operand."""

    card: str
    tables: Mapping[Operand, Table]


def tile_file() -> str | None:
    """What `TYPED_MOE_TILES` names, if it names anything."""
    return os.environ.get(TILES_VARIABLE) or None


def own_table(card: str, operand: Operand) -> Table | None:
    """The table of the file that `TYPED_MOE_TILES` names; None where there is none for the operand.

    Raises:
        ValueError: as `read_tile_file`; or the file is another card's.
    """
    path = tile_file()
    if path is None:
        return None
    found = _read(path)
    if found.card != card:
        raise ValueError(
            f"{TILES_VARIABLE}={path} was measured on {found.card}, and this card is {card}; run "
            "typed-moe tune here, or unset the variable for the built-in tables"
        )
    return found.tables.get(operand)


def tile_file_refusal(card: str) -> str | None:
    """What is wrong with the file that `TYPED_MOE_TILES` names, for a plan; None: nothing."""
    try:
        own_table(card, "bf16")
    except ValueError as error:
        return str(error)
    return None


@cache
def _read(path: str) -> TileFile:
    return read_tile_file(Path(path))


def read_tile_file(path: Path) -> TileFile:
    """Read and check a file.

    Raises:
        ValueError: it cannot be read, or something in it is no tile; the sentence says what, and
            what is allowed.
    """
    wrong = f"{TILES_VARIABLE}={path}"
    try:
        data: object = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{wrong} cannot be read as JSON: {error}") from error
    try:
        return _checked(data)
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}; typed-moe tune writes such files") from error


def _checked(data: object) -> TileFile:
    top = _object(data, "the file", {"typed_moe_tiles", "card", "tables"}, extra=True)
    if top["typed_moe_tiles"] != _FORMAT:
        raise ValueError(f"typed_moe_tiles is {top['typed_moe_tiles']!r}; allowed: {_FORMAT}")
    card = top["card"]
    if not isinstance(card, str) or not card:
        raise ValueError(f"card is {card!r}; allowed: the card's name")
    tables = _object(top["tables"], "tables", set(), extra=True)
    unknown = [name for name in tables if name not in _OPERANDS]
    if unknown:
        raise ValueError(f"tables has {unknown[0]!r}; allowed: {', '.join(_OPERANDS)}")
    return TileFile(
        card=card,
        tables={cast("Operand", name): _table(name, rows) for name, rows in tables.items()},
    )


def _table(operand: str, data: object) -> Table:
    if not isinstance(data, list) or not data:
        raise ValueError(f"the table of {operand} is {data!r}; allowed: a list of tiles")
    rows = [_row(operand, number, one) for number, one in enumerate(data)]
    limits = [most for most, _ in rows]
    if sorted(set(limits)) != limits or limits[-1] != _LAST:
        raise ValueError(
            f"the rows_per_expert of {operand} are {limits}; allowed: rising, and null at the end"
        )
    return tuple(rows)


def _row(operand: str, number: int, data: object) -> tuple[float, ExpertTile]:
    where = f"{operand}[{number}]"
    names = {"rows_per_expert", "block_m", "second_block_m", "first", "second"}
    row = _object(data, where, names)
    most = row["rows_per_expert"]
    if most is None:
        most = _LAST
    # bool is an int in Python, and no number of rows.
    if isinstance(most, bool) or not isinstance(most, int | float) or not 0 < most <= _LAST:
        raise ValueError(f"{where}.rows_per_expert is {most!r}; allowed: a number above 0, or null")
    heights = (LEAST_GROUPED_ROWS, *_HEIGHTS) if operand in UNPACKED else _HEIGHTS
    height = _one_of(row["block_m"], f"{where}.block_m", heights)
    second = row["second_block_m"]
    if second is not None:
        fitting = tuple(one for one in heights if one <= height)
        second = _one_of(second, f"{where}.second_block_m", fitting)
    tile = ExpertTile(
        block_m=height,
        second_block_m=second,
        first=_gemm(operand, row["first"], f"{where}.first"),
        second=_gemm(operand, row["second"], f"{where}.second"),
    )
    wrong = tile_refusal(tile, blocks=operand == "fp8", grouped=operand in UNPACKED)
    if wrong is not None:
        raise ValueError(f"{where}: {wrong}")
    return float(most), tile


def _gemm(operand: str, data: object, where: str) -> GemmTile:
    gemm = {**_LATER, **_object(data, where, {*_SIZES, *_SWITCHES}, later=_LATER.keys())}
    size = {
        name: _one_of(gemm[name], f"{where}.{name}", allowed) for name, allowed in _SIZES.items()
    }
    switch = {name: _switch(gemm[name], f"{where}.{name}") for name in _SWITCHES}
    if switch["persistent"] and operand not in PERSISTENT_STEPS:
        allowed = " and ".join(PERSISTENT_STEPS)
        raise ValueError(
            f"{where}.persistent is true in {operand}; allowed: false, but in {allowed}"
        )
    if switch["persistent"] and size["block_k"] != PERSISTENT_STEPS[operand]:
        raise ValueError(
            f"{where} is persistent with block_k {size['block_k']}; allowed in {operand}: "
            f"{PERSISTENT_STEPS[operand]}"
        )
    if operand == "fp8" and (size["block_k"] < FP8_BLOCK or size["block_n"] > FP8_BLOCK):
        raise ValueError(
            f"{where} has block_k {size['block_k']} and block_n {size['block_n']}; allowed in fp8: "
            f"block_k from {FP8_BLOCK} on and block_n up to {FP8_BLOCK}, the values that share a scale"
        )
    if operand == "fp4" and size["block_k"] < _LEAST_FP4_STEP:
        raise ValueError(
            f"{where} has block_k {size['block_k']}; allowed in fp4: {_LEAST_FP4_STEP} and above, "
            "sixteen elements of two bytes"
        )
    return GemmTile(
        block_n=size["block_n"],
        block_k=size["block_k"],
        warps=size["warps"],
        stages=size["stages"],
        group_m=size["group_m"],
        tma=switch["tma"],
        persistent=switch["persistent"],
    )


def _switch(value: object, where: str) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{where} is {value!r}; allowed: true and false")
    return value


def _object(
    data: object,
    where: str,
    names: set[str],
    *,
    extra: bool = False,
    later: AbstractSet[str] = frozenset(),
) -> dict[str, object]:
    """A JSON object with these names, but for the `later` ones; with others where `extra` says so."""
    if not isinstance(data, dict):
        raise ValueError(f"{where} is a JSON {type(data).__name__}; allowed: an object")
    missing = sorted(names - later - data.keys())
    unknown = sorted(data.keys() - names) if not extra else []
    if missing or unknown:
        said = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}"
        raise ValueError(f"{where} {said}; it has {', '.join(sorted(names))}")
    return {str(name): value for name, value in data.items()}


def _one_of(value: object, where: str, allowed: tuple[int, ...]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        shown = f"{allowed[0]} to {allowed[-1]}" if len(allowed) > 5 else f"{allowed}"
        raise ValueError(f"{where} is {value!r}; allowed: {shown}")
    return value


def tile_file_json(card: str, tables: Mapping[Operand, Table]) -> dict[str, object]:
    """What `read_tile_file` reads, as plain values."""
    return {
        "typed_moe_tiles": _FORMAT,
        "card": card,
        "tables": {
            operand: [
                {
                    "rows_per_expert": None if most >= _LAST else most,
                    "block_m": tile.block_m,
                    "second_block_m": tile.second_block_m,
                    "first": attrs.asdict(tile.first),
                    "second": attrs.asdict(tile.second),
                }
                for most, tile in table
            ]
            for operand, table in tables.items()
        },
    }
