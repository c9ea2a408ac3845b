"""The argument records: what a fused MoE kernel is called with, under the kernel's own names.

One record per family of FlashInfer entry points (`trtllm_<family>_moe` and its `_routed`
twin). Which twin is meant is the type of `routing`: `FromLogits` or `Precomputed`. What does
not change between calls is in `experts`, built once. Records that are built inside a call are
dataclasses: torch.compile (2.13) cannot trace the frozen `__init__` that attrs makes.

Shapes: T tokens, H hidden size, I intermediate size of this rank, E experts of the whole
layer, L experts of this rank (fused shared experts at the end), M = 2I for a gated activation
and I otherwise, k = top_k.

Every record has `output`: (T, H) bfloat16 for the kernel to write to, or None. A kernel that writes
there returns that tensor.

Source: `flashinfer.fused_moe` 0.7.2.post1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from typed_moe.config import Format
from typed_moe.routing import GlobalExpertIds

ActivationType = Literal[
    "Swiglu", "SwigluStep", "Geglu", "GegluTanh", "Relu2", "Silu", "Gelu", "GeluTanh"
]
"""FlashInfer's names of `ActivationType`, and GeluTanh, which it lacks."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class FromLogits:
    """Routing arguments of a kernel that routes by itself.

    Attributes:
        routing_logits: (T, E) in a dtype that the kernel reads.
        routing_bias: (E,) correction bias, or None for a method that has none.
        n_group, topk_group: 1 or more for a method that knows groups, None otherwise.
        group_score: what ranks a group: its best expert, or the sum of its two best. FlashInfer's
            kernels know the second and have no argument for it.
        routed_scaling_factor: None for a method that has no factor.
        routing_method_type: the method by name; never a number here.
        norm_topk_prob: read by SigmoidRenorm alone.
        use_routing_scales_on_input: the weight multiplies the expert's input.
        routing_replay_out: (T or more, k) int16, where the kernel writes the chosen ids; or None.
    """

    routing_logits: Tensor
    routing_bias: Tensor | None
    n_group: int | None
    topk_group: int | None
    routed_scaling_factor: float | None
    routing_method_type: str
    norm_topk_prob: bool = True
    use_routing_scales_on_input: bool = False
    routing_replay_out: Tensor | None = None
    group_score: Literal["max", "top2_sum"] = "top2_sum"


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Precomputed:
    """Routing that is final: no method, no bias, no groups, no scale.

    Attributes:
        topk_ids: (T, k + fused shared experts) int32 global ids; -1 and ids of other ranks
            are skipped.
        topk_weights: the same shape, float32 or bfloat16.
    """

    topk_ids: GlobalExpertIds
    topk_weights: Tensor


