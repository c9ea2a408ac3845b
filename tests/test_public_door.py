"""The public door: `__all__` tells the truth, and what stands behind it is documented and typed."""

from __future__ import annotations

import inspect
import types
import typing

import attrs
import pytest

import typed_moe
import typed_moe.config
import typed_moe.routing
from typed_moe import RoutingStrategy

DOORS = (typed_moe, typed_moe.config, typed_moe.routing)

CLASSES = {
    name: value for name in typed_moe.__all__ if inspect.isclass(value := getattr(typed_moe, name))
}
FUNCTIONS = {
    name: value
    for name in typed_moe.__all__
    if inspect.isfunction(value := getattr(typed_moe, name))
}
STRATEGIES = {
    name: cls
    for name, cls in CLASSES.items()
    if cls is not RoutingStrategy and hasattr(cls, "select_experts")
}
DUTIES = sorted(name for name in vars(RoutingStrategy) if not name.startswith("_"))


def door_order(name: str) -> tuple[int, str]:
    """Constants, then classes, then functions, each by name: the linter's order of `__all__`."""
    rank = 0 if name.isupper() else 1 if name[0].isupper() else 2
    return rank, name


def own_members(cls: type) -> dict[str, object]:
    """What a class itself defines for its users: public functions and properties."""
    return {
        name: value
        for name, value in vars(cls).items()
        if not name.startswith("_")
        and (inspect.isroutine(value) or isinstance(value, property | classmethod | staticmethod))
    }


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_all_is_sorted(door: types.ModuleType) -> None:
    assert sorted(door.__all__, key=door_order) == list(door.__all__)


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_all_is_true(door: types.ModuleType) -> None:
    """Every listed name is there, and every public name that is there is listed."""
    there = {
        name
        for name, value in vars(door).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name != "annotations"
    }

    assert there == {name for name in door.__all__ if not name.startswith("_")}


@pytest.mark.parametrize("name", sorted(CLASSES | FUNCTIONS))
def test_public_name_has_a_docstring(name: str) -> None:
    value = getattr(typed_moe, name)

    assert inspect.getdoc(value)
    assert not str(value.__doc__).startswith(f"{name}("), "a generated signature is no docstring"


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_public_members_have_docstrings(name: str) -> None:
    missing = [member for member, value in own_members(CLASSES[name]).items() if not value.__doc__]

    assert missing == []


@pytest.mark.parametrize("name", sorted(CLASSES))
def test_annotations_of_a_public_class_resolve(name: str) -> None:
    """`typing.get_type_hints` works, so documentation and serialisation tools do too."""
    cls = CLASSES[name]
    typing.get_type_hints(cls)
    typing.get_type_hints(cls.__init__)
    for value in own_members(cls).values():
        function = value.fget if isinstance(value, property) else value
        hints = typing.get_type_hints(getattr(function, "__func__", function))

        assert "return" in hints


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_annotations_of_a_public_function_resolve(name: str) -> None:
    assert "return" in typing.get_type_hints(FUNCTIONS[name])


def test_the_ten_methods_of_flashinfer_are_public() -> None:
    assert {
        "Default",
        "Renormalize",
        "DeepSeekV3",
        "Llama4",
        "RenormalizeNaive",
        "TopK",
        "SigmoidRenorm",
        "MiniMax2",
        "Sigmoid",
        "TopKSigmoid",
    } <= set(STRATEGIES)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_concrete_strategy_is_final(name: str) -> None:
    """Marked for the checkers, and built on nothing but `object`: no label can be inherited."""
    cls = STRATEGIES[name]

    assert getattr(cls, "__final__", False) is True
    assert cls.__bases__ == (object,)


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_concrete_strategy_writes_out_every_duty(name: str) -> None:
    assert [duty for duty in DUTIES if duty not in vars(STRATEGIES[name])] == []


@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_concrete_strategy_is_a_keyword_only_value(name: str) -> None:
    cls = STRATEGIES[name]
    assert attrs.has(cls)

    assert all(field.kw_only for field in attrs.fields(cls))
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        # An attribute that exists on no strategy: refused because the class is frozen.
        cls.__setattr__(object.__new__(cls), "anything", 1)
