from dataclasses import dataclass

from torch import Tensor

from triton.experimental.gluon.language import NVMMASharedLayout

@dataclass
class TensorDescriptor:
    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    layout: NVMMASharedLayout
    padding: str = "zero"
    @staticmethod
    def from_tensor(
        tensor: Tensor, block_shape: list[int], layout: NVMMASharedLayout, padding: str = "zero"
    ) -> TensorDescriptor: ...
