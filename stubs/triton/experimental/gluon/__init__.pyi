from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar, overload

from triton import JITFunction
from triton.language import constexpr

_P = ParamSpec("_P")
_R = TypeVar("_R")

@overload
def jit(fn: Callable[_P, _R]) -> JITFunction[_P, _R]: ...
@overload
def jit(
    *,
    version: str | None = None,
    do_not_specialize: Sequence[int | str] | None = None,
    do_not_specialize_on_alignment: Sequence[int | str] | None = None,
    debug: bool | None = None,
    noinline: bool | None = None,
) -> Callable[[Callable[_P, _R]], JITFunction[_P, _R]]: ...
def constexpr_function(fn: Callable[[int], object]) -> Callable[[int | constexpr], constexpr]: ...
