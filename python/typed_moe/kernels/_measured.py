"""Which library's kernel is faster where, as data: whole layers timed on one card, by kernel.

The times are reports of `typed-moe bench layer` (`typed_moe.kernels._times_file`): the file that
TYPED_MOE_TIMES names, then the built-in ones. Where nothing was measured the Triton kernels run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final, final

import attrs
import torch

from typed_moe.kernels._protocol import KernelRequest
from typed_moe.routing import Refused

OURS: Final = "triton"
PROVIDERS: tuple[str, ...] = ("deep_gemm",)
"""Kernels that libraries bring, by name, the preferred one first."""
_GAIN = 1.03
"""Below that a difference is the clock's: two runs of one kernel differ by up to 2 %."""


@final
@attrs.frozen(kw_only=True)
class MeasuredLayer:
    """One layer in one format on one card.

    Attributes:
        card: as the driver names it.
        format: as `Format.name`.
        model: what was measured.
        num_experts, top_k, hidden_size, intermediate_size: of one rank.
        microseconds: of a whole layer in a CUDA graph, by T, then by kernel.
        source: the library's version, and the date.
    """

    card: str
    format: str
    model: str
    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    microseconds: Mapping[int, Mapping[str, float]]
    source: str

    def rows_per_expert(self, tokens: int) -> float:
        """T * k / E."""
        return tokens * self.top_k / self.num_experts


@final
@attrs.frozen(kw_only=True)
class Choice:
    """A library's kernel that is faster, from how many rows per expert on, and the numbers."""

    kernel: str
    least_rows: float
    why: str


def choose(
    provider: str, request: KernelRequest, layers: Sequence[MeasuredLayer], card: str
) -> Choice | Refused | None:
    """Where a library's kernel is faster than the Triton kernels, in a layer of these widths.

    The widths, the format and the card are what was measured; rows per expert stand for T, top_k and
    the number of experts. From the least T on from which the library's kernel was the faster one, by
    3 % and more, at every larger T that was measured too; below the least T that was measured, never.

    Returns:
        The choice; why it is none; or None: nothing was measured.
    """
    width = request.placement.local_intermediate_size(request.intermediate_size)
    sizes = (card, request.quant.name, request.hidden_size, width)
    for layer in layers:
        if (layer.card, layer.format, layer.hidden_size, layer.intermediate_size) != sizes:
            continue
        both = {
            tokens: times
            for tokens, times in sorted(layer.microseconds.items(), reverse=True)
            if provider in times and OURS in times
        }
        if both:
            return _choice(provider, layer, both)
    return None


def _choice(
    provider: str, layer: MeasuredLayer, both: Mapping[int, Mapping[str, float]]
) -> Choice | Refused:
    """`both`: the times that have both kernels, the largest T first."""
    least: int | None = None
    for tokens, times in both.items():
        if times[provider] * _GAIN > times[OURS]:
            break
        least = tokens
    if least is None:
        return Refused(f"is not faster: {_said(provider, layer, next(iter(both)))}")
    rows = 0.0 if least == 1 else layer.rows_per_expert(least)
    where = "at every size" if rows == 0.0 else f"from T * k / E = {rows:g} rows per expert on"
    return Choice(
        kernel=provider,
        least_rows=rows,
        why=f"{provider} is faster {where}: {_said(provider, layer, least)}",
    )


def _said(provider: str, layer: MeasuredLayer, tokens: int) -> str:
    times = layer.microseconds[tokens]
    if not math.isfinite(times[provider]):
        return f"it was wrong or failed at T = {tokens} of {layer.model} ({layer.card}, {layer.source})"
    return (
        f"{times[provider]:g} us against {times[OURS]:g} with {OURS} at T = {tokens} of "
        f"{layer.model} ({layer.card}, {layer.source})"
    )


def card_of(device: torch.device) -> str | None:
    """The card's name; None where there is none."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_name(device)
