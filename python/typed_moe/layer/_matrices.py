"""One expert's matrix as a checkpoint stores it, and into the layer's format.

A matrix is copied as stored where checkpoint and layer share the format, and dequantised to
float32 and quantised anew where they do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.config import (
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Unquantized,
    values_per_byte,
    weight_block,
)
from typed_moe.errors import CheckpointError
from typed_moe.quantization import Quantized, dequantize_weight, quantize_weight

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@final
@attrs.frozen(kw_only=True, eq=False)
class StoredMatrix:
    """A matrix (rows, columns) in some format."""

    fmt: Format
    stored: Quantized
    input_scale: Tensor | None = None

    def values(self) -> Tensor:
        """(rows, columns) float32."""
        return dequantize_weight(self.stored, self.fmt)

    def rows(self, start: int, stop: int) -> StoredMatrix:
        """The rows from start to stop; as values where they cut through one of the blocks."""
        block = weight_block(self.fmt)[0]
        if _cuts(block, start, stop, self.stored.data.shape[0]):
            return self._plain(self.values()[start:stop])
        scale = self.stored.scale
        if scale is not None and scale.dim() > 0:
            scale = scale[start // block : -(-stop // block)]
        return attrs.evolve(
            self, stored=replace(self.stored, data=self.stored.data[start:stop], scale=scale)
        )

    def columns(self, start: int, stop: int) -> StoredMatrix:
        """The columns from start to stop; as values where they cut through one of the blocks."""
        block = weight_block(self.fmt)[1]
        packing = values_per_byte(self.fmt)
        if _cuts(block, start, stop, packing * self.stored.data.shape[1]):
            return self._plain(self.values()[:, start:stop])
        scale = self.stored.scale
        if scale is not None and scale.dim() == 2:
            scale = scale[:, start // block : -(-stop // block)]
        data = self.stored.data[:, start // packing : stop // packing]
        return attrs.evolve(self, stored=replace(self.stored, data=data, scale=scale))

    def _plain(self, values: Tensor) -> StoredMatrix:
        return attrs.evolve(self, fmt=Unquantized(), stored=Quantized(data=values, scale=None))


def _cuts(block: int, start: int, stop: int, size: int) -> bool:
    """Whether a range's borders lie inside a block; the last block may be short."""
    return start % block != 0 or (stop % block != 0 and stop != size)


