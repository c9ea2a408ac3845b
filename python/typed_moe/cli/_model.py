"""MODEL on the command line: a shipped name, a config.json, or a folder that has one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import final

import attrs

from typed_moe.cli._errors import UserError, user_errors
from typed_moe.config import FORMATS, Format
from typed_moe.models import MoeSpec, load_config, moe_spec, shipped_configs

_MULTIPLE = 128


@final
@attrs.frozen(kw_only=True)
class Model:
    """A config that was read.

    Attributes:
        name: as the user gave it.
        source: where its values are from.
        config: its fields.
    """

    name: str
    source: str
    config: Mapping[str, object] = attrs.field(repr=False)


def read_model(name: str) -> Model:
    """Read a config.

    Raises:
        UserError: no such shipped name or file, no config.json in the folder, or no JSON.
    """
    shipped = name in shipped_configs()
    if not shipped:
        _check_path(name)
    try:
        config = load_config(name)
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"the config {name} is no JSON ({error}); allowed: a config.json as the model was "
            "released with. Download it again"
        ) from error
    except (ValueError, OSError) as error:
        raise UserError(f"the config {name} cannot be read: {error}") from error
    return Model(name=name, source=_source(config) if shipped else name, config=config)


def _check_path(name: str) -> None:
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise UserError(
            f"the folder {name} has no config.json; allowed: the folder of a Hugging Face model, "
            "a config.json, or the name of a shipped config (typed-moe configs lists them)"
        )
    if path.exists():
        return
    near = difflib.get_close_matches(name.lower(), shipped_configs(), n=3, cutoff=0.5)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UserError(
        f"{name} is no shipped config and no file or folder; {hint}allowed: a config.json, a "
        "folder that has one, or a name that `typed-moe configs` lists"
    )


def _source(config: Mapping[str, object]) -> str:
    source = config.get("_source")
    return str(source.get("repository", "")) if isinstance(source, Mapping) else ""


def read_spec(model: Model, layer: int | None) -> MoeSpec:
    """One MoE layer of a model; None: the first whose routing rule a strategy honours.

    Raises:
        UserError: not an MoE, a field that nobody honours, or no such MoE layer.
    """
    with user_errors(f"{model.name}: "):
        return moe_spec(model.config, layer)


def read_format(name: str) -> Format:
    """A format by its name.

    Raises:
        UserError: there is none of that name.
    """
    found = next((fmt for known, fmt in FORMATS.items() if known == name), None)
    if found is None:
        near = difflib.get_close_matches(name.lower(), FORMATS, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--quant is {name!r}; {hint}allowed: {', '.join(FORMATS)}")
    return found


@final
@attrs.frozen(kw_only=True)
class Widths:
    """The widths that a run uses, the model's own unless they were scaled.

    Attributes:
        hidden_size: of the experts' input and output, H.
        router_hidden_size: of the router's input.
        intermediate_size: of one expert, I.
    """

    hidden_size: int
    router_hidden_size: int
    intermediate_size: int


def widths(spec: MoeSpec, layer_scale: float) -> Widths:
    """The model's widths times `layer_scale`, in whole multiples of 128 where that is not 1."""
    return Widths(
        hidden_size=_scaled(spec.hidden_size, layer_scale),
        router_hidden_size=_scaled(spec.router_hidden_size, layer_scale),
        intermediate_size=_scaled(spec.intermediate_size, layer_scale),
    )


def _scaled(width: int, layer_scale: float) -> int:
    if layer_scale == 1.0:
        return width
    return max(1, round(width * layer_scale / _MULTIPLE)) * _MULTIPLE
