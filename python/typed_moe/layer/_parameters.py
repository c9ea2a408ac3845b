"""Which tensors a layer holds, by format: names as SGLang and vLLM use them.

L experts of this rank (fused shared ones at the end), M = 2I gated or I ungated, I this rank's
slice of the intermediate width, H hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import assert_never, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Unquantized,
    weight_block,
)


@final
@attrs.frozen(kw_only=True)
class ParameterSpec:
    """Shape and dtype of one parameter."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@final
@attrs.frozen(kw_only=True)
class ExpertSizes:
    """The sizes of one rank's experts.

    Attributes:
        experts: L.
        first_rows: M, rows of the first matrix.
        hidden_size: H.
        intermediate_size: I of this rank.
    """

    experts: int
    first_rows: int
    hidden_size: int
    intermediate_size: int

    def matrices(self) -> tuple[tuple[str, int, int], ...]:
        """(prefix, rows, columns) of the two matrices."""
        return (
            ("w13", self.first_rows, self.hidden_size),
            ("w2", self.hidden_size, self.intermediate_size),
        )


def parameter_specs(
    fmt: Format, sizes: ExpertSizes, *, dtype: torch.dtype, has_bias: bool
) -> dict[str, ParameterSpec]:
    """Every parameter of a layer by name.

    Args:
        fmt: the format.
        sizes: this rank's experts.
        dtype: of unquantised weights.
        has_bias: whether the experts have bias vectors.

    Raises:
        ValueError: a width is not a whole number of the format's groups.
    """
    specs: dict[str, ParameterSpec] = {}
    for prefix, rows, columns in sizes.matrices():
        _check_groups(fmt, prefix, columns)
        for suffix, (shape, kind) in _matrix(fmt, rows, columns, dtype).items():
            whole = () if suffix == "input_scale" else (sizes.experts, *shape)
            specs[f"{prefix}_{suffix}"] = ParameterSpec(shape=whole, dtype=kind)
        if has_bias:
            specs[f"{prefix}_weight_bias"] = ParameterSpec(
                shape=(sizes.experts, rows), dtype=torch.float32
            )
    return specs


def _check_groups(fmt: Format, prefix: str, columns: int) -> None:
    group = weight_block(fmt)[1]
    if not isinstance(fmt, Fp8BlockScale) and columns % group:
        width = "hidden_size" if prefix == "w13" else "intermediate_size per tensor-parallel rank"
        raise ValueError(
            f"{width} is {columns}, not a multiple of {group}, the group size of {fmt.name}; "
            "pad it, or choose another format or tp_size"
        )


def _matrix(
    fmt: Format, rows: int, columns: int, dtype: torch.dtype
) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
    """Suffix -> shape of one expert's tensor and dtype."""
    fp8 = ((rows, columns), torch.float8_e4m3fn)
    packed = ((rows, columns // 2), torch.uint8)
    match fmt:
        case Unquantized():
            return {"weight": ((rows, columns), dtype)}
        case Bf16():
            return {"weight": ((rows, columns), torch.bfloat16)}
        case Fp8PerTensor():
            return {
                "weight": fp8,
                "weight_scale": ((), torch.float32),
                "input_scale": ((), torch.float32),
            }
        case Fp8PerChannel():
            return {"weight": fp8, "weight_scale": ((rows,), torch.float32)}
        case Fp8BlockScale():
            blocks = (-(-rows // 128), -(-columns // 128))
            return {"weight": fp8, "weight_scale_inv": (blocks, torch.float32)}
        case MxFp8():
            return {"weight": fp8, "weight_scale": ((rows, columns // 32), torch.uint8)}
        case Nvfp4():
            return {
                "weight": packed,
                "weight_scale": ((rows, columns // 16), torch.float8_e4m3fn),
                "weight_scale_2": ((), torch.float32),
                "input_scale": ((), torch.float32),
            }
        case MxFp4():
            return {"weight": packed, "weight_scale": ((rows, columns // 32), torch.uint8)}
        case MxInt4():
            return {"weight": packed, "weight_scale": ((rows, columns // 32), torch.bfloat16)}
        case _:
            assert_never(fmt)


def unloaded(name: str, spec: ParameterSpec, device: torch.device | None) -> Tensor:
    """A tensor that is recognised as never loaded: NaN where the dtype has one.

    The NaN of an E8M0 scale is the byte 255. Packed values have none and start as zeros;
    the scales beside them tell.
    """
    if spec.dtype is torch.uint8:
        value = 255 if name.endswith("_scale") else 0
        return torch.full(spec.shape, value, dtype=torch.uint8, device=device)
    if spec.dtype is torch.float8_e4m3fn:
        bits = torch.full(spec.shape, 0x7F, dtype=torch.uint8, device=device)
        return bits.view(torch.float8_e4m3fn)
    return torch.full(spec.shape, torch.nan, dtype=spec.dtype, device=device)


def is_unloaded(name: str, tensor: Tensor) -> bool:
    """Whether any value is the NaN that `unloaded` left, or another NaN or infinity.

    Synchronises with the host.
    """
    if tensor.dtype is torch.uint8 and not name.endswith("_scale"):
        return False
    # Expert by expert: the masks of a whole stack would be larger than the stack.
    experts = tensor.unbind(0) if tensor.dim() > 1 else (tensor,)
    return bool(torch.stack([_holds_nan(expert) for expert in experts]).any())


def _holds_nan(tensor: Tensor) -> Tensor:
    """() bool, on the tensor's device."""
    if tensor.dtype is torch.uint8:
        return (tensor == 255).any()
    if tensor.dtype is torch.float8_e4m3fn:
        return ((tensor.view(torch.uint8) & 0x7F) == 0x7F).any()
    return ~tensor.isfinite().all()


def scale_name(prefix: str, fmt: Format) -> str | None:
    """The parameter that holds a matrix's first-level scales; None where there is none."""
    match fmt:
        case Unquantized() | Bf16():
            return None
        case Fp8BlockScale():
            return f"{prefix}_weight_scale_inv"
        case Fp8PerTensor() | Fp8PerChannel() | MxFp8() | Nvfp4() | MxFp4() | MxInt4():
            return f"{prefix}_weight_scale"
        case _:
            assert_never(fmt)


def fields_of(quant: Format) -> dict[str, str]:
    """Parameter name -> field of `ExpertWeights`."""
    names: dict[str, str] = {}
    for prefix in ("w13", "w2"):
        scale = scale_name(prefix, quant)
        names |= {
            f"{prefix}_weight": f"{prefix}_weight",
            f"{prefix}_weight_scale_2": f"{prefix}_scale_2",
            f"{prefix}_input_scale": f"{prefix}_input_scale",
            f"{prefix}_weight_bias": f"{prefix}_bias",
        }
        if scale is not None:
            names[scale] = f"{prefix}_scale"
    return names
