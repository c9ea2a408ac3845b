"""What a kernel gives before the weighted sum over a token's experts.

Shapes: T tokens, k slots per token (fused shared experts among them), P rows, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import attrs
import torch
from torch import Tensor
from typing_extensions import override


@final
@attrs.frozen(kw_only=True)
class UnfinalizedRules:
    """The dtypes of a kernel's `Unfinalized`, known before the first call.

    Attributes:
        rows_dtype: of `gemm2_output`.
        weights_dtype: of `expert_weights`.
    """

    rows_dtype: torch.dtype
    weights_dtype: torch.dtype

    @override
    def __str__(self) -> str:
        return f"{self.rows_dtype} rows with {self.weights_dtype} weights"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Unfinalized:
    """Every expert's own output, still to be weighted and added up.

    y[t] = sum over slots s of w[t, s] * gemm2_output[i[t, s]], without the slots whose i is -1, with
    w = expert_weights and i = expanded_idx_to_permuted_idx. What adds up may do more in the same
    pass: an all-reduce over the ranks, a residual, a norm.

    Attributes:
        gemm2_output: (P, H), contiguous; P is T * k or more. The rows stand by expert, in an order
            and with gaps that are the kernel's own; a row that no slot points to is undefined.
        expert_weights: (T, k), what each row is still to be multiplied by. It is 1 where the weight
            went on the expert's input; undefined where the slot's index is -1.
        expanded_idx_to_permuted_idx: (T, k) int32, the row of each token's slot; -1 where the expert
            is another rank's, or the slot is skipped.

    Source: FlashInfer 0.7.2.post1, `FusedMoeLauncher::run` with `do_finalize=False`
    (`trtllm_fused_moe_kernel_launcher.cu`), and `finalizeKernel` (`trtllm_fused_moe_dev_kernel.cu`).
    """

    gemm2_output: Tensor
    expert_weights: Tensor
    expanded_idx_to_permuted_idx: Tensor

    def finalize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The sum, in plain PyTorch: what a fused kernel in its place has to give.

        Added up in float32, slot by slot, as FlashInfer's own finalize does.

        Args:
            dtype: of the result; None is that of the rows.

        Returns:
            (T, H); a partial sum where the rank is one of several.
        """
        rows, index = self.gemm2_output, self.expanded_idx_to_permuted_idx
        total = rows.new_zeros((index.shape[0], rows.shape[1]), dtype=torch.float32)
        for slot in range(index.shape[1]):
            at = index[:, slot]
            weight = self.expert_weights[:, slot].float().unsqueeze(1)
            weighted = rows[at.clamp(min=0).long()].float() * weight
            # Not times 0: an undefined row or weight may be NaN.
            total = total + torch.where((at >= 0).unsqueeze(1), weighted, 0.0)
        return total.to(rows.dtype if dtype is None else dtype)
