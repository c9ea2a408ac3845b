"""Reading one config: typed readers that remember where each value came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar, final

import attrs

from typed_moe.errors import UnsupportedRouting

OWN_STRATEGY = "write the rule as a RoutingStrategy of your own and pass routing= yourself"
"""What a user can always do, as the end of a sentence."""

_NO_GROUPS: tuple[object, ...] = (0, 1)
_NO_SCALE: tuple[object, ...] = (1.0,)

ROUTING_FIELDS: Mapping[str, tuple[object, ...]] = {
    "expert_selection_fn": (),
    "moe_apply_router_weight_on_input": (False,),
    "moe_renormalize": (),
    "moe_routed_scaling_factor": _NO_SCALE,
    "moe_router_activation": (),
    "moe_router_logit_softcapping": (0.0,),
    "moe_router_scaling_factor": _NO_SCALE,
    "n_group": _NO_GROUPS,
    "norm_expert_weight": (),
    "norm_topk_prob": (),
    "num_expert_group": _NO_GROUPS,
    "num_hash_layers": (0,),
    "route_scale": _NO_SCALE,
    "routed_scaling_factor": _NO_SCALE,
    "router_scaling_factor": _NO_SCALE,
    "score_func": (),
    "scoring_func": (),
    "topk_group": _NO_GROUPS,
    "topk_method": (),
    "use_expert_bias": (False,),
    "use_moe_router_bias": (),
    "use_routing_bias": (),
    "zero_expert_num": (0,),
}
"""Fields of any family that change routing -> the values with which they change nothing.

