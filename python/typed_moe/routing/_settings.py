"""Validators for the settings that several strategies have."""

from __future__ import annotations

import math

import attrs
import torch


def factor(_: object, attribute: attrs.Attribute[float], value: float) -> None:
    """attrs validator: a positive finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{attribute.name} is {value!r}; allowed: a number (1.0 for no scaling)")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{attribute.name} is {value}; allowed: a positive finite number")


def check_logits_dtype(value: torch.dtype | None) -> None:
    """Refuse a `router_logits_dtype` that no gate emits.

    Raises:
        ValueError: not float32, bfloat16, float16 or None.
    """
    if value not in (None, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"router_logits_dtype is {value!r}; allowed: torch.float32, torch.bfloat16, "
            "torch.float16, or None for any"
        )


def bias_dtype(_: object, attribute: attrs.Attribute[torch.dtype], value: torch.dtype) -> None:
    """attrs validator: float32 (never rounded) or bfloat16."""
    if value not in (torch.float32, torch.bfloat16):
        raise ValueError(
            f"{attribute.name} is {value!r}; allowed: torch.float32 (never rounded) or "
            "torch.bfloat16"
        )
