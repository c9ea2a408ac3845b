"""What a DeepGEMM installation is to the kernel: two grouped products, and what they ask of their rows.

`typed_moe.kernels._deep_gemm` is the installed one. Tests put one of PyTorch's operators in its place.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from typed_moe.routing import Refused


class DeepGemmLibrary(Protocol):
    """**Protocol:** one DeepGEMM release.

    Shapes: P rows in blocks of `alignment` that belong to one group each, L groups. `group` (P,) int32
    names each row's; -1 is a row that is not computed. Rows of a group that is -1 hold anything.
    """

    @property
    def name(self) -> str:
        """Distribution and version, such as `sgl-deep-gemm 0.1.5`."""
        ...

    def refuses(self, device: torch.device) -> Refused | None:
        """Why its products do not run on a device; None if they do."""
        ...

    def alignment(self) -> int:
        """Rows of a block."""
        ...

    def fp8(
        self,
        rows: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        out: Tensor,
        group: Tensor,
    ) -> None:
        """out[p] = rows[p] @ weights[group[p]]^T.

        Args:
            rows: (P, K) float8_e4m3fn, and (P, K / 128) float32 scales whose rows stand side by side.
            weights: (L, N, K) float8_e4m3fn, and (L, N / 128, K / 128) float32, both as they lie.
            out: (P, N) bfloat16, which is written.
            group: as above.
        """
        ...

    def bf16(self, rows: Tensor, weights: Tensor, out: Tensor, group: Tensor) -> None:
        """The same of (P, K) and (L, N, K) bfloat16."""
        ...
