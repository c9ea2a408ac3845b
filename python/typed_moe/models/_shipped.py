"""Released configs that come with the package, cut to the fields that describe the MoE layer."""

from __future__ import annotations

import json
from pathlib import Path

_FOLDER = Path(__file__).parent / "configs"


def shipped_configs() -> tuple[str, ...]:
    """The names of the configs that come with the package, sorted."""
    return tuple(sorted(path.stem for path in _FOLDER.glob("*.json")))


def load_config(name_or_path: str | Path) -> dict[str, object]:
    """A config by its shipped name, or from a file.

    Args:
        name_or_path: a name out of `shipped_configs()`; or a path of a config.json, or of a
            folder that has one.

    Returns:
        The config's fields. A shipped config also has `_source`: where its values are from.

    Raises:
        ValueError: no such shipped name, or the file is not a JSON object.
        FileNotFoundError: a path that is not there.
    """
    path = _path(name_or_path)
    data: object = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict):
        raise ValueError(f"{path} holds a JSON {type(data).__name__}; allowed: an object")
    return {str(name): value for name, value in data.items()}


def _path(name_or_path: str | Path) -> Path:
    if isinstance(name_or_path, str) and name_or_path in shipped_configs():
        return _FOLDER / f"{name_or_path}.json"
    path = Path(name_or_path)
    if path.is_dir():
        return path / "config.json"
    if isinstance(name_or_path, str) and path.suffix != ".json" and not path.exists():
        raise ValueError(
            f"{name_or_path!r} is no shipped config and no file; allowed: a path, or one of "
            + ", ".join(shipped_configs())
        )
    return path
