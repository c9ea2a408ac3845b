"""What reading source cannot know, assumed one way after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar, final

import attrs

MOST_PATHS = 4096


@final
@attrs.frozen
class Method:
    """A member of SGLang's RoutingMethodType, by name."""

    name: str


@final
@attrs.frozen
class Thing:
    """An object that is there; nothing else of it is known."""

    text: str


NO_DEFAULT = Thing("no default")


@final
@attrs.frozen
class Unknown:
    """The value of an expression that is not known before it is assumed.

    Attributes:
        text: the expression, in one spelling.
        deployment: it says how the model is served, and not what the model is.
        default: the value where the config leaves the field out.
    """

    text: str
    deployment: bool = False
    default: object = NO_DEFAULT


OTHER = Thing("another value")


class Infeasible(Exception):
    """The constructor raises under these assumptions."""


class TooManyPaths(ValueError):
    """More combinations than anyone would read."""


@final
class Assumptions:
    """The assumptions of one path: those of a prefix, then the first of each domain.

    Args:
        prefix: which value of each domain, in the order in which they are asked for.
    """

    def __init__(self, prefix: tuple[int, ...] = ()) -> None:
        self._prefix = prefix
        self._made: dict[str, tuple[tuple[object, ...], int]] = {}
        self.by_default = True
        """Every field that has a default has it."""

    def value(self, unknown: Unknown, domain: tuple[object, ...]) -> object:
        """The unknown's value on this path; `domain` counts when it is asked for first."""
        if unknown.text not in self._made:
            at = len(self._made)
            index = self._prefix[at] if at < len(self._prefix) else 0
            if unknown.default in domain:
                domain = (unknown.default, *(one for one in domain if one != unknown.default))
                self.by_default = self.by_default and index == 0
            self._made[unknown.text] = (domain, index)
        values, index = self._made[unknown.text]
        return values[index]

    def following(self) -> tuple[int, ...] | None:
        """The prefix of the next path; None after the last."""
        chosen = [(len(domain), index) for domain, index in self._made.values()]
        while chosen:
            size, index = chosen.pop()
            if index + 1 < size:
                return (*(one for _, one in chosen), index + 1)
        return None

    def listed(self) -> tuple[tuple[str, object], ...]:
        """Each expression that was asked for, and its value."""
        return tuple((text, domain[index]) for text, (domain, index) in self._made.items())


T = TypeVar("T")


def every_path(run: Callable[[Assumptions], T]) -> Iterator[tuple[Assumptions, T]]:
    """Run once for each combination of assumptions that the run asks for; skip infeasible ones.

    Raises:
        TooManyPaths: there are more than 4096.
    """
    prefix: tuple[int, ...] | None = ()
    for _ in range(MOST_PATHS):
        if prefix is None:
            return
        assumptions = Assumptions(prefix)
        try:
            result = run(assumptions)
        except Infeasible:
            prefix = assumptions.following()
            continue
        yield assumptions, result
        prefix = assumptions.following()
    if prefix is not None:
        raise TooManyPaths(f"more than {MOST_PATHS} ways through one constructor")