A family that does not read one of them cannot honour it: `Fields.refuse_unread`.
"""

_Read = TypeVar("_Read")


class HasToDict(Protocol):
    """A config object, such as a transformers `PreTrainedConfig`."""

    def to_dict(self) -> Mapping[str, object]:
        """Every setting by name; nested configs as mappings."""
        ...


ConfigLike = Mapping[str, object] | HasToDict
"""A config.json as a mapping, or a config object with `to_dict()`."""


def plain(config: ConfigLike) -> Mapping[str, object]:
    """The settings of a config as a mapping.

    Raises:
        TypeError: `config` is neither a mapping nor an object with `to_dict()`.
    """
    if isinstance(config, Mapping):
        return config
    if not callable(getattr(config, "to_dict", None)):
        raise TypeError(
            f"config is a {type(config).__name__}; allowed: a mapping (a parsed config.json) or an "
            "object with to_dict(), such as a transformers config; for a file, use load_config"
        )
    return config.to_dict()


def _as_int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _as_number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value)


def _as_flag(value: object) -> bool | None:
    return value if isinstance(value, bool) else None


def _as_text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _as_list(value: object) -> tuple[object, ...] | None:
    return tuple(value) if isinstance(value, list | tuple) else None


@final
@attrs.define(kw_only=True)
class Fields:
    """One model's settings, read by name; what was read and decided is kept in `sources`.

    A reader takes the thing that the value decides (the key in `sources`) and the names that
    the field has had. Without `default` a missing field is an error that names it; with one,
    `owner` says whose documented default it is. JSON's null counts as missing.
    """

    values: Mapping[str, object]
    model_type: str
    sources: dict[str, str] = attrs.field(factory=dict)
    _seen: set[str] = attrs.field(factory=set)

    def integer(
        self, thing: str, *names: str, default: int | None = None, owner: str = "", least: int = 1
    ) -> int:
        """A whole number of `least` or more."""
        value = self._read(thing, names, _as_int, "a whole number", default, owner)
        if value < least:
            raise ValueError(
                f"{names[0]} is {value} in a {self.model_type} config; allowed: {least} or more"
            )
        return value

    def number(
        self, thing: str, *names: str, default: float | None = None, owner: str = ""
    ) -> float:
        """A number."""
        return self._read(thing, names, _as_number, "a number", default, owner)

    def flag(self, thing: str, *names: str, default: bool | None = None, owner: str = "") -> bool:
        """True or False."""
        return self._read(thing, names, _as_flag, "true or false", default, owner)

    def text(self, thing: str, *names: str, default: str | None = None, owner: str = "") -> str:
        """A string."""
        return self._read(thing, names, _as_text, "a string", default, owner)

    def choice(
        self,
        thing: str,
        name: str,
        allowed: Sequence[str],
        *,
        default: str | None = None,
        owner: str = "",
    ) -> str:
        """A string out of `allowed`, for a field that decides the routing rule.

        Raises:
            UnsupportedRouting: it is another string.
        """
        value = self.text(thing, name, default=default, owner=owner)
        if value not in allowed:
            raise UnsupportedRouting(self._refusal(name, value, allowed, ""))
        return value

    def expect(self, name: str, *allowed: object, why: str) -> None:
        """Refuse a field that is there with a value other than `allowed`.

        For a field that the model's code does not read: it may only say what the code does.

        Raises:
            UnsupportedRouting: with the field, its value and `why`.
        """
        self._seen.add(name)
        value = self.values.get(name)
        if value is not None and not any(_same(value, one) for one in allowed):
            raise UnsupportedRouting(self._refusal(name, value, allowed, why))

    def must_be(self, name: str, *allowed: object, why: str) -> None:
        """`expect` for a field that is not about routing.

        Raises:
            ValueError: with the field, its value and `why`.
        """
        self._seen.add(name)
        value = self.values.get(name)
        if value is None or any(_same(value, one) for one in allowed):
            return
        raise ValueError(
            f"{name} is {value!r} in a {self.model_type} config; allowed: "
            + " or ".join(repr(one) for one in allowed)
            + f", or no such field ({why})"
        )

    def optional_integer(self, name: str) -> int | None:
        """A whole number, or None where the field is missing or null."""
        self._seen.add(name)
        value = self.values.get(name)
        if value is None:
            return None
        return self._typed(name, value, _as_int, "a whole number, or null")

    def optional_list(self, name: str) -> tuple[object, ...] | None:
        """The items of a list, or None where the field is missing or null."""
        self._seen.add(name)
        value = self.values.get(name)
        if value is None:
            return None
        return self._typed(name, value, _as_list, "a list, or null")

    def optional_text(self, name: str) -> str | None:
        """A string, or None where the field is missing or null."""
        self._seen.add(name)
        value = self.values.get(name)
        if value is None:
            return None
        return self._typed(name, value, _as_text, "a string, or null")

    def note(self, thing: str, text: str) -> None:
        """Say where `thing` came from, for a value that no single field gave."""
        self.sources[thing] = text

    def refuse_unread(self) -> None:
        """Refuse a routing field that this family does not read, unless it changes nothing.

        Raises:
            UnsupportedRouting: with the field and its value.
        """
        for name, harmless in ROUTING_FIELDS.items():
            value = self.values.get(name)
            if name in self._seen or value is None:
                continue
            if not any(_same(value, one) for one in harmless):
                why = f"no {self.model_type} router reads that field, so it contradicts the model"
                raise UnsupportedRouting(self._refusal(name, value, harmless, why))

    def _refusal(self, name: str, value: object, allowed: Sequence[object], why: str) -> str:
        values = " or ".join(repr(one) for one in allowed)
        absent = f"{values}, or no such field" if values else "no such field"
        reason = f" ({why})" if why else ""
        return (
            f"{name} is {value!r} in a {self.model_type} config; allowed: {absent}{reason}. "
            f"Correct the config if it is wrong; if the model does mean it, {OWN_STRATEGY}"
        )

    def _find(self, names: Sequence[str]) -> tuple[str, object] | None:
        self._seen.update(names)
        found = [(n, self.values[n]) for n in names if self.values.get(n) is not None]
        for name, value in found[1:]:
            if not _same(value, found[0][1]):
                raise ValueError(
                    f"{found[0][0]} is {found[0][1]!r} and {name} is {value!r} in a "
                    f"{self.model_type} config; they are two names of one field and must agree: "
                    "keep one"
                )
        return found[0] if found else None

    def _typed(
        self, name: str, value: object, convert: Callable[[object], _Read | None], kind: str
    ) -> _Read:
        result = convert(value)
        if result is None:
            raise ValueError(f"{name} is {value!r} in a {self.model_type} config; allowed: {kind}")
        return result

    def _read(
        self,
        thing: str,
        names: Sequence[str],
        convert: Callable[[object], _Read | None],
        kind: str,
        default: _Read | None,
        owner: str,
    ) -> _Read:
        found = self._find(names)
        if found is not None:
            name, value = found
            self.sources[thing] = f"{name} = {value}"
            return self._typed(name, value, convert, kind)
        if default is None:
            raise ValueError(self._missing(thing, names))
        self.sources[thing] = f"{names[0]} absent: {owner} default {default}"
        return default

    def _missing(self, thing: str, names: Sequence[str]) -> str:
        also = f" (also read as {', '.join(names[1:])})" if names[1:] else ""
        return (
            f"{names[0]}{also} is missing in a {self.model_type} config, and {thing} has no safe "
            f"default: add the field, as the released config.json has it"
        )


def _same(one: object, other: object) -> bool:
    """Equal, where True is not 1."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other
