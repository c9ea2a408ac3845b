from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec, Protocol, TypeVar, overload

from triton import knobs as knobs
from triton import language as language

__version__: str

_P = ParamSpec("_P")
_R = TypeVar("_R")

class _Launch(Protocol):
    def __call__(self, *args: object, **kwargs: object) -> object: ...

class JITFunction(Generic[_P, _R]):
    def __getitem__(self, grid: tuple[int, ...]) -> _Launch: ...
    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R: ...

@overload
def jit(fn: Callable[_P, _R]) -> JITFunction[_P, _R]: ...
@overload
def jit(
    *,
    version: str | None = None,
    do_not_specialize: Sequence[str] | None = None,
    do_not_specialize_on_alignment: Sequence[str] | None = None,
    debug: bool | None = None,
    noinline: bool | None = None,
) -> Callable[[Callable[_P, _R]], JITFunction[_P, _R]]: ...
def cdiv(x: int, y: int) -> int: ...
