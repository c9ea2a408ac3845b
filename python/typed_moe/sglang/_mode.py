"""`TYPED_MOE_SGLANG`: what the plugin does in an SGLang process."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

VARIABLE = "TYPED_MOE_SGLANG"


class Mode(Enum):
    """How much of SGLang's fused MoE the plugin takes over."""

    OBSERVE = "observe"
    """SGLang's calls are made, unchanged; ours are built beside the first of each layer."""
    ENFORCE = "enforce"
    """The calls to FlashInfer's trtllm kernels are ours."""
    OFF = "off"
    """Nothing is hooked."""


def read_mode(environ: Mapping[str, str]) -> Mode:
    """The mode that the environment asks for; observe where it asks for none.

    Raises:
        ValueError: the variable's value is no mode.
    """
    asked = environ.get(VARIABLE, Mode.OBSERVE.value)
    try:
        return Mode(asked)
    except ValueError as error:
        allowed = ", ".join(mode.value for mode in Mode)
        raise ValueError(f"{VARIABLE} is {asked!r}; allowed: {allowed}") from error
