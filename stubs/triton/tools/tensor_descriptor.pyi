from dataclasses import dataclass

from torch import Tensor

@dataclass
class TensorDescriptor:
    base: Tensor
    shape: list[int]
    strides: list[int]
    block_shape: list[int]
    padding: str = "zero"
    @staticmethod
    def from_tensor(
        tensor: Tensor, block_shape: list[int], padding: str = "zero"
    ) -> TensorDescriptor: ...
