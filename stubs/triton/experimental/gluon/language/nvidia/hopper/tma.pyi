from collections.abc import Sequence

from triton.experimental.gluon.language import dtype, shared_memory_descriptor, tensor

class tensor_descriptor:
    @property
    def dtype(self) -> dtype: ...
    @property
    def layout(self) -> object: ...

def async_copy_global_to_shared(
    tensor_desc: tensor_descriptor,
    coord: Sequence[tensor | int],
    barrier: shared_memory_descriptor,
    result: shared_memory_descriptor,
    pred: bool | tensor = True,
) -> None: ...
