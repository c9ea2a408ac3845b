from collections.abc import Sequence

from triton.experimental.gluon.language import constexpr, shared_memory_descriptor, tensor

class MBarrierLayout:
    def __init__(self, cga_layout: Sequence[Sequence[int]] | None = None) -> None: ...

def init(mbarrier: shared_memory_descriptor, count: int | constexpr) -> None: ...
def wait(
    mbarrier: shared_memory_descriptor,
    phase: tensor,
    pred: bool | tensor = True,
    deps: Sequence[shared_memory_descriptor] = (),
) -> None: ...
def expect(
    mbarrier: shared_memory_descriptor, bytes: int | constexpr, pred: bool | tensor = True
) -> None: ...
def arrive(
    mbarrier: shared_memory_descriptor, *, count: int = 1, pred: bool | tensor = True
) -> None: ...
