"""One kernel for few rows per expert and another for many, over the same weights."""

from __future__ import annotations

from typing import Protocol, final

import attrs
from torch import Tensor

from typed_moe.config import Format
from typed_moe.kernels._protocol import (
    KernelRequest,
    MoeKernel,
    QuantizingKernel,
    UnfinalizedKernel,
)
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import MoeArgs, Precomputed, Routing
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.quantization import Quantized
from typed_moe.routing import KernelRules, Refused


class SizedKernel(MoeKernel, UnfinalizedKernel, QuantizingKernel, Protocol):
    """**Protocol:** what either of the two has to be."""


@final
@attrs.frozen(kw_only=True)
class BySizeKernel:
    """`few` below `least_rows` rows per expert on average, `many` from there on.

    T * k / E is known without looking at the ids, so a call asks the host alone, and a CUDA graph keeps
    what its T chose. Both read the layer's weights as they are stored.

    Attributes:
        few, many: the kernels.
        least_rows: T * k / E from which on `many` runs; 0: always.
    """

    few: SizedKernel
    many: SizedKernel
    least_rows: float

    @property
    def name(self) -> str:
        """Such as `triton, deep_gemm from 256 rows per expert on`."""
        if self.least_rows <= 0:
            return self.many.name
        return f"{self.few.name}, {self.many.name} from {self.least_rows:g} rows per expert on"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """What both route, which is the same; or why one of them does not serve the layer."""
        for kernel in (self.many, self.few):
            rules = kernel.rules(request)
            if isinstance(rules, Refused):
                return Refused(f"{kernel.name} {rules.reason}")
        return self.few.rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As they are, by both.

        Raises:
            ValueError: one of them would have them otherwise; or as its own `prepare`.
        """
        for kernel in (self.few, self.many):
            if kernel.prepare(weights, request) is not weights:
                raise ValueError(
                    f"{kernel.name} rearranges the weights, which {self.name} has for both kernels; "
                    "pass the one kernel that is wanted"
                )
        return weights

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """By the kernel of this size."""
        return self._kernel(args)(args)

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        """Of both, where they are the same."""
        few = self.few.unfinalized_rules(request, routing)
        many = self.many.unfinalized_rules(request, routing)
        if few == many:
            return few
        return Refused(f"{self.few.name} says {few}, {self.many.name} says {many}")

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        """By the kernel of this size."""
        return self._kernel(args).unfinalized(args)

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        """See `QuantizingKernel.quantize`: the bits are the same from either."""
        return self.few.quantize(hidden_states, quant, input_scale=input_scale)

    def _kernel(self, args: MoeArgs) -> SizedKernel:
        return self.many if rows_per_expert(args) >= self.least_rows else self.few


def rows_per_expert(args: MoeArgs) -> float:
    """Slots over experts, fused shared experts among both."""
    experts = args.experts
    shared = experts.num_fused_shared_experts
    slots = args.hidden_states.shape[0] * (experts.top_k + shared)
    if isinstance(args.routing, Precomputed):
        slots = args.routing.topk_ids.numel()
    return slots / (experts.num_experts + shared)
