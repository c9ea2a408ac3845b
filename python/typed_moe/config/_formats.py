"""Quantisation formats: what the weights and activations of a layer are stored in.

Each class is a value, without tensors. How a tensor gets into a format and out of it is
`typed_moe.quantization`'s business; which kernel takes a format is the plan's.
"""

from __future__ import annotations

from typing import ClassVar, Literal, assert_never, final

import attrs


@final
@attrs.frozen(kw_only=True)
class Unquantized:
    """Weights and activations stay in the layer's `dtype` (float32, float16 or bfloat16)."""

    name: ClassVar[Literal["unquantized"]] = "unquantized"


@final
@attrs.frozen(kw_only=True)
class Bf16:
    """Weights and activations in bfloat16."""

    name: ClassVar[Literal["bf16"]] = "bf16"


@final
@attrs.frozen(kw_only=True)
class Fp8PerTensor:
    """float8_e4m3fn, one float32 scale per expert matrix, one static scale per activation.

    Activation scales (`w13_input_scale`, `w2_input_scale`) come from the checkpoint or from
    `FusedMoE.calibrate`. Source: ModelOpt FP8 checkpoints, FlashInfer
    `trtllm_fp8_per_tensor_scale_moe`.
    """

    name: ClassVar[Literal["fp8_per_tensor"]] = "fp8_per_tensor"


@final
@attrs.frozen(kw_only=True)
class Fp8PerChannel:
    """float8_e4m3fn with float32 scales: weights per output row, activations per token.

    Activations are quantised at run time. Source: compressed-tensors FP8 checkpoints with channel
    scales (`FP8_DYNAMIC`), FlashInfer `trtllm_fp8_per_channel_scale_moe`.
    """

    name: ClassVar[Literal["fp8_per_channel"]] = "fp8_per_channel"


@final
@attrs.frozen(kw_only=True)
class Fp8BlockScale:
    """float8_e4m3fn with float32 scales: weights per 128x128 block, activations per 1x128.

    What DeepSeek-V3 and the Qwen3 FP8 checkpoints store (`weight_scale_inv`). Activations are
    quantised per token at run time. Source: DeepSeek-V3 technical report, section 3.3.2.
    """

    name: ClassVar[Literal["fp8_block"]] = "fp8_block"


@final
@attrs.frozen(kw_only=True)
class MxFp8:
    """float8_e4m3fn with one power-of-two (E8M0) scale per 32 values along K, both operands.

    Source: OCP Microscaling Formats (MX) specification 1.0.
    """

    name: ClassVar[Literal["mxfp8"]] = "mxfp8"


@final
@attrs.frozen(kw_only=True)
class Nvfp4:
    """E2M1 with one float8_e4m3fn scale per 16 values along K and one float32 scale per tensor.

    Both operands; the activation's per-tensor scale is static, from the checkpoint or from
    `FusedMoE.calibrate`. Source: NVIDIA ModelOpt NVFP4 checkpoints.
    """

    name: ClassVar[Literal["nvfp4"]] = "nvfp4"


@final
@attrs.frozen(kw_only=True)
class MxFp4:
    """E2M1 weights with one power-of-two (E8M0) scale per 32 values along K.

    Attributes:
        activation: what the weights are multiplied with: `"bf16"` (as gpt-oss was published)
            or `"mxfp8"` (activations quantised per token to MXFP8).

    Source: OCP MX specification 1.0; the gpt-oss model card.
    """

    name: ClassVar[Literal["mxfp4"]] = "mxfp4"
    activation: Literal["bf16", "mxfp8"] = attrs.field(
        default="bf16", validator=attrs.validators.in_(("bf16", "mxfp8"))
    )


@final
@attrs.frozen(kw_only=True)
class MxInt4:
    """int4 weights (-8 to 7) with one bfloat16 scale per 32 values along K; bfloat16 activations.

    The scale is any bfloat16, not a power of two. Source: FlashInfer
    `trtllm_mxint4_block_scale_moe`. Kimi K2's int4 checkpoints hold the same numbers, packed
    otherwise.
    """

    name: ClassVar[Literal["mxint4"]] = "mxint4"


Format = (
    Unquantized
    | Bf16
    | Fp8PerTensor
    | Fp8PerChannel
    | Fp8BlockScale
    | MxFp8
    | Nvfp4
    | MxFp4
    | MxInt4
)
"""Any quantisation format a layer can hold."""

FormatName = Literal[
    "unquantized",
    "bf16",
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_block",
    "mxfp8",
    "nvfp4",
    "mxfp4",
    "mxint4",
]

FORMATS: dict[FormatName, Format] = {
    fmt.name: fmt
    for fmt in (
        Unquantized(),
        Bf16(),
        Fp8PerTensor(),
        Fp8PerChannel(),
        Fp8BlockScale(),
        MxFp8(),
        Nvfp4(),
        MxFp4(),
        MxInt4(),
    )
}
"""Every format by the name that the command line uses, with its default settings."""


def weight_block(fmt: Format) -> tuple[int, int]:
    """Rows and columns of one weight matrix that cannot be cut apart without a new scale.

    (1, 1) where any cut will do: there is no scale, or it is the whole matrix's or each row's.
    """
    match fmt:
        case Unquantized() | Bf16() | Fp8PerTensor() | Fp8PerChannel():
            return (1, 1)
        case Fp8BlockScale():
            return (128, 128)
        case MxFp8() | MxFp4() | MxInt4():
            return (1, 32)
        case Nvfp4():
            return (1, 16)
        case _:
            assert_never(fmt)


def values_per_byte(fmt: Format) -> int:
    """How many weights one stored element holds: 2 where two are packed into a byte, else 1."""
    return 2 if isinstance(fmt, Nvfp4 | MxFp4 | MxInt4) else 1
