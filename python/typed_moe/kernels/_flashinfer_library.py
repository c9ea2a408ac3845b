"""What a FlashInfer installation is to the kernel: facts to look up, and calls by name.

`typed_moe.kernels._flashinfer` is the installed one. Tests put others in its place: the tables
of other releases, and FlashInfer's own references.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import torch
from torch import Tensor

from typed_moe.routing import Refused

EnumName = Literal[
    "RoutingMethodType", "ActivationType", "Fp8QuantizationType", "WeightLayout", "SfLayout"
]


class FlashInferLibrary(Protocol):
    """**Protocol:** one FlashInfer release."""

    @property
    def version(self) -> str:
        """As the package says, such as `0.7.2.post1`."""
        ...

    def parameters(self, entry_point: str) -> frozenset[str]:
        """The parameter names of a function of `flashinfer.fused_moe`; empty: it is not there."""
        ...

    def number(self, enum: EnumName, member: str) -> int | None:
        """The number of an enum's member, by name; None: this release lacks it."""
        ...

    def refuses(self, device: torch.device) -> Refused | None:
        """Why its kernels do not run on a device; None if they do."""
        ...

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """Call by keyword. Returns the finalised output, whatever container it came in."""
        ...

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Call with `do_finalize=False` among the keywords.

        Returns:
            gemm2_output (P, H), expert_weights (T, k), expanded_idx_to_permuted_idx (T * k,) int32.
        """
        ...
