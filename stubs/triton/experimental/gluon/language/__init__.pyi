from collections.abc import Sequence
from typing import TypeAlias

from triton import JITFunction
from triton.language import PropagateNan
from triton.language import constexpr as constexpr
from triton.language import dtype as dtype
from triton.language import static_range as static_range
from triton.language import tensor as tensor

_Value: TypeAlias = tensor | constexpr | int | float
_Shape: TypeAlias = Sequence[int | constexpr]

class _DistributedLayout: ...

class BlockedLayout(_DistributedLayout):
    def __init__(
        self,
        size_per_thread: Sequence[int | constexpr],
        threads_per_warp: Sequence[int | constexpr],
        warps_per_cta: Sequence[int],
        order: Sequence[int],
        cga_layout: Sequence[Sequence[int]] = ...,
    ) -> None: ...

class SliceLayout(_DistributedLayout):
    def __init__(self, dim: int, parent: _DistributedLayout | constexpr) -> None: ...

class NVMMADistributedLayout(_DistributedLayout):
    def __init__(
        self,
        version: Sequence[int],
        warps_per_cta: Sequence[int],
        instr_shape: Sequence[int],
        cga_layout: Sequence[Sequence[int]] = ...,
    ) -> None: ...

class NVMMASharedLayout:
    def __init__(
        self,
        swizzle_byte_width: int,
        element_bitwidth: int,
        rank: int = 2,
        transposed: bool = False,
        fp4_padded: bool = False,
        cga_layout: Sequence[Sequence[int]] = ...,
    ) -> None: ...

class SwizzledSharedLayout:
    def __init__(
        self,
        vec: int,
        per_phase: int,
        max_phase: int,
        order: Sequence[int],
        cga_layout: Sequence[Sequence[int]] = ...,
    ) -> None: ...

class shared_memory_descriptor:
    def load(self, layout: _DistributedLayout | constexpr) -> tensor: ...
    def index(self, index: tensor | int) -> shared_memory_descriptor: ...
    def slice(
        self, start: int | constexpr, length: int | constexpr, dim: int = 0
    ) -> shared_memory_descriptor: ...
    def permute(self, order: Sequence[int]) -> shared_memory_descriptor: ...

int32: dtype
int64: dtype
float32: dtype
bfloat16: dtype
float8e4nv: dtype

def program_id(axis: int) -> tensor: ...
def num_programs(axis: int) -> tensor: ...
def arange(
    start: int, end: int | constexpr, layout: _DistributedLayout | constexpr | None = None
) -> tensor: ...
def full(shape: _Shape, value: float, dtype: dtype, layout: object = None) -> tensor: ...
def zeros(
    shape: _Shape, dtype: dtype, layout: _DistributedLayout | constexpr | None = None
) -> tensor: ...
def load(
    pointer: tensor,
    mask: tensor | None = None,
    other: tensor | float | None = None,
    boundary_check: tuple[int, ...] = (),
    padding_option: str = "",
    cache_modifier: str = "",
    eviction_policy: str = "",
    volatile: bool = False,
) -> tensor: ...
def store(
    pointer: tensor,
    value: tensor,
    mask: tensor | None = None,
    boundary_check: tuple[int, ...] = (),
    cache_modifier: str = "",
    eviction_policy: str = "",
) -> None: ...
def where(condition: tensor, x: _Value, y: _Value) -> tensor: ...
def maximum(x: _Value, y: _Value, propagate_nan: PropagateNan = ...) -> tensor: ...
def minimum(x: _Value, y: _Value, propagate_nan: PropagateNan = ...) -> tensor: ...
def abs(x: tensor) -> tensor: ...
def exp2(x: tensor) -> tensor: ...
def reduce(
    input: tensor,
    axis: int,
    combine_fn: JITFunction[[tensor, tensor], tensor],
    keep_dims: bool = False,
) -> tensor: ...
def to_tensor(x: _Value) -> tensor: ...
def convert_layout(
    value: tensor, layout: _DistributedLayout | constexpr, assert_trivial: bool = False
) -> tensor: ...
def inline_asm_elementwise(
    asm: str,
    constraints: str,
    args: Sequence[tensor],
    dtype: dtype,
    is_pure: bool,
    pack: int,
) -> tensor: ...
def allocate_shared_memory(
    element_ty: dtype, shape: _Shape, layout: object, value: tensor | None = None
) -> shared_memory_descriptor: ...
def warp_specialize(
    functions_and_args: Sequence[tuple[object, tuple[object, ...]]],
    worker_num_warps: Sequence[int],
    worker_num_regs: Sequence[int],
) -> None: ...
