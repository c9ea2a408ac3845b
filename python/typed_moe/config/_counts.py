"""Whole numbers that a caller gives, and the refusal of others."""

from __future__ import annotations


def check_count(name: str, value: int, *, least: int) -> None:
    """Refuse what is no int, such as a config's 2.0 or true, and what is too small.

    Raises:
        TypeError: value is no int; a bool is none.
        ValueError: value is below least.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; allowed: an int of {least} or more")
    if value < least:
        raise ValueError(f"{name} is {value}; allowed: {least} or more")
