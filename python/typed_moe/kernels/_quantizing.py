"""Activations on their way into a format: what a kernel reads and writes for it."""

from __future__ import annotations

from typing import Literal, final

import attrs
from torch import Tensor

PART = 1024
"""Values of one program."""


@final
@attrs.frozen(kw_only=True, eq=False)
class Quantizing:
    """(T, H) floating point, and the memory for what becomes of it.

    Attributes:
        form: "block": float8_e4m3fn with a float32 for 128 values; "tensor": by a static scale; "mxfp8":
            with E8M0 bytes for 32; "nvfp4": packed E2M1 with float8_e4m3fn for 16 under a static scale;
            "parts": bfloat16 as it is.
        x: the values, adjacent in a row.
        given: the static scale, where the form has one.
        out: the result; with `pack`, in bfloat16, the values that it stands for.
        scale: its scales, where they are written.
        pack: the parts of a row of `out`, or 0.
    """

    form: Literal["block", "tensor", "mxfp8", "nvfp4", "parts"]
    x: Tensor
    given: Tensor | None = None
    out: Tensor
    scale: Tensor | None = None
    pack: int = 0

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`x`, `given`, `out`, `scale`: any of them for what is not there, and is not read."""
        given = self.x if self.given is None else self.given
        return self.x, given, self.out, self.out if self.scale is None else self.scale

    @property
    def part(self) -> int:
        """Values of one program beside routing."""
        return PART

    @property
    def programs(self) -> int:
        """Of so many."""
        tokens, width = self.x.shape
        return int(tokens) * -(-int(width) // self.part)
