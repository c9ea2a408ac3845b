from typing import overload

from triton.experimental.gluon.language import shared_memory_descriptor, tensor
from triton.experimental.gluon.language.nvidia.ampere import async_copy as async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as mbarrier
from triton.experimental.gluon.language.nvidia.hopper import tma as tma

def fence_async_shared(cluster: bool = False) -> None: ...
def warpgroup_mma(
    a: shared_memory_descriptor,
    b: shared_memory_descriptor,
    acc: tensor,
    *,
    use_acc: bool = True,
    precision: str | None = None,
    max_num_imprecise_acc: int | None = None,
    is_async: bool = False,
) -> tensor: ...
@overload
def warpgroup_mma_wait(num_outstanding: int, deps: tuple[tensor]) -> tensor: ...
@overload
def warpgroup_mma_wait(
    num_outstanding: int = 0, deps: list[tensor] | None = None
) -> tuple[tensor, ...]: ...