def read_matrix(name: str, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> StoredMatrix:
    """The matrix that a checkpoint's tensors of one projection describe.

    Args:
        name: for messages.
        tensors: by kind: `weight` and, by format, `weight_scale_inv`, `weight_scale`,
            `weight_scale_2`, `input_scale`; int4 of compressed-tensors has `weight_packed` for
            `weight`.
        shape: the rows and columns that the layer expects.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or dtype.
    """
    weight = _int4_bytes(tensors["weight_packed"]) if "weight_packed" in tensors else None
    weight = tensors.get("weight", weight)
    if weight is None:
        raise CheckpointError(f"{name}.weight is missing; the checkpoint has {sorted(tensors)}")
    fmt = _format(name, weight, tensors)
    packing = values_per_byte(fmt)
    if tuple(weight.shape) != (shape[0], shape[1] // packing):
        raise CheckpointError(
            f"{name}.weight has shape {tuple(weight.shape)}; allowed: "
            f"{(shape[0], shape[1] // packing)} for {fmt.name}. Are hidden_size and "
            "intermediate_size the checkpoint's?"
        )
    scale = tensors.get("weight_scale_inv", tensors.get("weight_scale"))
    stored = Quantized(data=weight, scale=scale, global_scale=tensors.get("weight_scale_2"))
    return StoredMatrix(
        fmt=fmt, stored=_checked(name, fmt, stored, shape), input_scale=tensors.get("input_scale")
    )


def _int4_bytes(packed: Tensor) -> Tensor:
    """int32 (rows, K / 8) of compressed-tensors as uint8 (rows, K / 2): the layer's own int4.

    Both have the even index in the low nibble. compressed-tensors stores value + 8, which is the
    two's complement with its sign bit turned over.

    Source: compressed-tensors `pack_to_int32`; Kimi K2's int4 checkpoints.
    """
    if packed.dtype is not torch.int32:
        return packed
    return packed.contiguous().view(torch.uint8) ^ 0x88


def _format(name: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> Format:
    """The format that the dtypes and the kinds of tensors tell."""
    scale = tensors.get("weight_scale")
    if weight.dtype in _FLOATS:
        if scale is not None or "weight_scale_inv" in tensors:
            raise CheckpointError(
                f"{name}.weight is {weight.dtype} and has a scale; allowed: a scale beside "
                "float8_e4m3fn or packed uint8 values"
            )
        return Unquantized()
    if weight.dtype is torch.float8_e4m3fn:
        if "weight_scale_inv" in tensors:
            return Fp8BlockScale()
        if scale is not None and scale.dtype is torch.uint8:
            return MxFp8()
        if scale is not None and scale.numel() == 1:
            return Fp8PerTensor()
        if scale is not None and tuple(scale.shape) in ((weight.shape[0],), (weight.shape[0], 1)):
            return Fp8PerChannel()
    if weight.dtype is torch.uint8 and scale is not None:
        if scale.dtype is torch.uint8:
            return MxFp4()
        if scale.dtype is torch.bfloat16:
            return MxInt4()
        if "weight_scale_2" in tensors:
            return Nvfp4()
    raise CheckpointError(
        f"{name}.weight is {weight.dtype} with {sorted(set(tensors) - {'weight'}) or 'no scale'}; "
        "allowed: float32, bfloat16 or float16 without a scale, float8_e4m3fn with "
        "weight_scale_inv (blocks) or weight_scale (one, one per row, or E8M0 bytes), uint8 with weight_scale "
        "(E8M0 bytes: MXFP4, bfloat16: int4) or weight_scale and weight_scale_2 (NVFP4)"
    )


def _checked(name: str, fmt: Format, stored: Quantized, shape: tuple[int, int]) -> Quantized:
    """The scales in their normal shapes, or the refusal of others."""
    scale, rows, columns = stored.scale, *shape
    if scale is None:
        return stored
    block = weight_block(fmt)
    expected: tuple[int, ...] = (-(-rows // block[0]), -(-columns // block[1]))
    if isinstance(fmt, Fp8PerTensor):
        expected = ()
        scale = scale.reshape(())
    if isinstance(fmt, Fp8PerChannel):
        expected = (rows,)
        scale = scale.flatten()
    if tuple(scale.shape) != expected:
        raise CheckpointError(
            f"the scale of {name} has shape {tuple(scale.shape)}; allowed: {expected} for {fmt.name}"
        )
    if isinstance(fmt, Fp8BlockScale | Fp8PerTensor | Fp8PerChannel):
        scale = scale.float()
    second = stored.global_scale
    return replace(
        stored, scale=scale, global_scale=None if second is None else second.float().reshape(())
    )


def join(parts: tuple[StoredMatrix, ...], target: Format) -> Quantized:
    """Matrices one above the other, in the layer's format.

    Stored values are kept where every part has the target's format and the parts can share
    their scales; otherwise the values are quantised anew.
    """
    if isinstance(target, Unquantized):
        return Quantized(data=torch.cat([part.values() for part in parts]), scale=None)
    if all(part.fmt.name == target.name for part in parts):
        kept = _kept(parts, target)
        if kept is not None:
            return kept
    return quantize_weight(torch.cat([part.values() for part in parts]), target)


def _kept(parts: tuple[StoredMatrix, ...], target: Format) -> Quantized | None:
    """The stored values of all parts under common scales; None where they have none in common."""
    first = parts[0].stored
    for part in parts[1:]:
        if not _same(part.stored.global_scale, first.global_scale):
            return None
        if isinstance(target, Fp8PerTensor) and not _same(part.stored.scale, first.scale):
            return None
    borders = [part.stored.data.shape[0] for part in parts[:-1]]
    if any(rows % weight_block(target)[0] for rows in borders):
        return None
    data = torch.cat([part.stored.data for part in parts])
    if first.scale is None or isinstance(target, Fp8PerTensor):
        return Quantized(data=data, scale=first.scale, global_scale=first.global_scale)
    scales = [part.stored.scale for part in parts]
    return Quantized(
        data=data,
        scale=torch.cat([scale for scale in scales if scale is not None]),
        global_scale=first.global_scale,
    )


def _same(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return bool(torch.equal(left, right))
