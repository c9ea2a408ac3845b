"""What the runners of all families do with their record: one call, with the sum or without."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from typed_moe.kernels import MoeArgs, Unfinalized
from typed_moe.routing import Routed
from typed_moe.runners._base import NO_BUFFERS, CallBuffers
from typed_moe.runners._call import KernelCall


class KernelRunner(ABC):
    """A `MoeRunner` that also stops before the sum. A family says what its record is."""

    _call: KernelCall

    def __call__(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers = NO_BUFFERS,
    ) -> Tensor:
        """See `MoeRunner`."""
        args, copies = self._record(hidden_states, router_logits, e_score_correction_bias, buffers)
        return self._call(args, copies, hidden_states.dtype)

    def unfinalized(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers = NO_BUFFERS,
    ) -> Unfinalized:
        """The same call without the weighted sum.

        Raises:
            UnsupportedRouting: the plan's `unfinalized` is a refusal.
            ValueError: buffers have an `output`.
        """
        args, copies = self._record(hidden_states, router_logits, e_score_correction_bias, buffers)
        return self._call.unfinalized(args, copies)

    @abstractmethod
    def _record(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | Routed,
        e_score_correction_bias: Tensor | None,
        buffers: CallBuffers,
    ) -> tuple[MoeArgs, int]:
        """The call's argument record, and how many of its rows one token has."""
