"""What a card can do at most, measured: bytes and floating-point operations per second."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_clock import Call, Clocks
from typed_moe.config import Bf16, Format, MxFp4, MxInt4, Unquantized

_COPIED_BYTES = 4 << 30
_WIDTH = 8192
_SAME = 4  # products or copies per graph


@final
@attrs.frozen(kw_only=True)
class Card:
    """Measured rates.

    Attributes:
        bytes_per_second: of a copy within the device's memory, read and written, by the driver or by a
            kernel of PyTorch's.
        bf16_flops, fp8_flops: of a product of two square matrices, per second; a product and a
            sum are two.
        fp8_source: where the FP8 rate is from.
        width: of those matrices.
    """

    bytes_per_second: float
    bf16_flops: float
    fp8_flops: float
    fp8_source: str
    width: int

    def flops(self, quant: Format) -> float:
        """Per second, for a format's products: the FP8 units' unless the activations are bfloat16."""
        return self.bf16_flops if multiplies_bf16(quant) else self.fp8_flops


def multiplies_bf16(quant: Format) -> bool:
    """Whether a format's activations are bfloat16 (or wider), so that its products are."""
    return isinstance(quant, Unquantized | Bf16 | MxInt4) or quant == MxFp4(activation="bf16")


@final
@attrs.frozen(kw_only=True)
class Floor:
    """Microseconds that a layer's call takes at least on a card.

    Attributes:
        memory_us: the weights of the experts that are used, input and output, once.
        compute_us: both products of every slot.
    """

    memory_us: float
    compute_us: float

    @property
    def us(self) -> float:
        """The larger one."""
        return max(self.memory_us, self.compute_us)

    @property
    def by(self) -> str:
        """Which that is."""
        return "memory" if self.memory_us >= self.compute_us else "matrix"


def floor_of(card: Card, quant: Format, *, moved_bytes: float, flops: float) -> Floor:
    """The floor of a call that moves so many bytes and makes so many operations."""
    return Floor(
        memory_us=moved_bytes / card.bytes_per_second * 1e6,
        compute_us=flops / card.flops(quant) * 1e6,
    )


def measure_card(clocks: Clocks, *, copied: int = _COPIED_BYTES, width: int = _WIDTH) -> Card:
    """Time a copy of `copied` bytes and products of `width` x `width` matrices."""
    bf16 = _bf16_flops(clocks, width)
    fp8 = _fp8_flops(clocks, width)
    if fp8 is None:
        rate, source = 2 * bf16, "twice the bfloat16 rate: torch._scaled_mm has no FP8 here"
    else:
        rate, source = fp8, f"torch._scaled_mm, {width} x {width}"
    return Card(
        bytes_per_second=_copy_rate(clocks, copied),
        bf16_flops=bf16,
        fp8_flops=rate,
        fp8_source=source,
        width=width,
    )


def _copy_rate(clocks: Clocks, copied: int) -> float:
    """The better of the driver's copy and of a kernel that reads and writes: neither is always it."""
    source = torch.randn(copied // 4, dtype=torch.float32, device=clocks.device)
    target = torch.empty_like(source)
    copy = clocks.graph([lambda: target.copy_(source)] * _SAME)
    kernel = clocks.graph([lambda: torch.neg(source, out=target)] * _SAME)
    return 2 * copied / min(copy, kernel) * 1e6


def _square(clocks: Clocks, width: int) -> Tensor:
    # Random values: on zeros a card draws less power, and clocks higher.
    return torch.randn(width, width, device=clocks.device, dtype=torch.bfloat16)


def _bf16_flops(clocks: Clocks, width: int) -> float:
    first, second = _square(clocks, width), _square(clocks, width)
    out = torch.empty_like(first)
    return _rate(clocks, lambda: torch.mm(first, second, out=out), width)


def _fp8_flops(clocks: Clocks, width: int) -> float | None:
    """None where the card or this torch has no FP8 product."""
    first = _square(clocks, width).to(torch.float8_e4m3fn)
    second = _square(clocks, width).to(torch.float8_e4m3fn).T
    one = torch.ones((), device=clocks.device)

    def product() -> Tensor:
        return torch._scaled_mm(  # noqa: SLF001 - it has no public name
            first, second, scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    try:
        product()
    except (RuntimeError, ValueError, NotImplementedError):
        return None
    return _rate(clocks, product, width)


def _rate(clocks: Clocks, product: Call, width: int) -> float:
    return 2.0 * width**3 / clocks.graph([product] * _SAME) * 1e6
