"""DeepGEMM's grouped products as its own host code and scheduler describe them, in PyTorch's operators.

What is asserted here is what DeepGEMM asserts (csrc/apis/gemm.hpp, csrc/utils/layout.hpp,
csrc/apis/layout.hpp for compute capability 9.0), and what is computed is what its scheduler
(deep_gemm/scheduler/gemm.cuh) walks over: the weights of a block are those of its first row, and half a
block whose first row belongs to nobody is left as it is, which is NaN here.
"""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe import Bf16, Fp8BlockScale
from typed_moe.quantization import stored_error_bound
from typed_moe.routing import Refused

ROUNDING = 2.0**-16 / 3
"""Mean square of one to bfloat16, at most."""
_HALF = 64
"""Rows of a warp group's product."""


def product_bound(quant: Bf16 | Fp8BlockScale) -> float:
    """On a layer over such products: a kernel's, and two roundings more, gate and up before the activation."""
    return math.sqrt((1 + stored_error_bound(quant) ** 2) * (1 + ROUNDING) ** 2 - 1)


@final
@attrs.frozen(kw_only=True)
class ContractProducts:
    """A `DeepGemmLibrary` on any device.

    Attributes:
        refused: what it says to every device.
        block: rows of a block.
    """

    refused: str | None = None
    block: int = 128
    name: str = "contract 1"

    def refuses(self, device: torch.device) -> Refused | None:
        """As told."""
        del device
        return None if self.refused is None else Refused(self.refused)

    def alignment(self) -> int:
        """As told."""
        return self.block

    def fp8(
        self,
        rows: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        out: Tensor,
        group: Tensor,
    ) -> None:
        """Sums in float64, of what the bits are worth."""
        (a, a_scale), (b, b_scale) = rows, weights
        assert a.dtype is b.dtype is torch.float8_e4m3fn
        assert a_scale.dtype is b_scale.dtype is torch.float32
        places, depth = a.shape
        groups, width, _ = b.shape
        assert a_scale.shape == (places, depth // 128)
        assert b_scale.shape == (groups, -(-width // 128), depth // 128)
        # Places side by side, a column starting on 16 bytes: otherwise DeepGEMM copies them first.
        assert a_scale.stride() == (1, places)
        assert places * 4 % 16 == 0
        assert b_scale.is_contiguous()
        left = a.double() * a_scale.double().repeat_interleave(128, 1)
        spread = b_scale.double().repeat_interleave(128, 1)[:, :width].repeat_interleave(128, 2)
        self._multiply(left, b.double() * spread, out, group, (a, b))

    def bf16(self, rows: Tensor, weights: Tensor, out: Tensor, group: Tensor) -> None:
        """Sums in float64."""
        assert rows.dtype is weights.dtype is torch.bfloat16
        self._multiply(rows.double(), weights.double(), out, group, (rows, weights))

    def _multiply(
        self, left: Tensor, right: Tensor, out: Tensor, group: Tensor, given: tuple[Tensor, Tensor]
    ) -> None:
        for one in (*given, out):
            assert one.stride(-1) == 1
            assert one.data_ptr() % 16 == 0
        assert out.dtype is torch.bfloat16
        assert group.dtype is torch.int32
        assert group.is_contiguous()
        assert group.shape == (left.shape[0],)
        assert out.shape == (left.shape[0], right.shape[1])
        out.fill_(float("nan"))
        for first in range(0, left.shape[0], self.block):
            expert = int(group[first])
            for half in range(first, first + self.block, min(_HALF, self.block)):
                if int(group[half]) < 0:
                    continue
                assert 0 <= expert < right.shape[0]
                rows = slice(half, half + min(_HALF, self.block))
                out[rows] = (left[rows] @ right[expert].T).bfloat16()
