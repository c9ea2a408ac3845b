"""transformers config objects, without a static import: its sources are not ours to type-check."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from types import ModuleType

from typed_moe.models import HasToDict


def quiet_import(name: str) -> ModuleType:
    """A module, whatever it and what it imports warn of."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def hf_config(model_type: str, **settings: object) -> HasToDict:
    """The installed transformers' config class for `model_type`, with `settings` over its defaults."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = quiet_import("transformers").AutoConfig
        config: HasToDict = auto.for_model(model_type, **settings)
    return config


def from_json(raw: Mapping[str, object]) -> HasToDict:
    """What transformers makes of a checkpoint's config.json."""
    settings = {name: value for name, value in raw.items() if name not in ("model_type", "_source")}
    return hf_config(str(raw["model_type"]), **settings)