Routing = FromLogits | Precomputed
"""The two modes of a call. No mode is told by a null pointer."""


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertArgs:
    """Arguments that every entry point has and that no call changes.

    Attributes:
        num_experts: E, routed experts of the whole layer.
        top_k: k, routed experts per token.
        intermediate_size: I of this rank.
        local_expert_offset: global id of this rank's first expert.
        local_num_experts: routed experts of this rank.
        activation_type: by name.
        num_fused_shared_experts: experts E, E + 1, ... that every token goes to with weight 1.
        gemm1_alpha, gemm1_beta, gemm1_clamp_limit: (L,) float32 settings of Swiglu, and the
            limit of SwigluStep; None where the activation's plain form is meant.
        gemm1_raw_clamp_limit: (L,) float32, gemm1_clamp_limit over the gate's output scale, for
            kernels that clamp before they scale; None where the format has no such scale.
        gemm1_bias: (L, M) float32, or None.
        gemm2_bias: (L, H) float32, or None.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    local_expert_offset: int
    local_num_experts: int
    activation_type: ActivationType
    num_fused_shared_experts: int = 0
    gemm1_alpha: Tensor | None = None
    gemm1_beta: Tensor | None = None
    gemm1_clamp_limit: Tensor | None = None
    gemm1_raw_clamp_limit: Tensor | None = None
    gemm1_bias: Tensor | None = None
    gemm2_bias: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class ToFormat:
    """A record's activations are floating point still, (T, H), with no scales; its kernel quantises them.

    Only for a kernel that says so: `QuantizingKernel`.

    Attributes:
        quant: the format, as `typed_moe.quantization.quantize_activation` brings them to it.
        input_scale: float32, one value: the static scale of a format that has one.
    """

    quant: Format
    input_scale: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Bf16MoeArgs:
    """`trtllm_bf16_moe`, `trtllm_bf16_routed_moe`.

    The reference kernel takes float32 and float16 in the same record.

    Attributes:
        hidden_states: (T, H) bfloat16.
        gemm1_weights: (L, M, H) bfloat16.
        gemm2_weights: (L, H, I) bfloat16.
    """

    family: ClassVar[Literal["bf16"]] = "bf16"
    routing: Routing
    experts: ExpertArgs
    hidden_states: Tensor
    gemm1_weights: Tensor
    gemm2_weights: Tensor
    output: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8PerTensorMoeArgs:
    """`trtllm_fp8_per_tensor_scale_moe`, `trtllm_fp8_per_tensor_scale_routed_moe`.

    Attributes:
        hidden_states: (T, H) float8_e4m3fn.
        gemm1_weights: (L, M, H) float8_e4m3fn.
        output1_scales_scalar: (L,) float32. Gated: w13_scale * x_scale / h_scale, with h_scale
            the intermediate's static scale. Ungated: 1 / h_scale.
        output1_scales_gate_scalar: (L,) float32, w13_scale * x_scale.
        gemm2_weights: (L, H, I) float8_e4m3fn.
        output2_scales_scalar: (L,) float32, w2_scale * h_scale.
        to_format: see `ToFormat`; None where `hidden_states` are in the format, as above.
    """

    family: ClassVar[Literal["fp8_per_tensor_scale"]] = "fp8_per_tensor_scale"
    routing: Routing
    experts: ExpertArgs
    hidden_states: Tensor
    gemm1_weights: Tensor
    output1_scales_scalar: Tensor
    output1_scales_gate_scalar: Tensor
    gemm2_weights: Tensor
    output2_scales_scalar: Tensor
    output: Tensor | None = None
    to_format: ToFormat | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8PerChannelMoeArgs:
    """`trtllm_fp8_per_channel_scale_moe`, `trtllm_fp8_per_channel_scale_routed_moe`.

    The intermediate is quantised per token inside the kernel.

    Attributes:
        hidden_states: (T, H) float8_e4m3fn.
        hidden_states_scale: (T, 1) float32.
        gemm1_weights: (L, M, H) float8_e4m3fn.
        gemm1_per_channel_weight_scale: (L, M) float32, in the rows' order.
        output1_scale_scalar, output1_scale_gate_scalar: (L,) float32 as in
            `Fp8PerTensorMoeArgs`; 1 where the scales above say everything.
        gemm2_weights: (L, H, I) float8_e4m3fn.
        gemm2_per_channel_weight_scale: (L, H) float32.
        output2_scale_scalar: (L,) float32, 1 likewise.
    """

    family: ClassVar[Literal["fp8_per_channel_scale"]] = "fp8_per_channel_scale"
    routing: Routing
    experts: ExpertArgs
    hidden_states: Tensor
    hidden_states_scale: Tensor
    gemm1_weights: Tensor
    gemm1_per_channel_weight_scale: Tensor
    output1_scale_scalar: Tensor
    output1_scale_gate_scalar: Tensor
    gemm2_weights: Tensor
    gemm2_per_channel_weight_scale: Tensor
    output2_scale_scalar: Tensor
    output: Tensor | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Fp8BlockMoeArgs:
    """`trtllm_fp8_block_scale_moe`, `trtllm_fp8_block_scale_routed_moe`.

    Attributes:
        hidden_states: (T, H) float8_e4m3fn.
        hidden_states_scale: DeepSeekFp8: (H / 128, T) float32; MxFp8: (T, H / 32) uint8.
        gemm1_weights: (L, M, H) float8_e4m3fn.
        gemm1_weights_scale: DeepSeekFp8: (L, M / 128, H / 128) float32; MxFp8: (L, M, H / 32).
        gemm2_weights: (L, H, I) float8_e4m3fn.
        gemm2_weights_scale: as gemm1_weights_scale, for (H, I).
        fp8_quantization_type: by name.
        to_format: see `ToFormat`; None where `hidden_states` are in the format, as above.
    """

    family: ClassVar[Literal["fp8_block_scale"]] = "fp8_block_scale"
    routing: Routing
    experts: ExpertArgs
    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    gemm1_weights: Tensor
    gemm1_weights_scale: Tensor
    gemm2_weights: Tensor
    gemm2_weights_scale: Tensor
    fp8_quantization_type: Literal["DeepSeekFp8", "MxFp8"]
    output: Tensor | None = None
    to_format: ToFormat | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class Fp4MoeArgs:
    """`trtllm_fp4_block_scale_moe`, `trtllm_fp4_block_scale_routed_moe`.

    NVFP4 and MXFP4 share it; the weight scales' dtype tells them apart.

    Attributes:
        hidden_states: (T, H / 2) uint8 NVFP4, or (T, H) bfloat16 or float8_e4m3fn with MXFP4.
        hidden_states_scale: (T, H / 16) float8_e4m3fn for NVFP4, (T, H / 32) uint8 for MXFP8,
            None for bfloat16.
        gemm1_weights: (L, M, H / 2) uint8, two E2M1 values per byte.
        gemm1_weights_scale: NVFP4: (L, M, H / 16) float8_e4m3fn; MXFP4: (L, M, H / 32) uint8.
        gemm2_weights: (L, H, I / 2) uint8.
        gemm2_weights_scale: as gemm1_weights_scale, for (H, I).
        output1_scale_scalar, output1_scale_gate_scalar, output2_scale_scalar: (L,) float32 as
            in `Fp8PerTensorMoeArgs`, with the per-tensor scales of NVFP4; None for MXFP4.
        to_format: see `ToFormat`; None where `hidden_states` are in the format, as above.
    """

    family: ClassVar[Literal["fp4_block_scale"]] = "fp4_block_scale"
    routing: Routing
    experts: ExpertArgs
    hidden_states: Tensor
    hidden_states_scale: Tensor | None
    gemm1_weights: Tensor
    gemm1_weights_scale: Tensor
    gemm2_weights: Tensor
    gemm2_weights_scale: Tensor
    output1_scale_scalar: Tensor | None
    output1_scale_gate_scalar: Tensor | None
    output2_scale_scalar: Tensor | None
    output: Tensor | None = None
    to_format: ToFormat | None = None


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class MxInt4MoeArgs:
    """`trtllm_mxint4_block_scale_moe`, `trtllm_mxint4_block_scale_routed_moe`.

    Attributes:
        hidden_states: (T, H) bfloat16.
        gemm1_weights: (L, M, H / 2) uint8, two int4 values per byte.
        gemm1_weights_scale: (L, M, H / 32) bfloat16.
        gemm2_weights: (L, H, I / 2) uint8.
        gemm2_weights_scale: (L, H, I / 32) bfloat16.
    """

    family: ClassVar[Literal["mxint4_block_scale"]] = "mxint4_block_scale"
    routing: Routing
    experts: ExpertArgs
    hidden_states: Tensor
    gemm1_weights: Tensor
    gemm1_weights_scale: Tensor
    gemm2_weights: Tensor
    gemm2_weights_scale: Tensor
    output: Tensor | None = None


MoeArgs = (
    Bf16MoeArgs
    | Fp8PerTensorMoeArgs
    | Fp8PerChannelMoeArgs
    | Fp8BlockMoeArgs
    | Fp4MoeArgs
    | MxInt4MoeArgs
)
"""Any argument record."""

Family = Literal[
    "bf16",
    "fp8_per_tensor_scale",
    "fp8_per_channel_scale",
    "fp8_block_scale",
    "fp4_block_scale",
    "mxint4_block_scale",
]


def check_in_format(args: MoeArgs) -> None:
    """Look at a record for a kernel that does not quantise.

    Raises:
        ValueError: its activations are not in the format.
    """
    to = to_format_of(args)
    if to is not None:
        raise ValueError(
            f"the record's hidden_states are {args.hidden_states.dtype}, for the kernel to bring to "
            f"{to.quant.name}, which this one does not do; pass them in the format "
            "(typed_moe.quantization.quantize_activation) and leave out to_format"
        )


def to_format_of(args: MoeArgs) -> ToFormat | None:
    """Into which format the record's activations are still to be brought."""
    if isinstance(args, Fp8PerTensorMoeArgs | Fp8BlockMoeArgs | Fp4MoeArgs):
        return args.to_format
    return None


def given_scale(args: Fp8BlockMoeArgs) -> Tensor:
    """`hidden_states_scale` of a record that is in the format."""
    assert args.hidden_states_scale is not None, "a record in the format has scales"
    return args.hidden_states_scale


def entry_point(family: Family, routing: type[FromLogits | Precomputed]) -> str:
    """FlashInfer's name of the function that a record is for."""
    return f"trtllm_{family}_{'moe' if routing is FromLogits else 'routed_moe'}"
