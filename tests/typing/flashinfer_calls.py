"""Calls of FlashInfer through its stub. Never executed: read by mypy and pyright.

To a checker the library's own entry points are `Any`, and take any argument. The stub is what makes
a wrong name, a missing argument and a wrong type visible.
"""

from __future__ import annotations

from typing import assert_type

import flashinfer
from flashinfer.fused_moe import (
    ActivationType,
    Fp8QuantizationType,
    RoutingMethodType,
    WeightLayout,
    convert_to_block_layout,
    reorder_rows_for_gated_act_gemm,
    trtllm_bf16_moe,
    trtllm_bf16_routed_moe,
    trtllm_fp4_block_scale_moe,
    trtllm_fp8_block_scale_moe,
    trtllm_fp8_per_channel_scale_routed_moe,
    trtllm_fp8_per_tensor_scale_moe,
    trtllm_mxint4_block_scale_moe,
)
from flashinfer.fused_moe.core import get_w2_permute_indices_with_cache
from flashinfer.tllm_enums import RoutingInputMode, SfLayout
from flashinfer.utils import get_shuffle_matrix_a_row_indices
from torch import Tensor

assert_type(flashinfer.__version__, str)

# --- from logits, and routed ---


def from_logits(x: Tensor) -> None:
    """A bare tensor or a list: to be told apart at the call."""
    result = trtllm_bf16_moe(
        routing_logits=x,
        routing_bias=None,
        hidden_states=x,
        gemm1_weights=x,
        gemm2_weights=x,
        num_experts=128,
        top_k=8,
        n_group=None,
        topk_group=None,
        intermediate_size=768,
        local_expert_offset=0,
        local_num_experts=128,
        routing_method_type=RoutingMethodType.Renormalize,
        weight_layout=WeightLayout.BlockMajorK,
        activation_type=ActivationType.Swiglu,
    )
    assert_type(result, list[Tensor] | Tensor)


def routed(ids: Tensor, weights: Tensor, x: Tensor) -> None:
    """Packed in one tensor, or as a tuple."""
    trtllm_bf16_routed_moe(ids, x, x, x, 128, 8, None, None, 768, 0, 128)
    trtllm_bf16_routed_moe((ids, weights), x, x, x, 128, 8, None, None, 768, 0, 128)
    # FlashInfer asks isinstance(topk_ids, tuple).
    trtllm_bf16_routed_moe(
        [ids, weights],  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        x,
        x,
        x,
        128,
        8,
        None,
        None,
        768,
        0,
        128,
    )


def packed_only(ids: Tensor, weights: Tensor, x: Tensor) -> None:
    """One of the routed entry points that take no tuple."""
    trtllm_fp8_per_channel_scale_routed_moe(
        (ids, weights),  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
        *(None, x, x, x, x, x, x, x, x, x),
        num_experts=128,
        top_k=8,
        n_group=None,
        topk_group=None,
        intermediate_size=768,
        local_expert_offset=0,
        local_num_experts=128,
        routed_scaling_factor=None,
    )


def lists(x: Tensor) -> None:
    """The FP4 and the int4 entry points give a list already."""
    fp4 = trtllm_fp4_block_scale_moe(
        *(x, None, x, x, x, x, None, None, None, None, x, x, None, None, None, None),
        *(128, 8, None, None, 768, 0, 128, None),
        hidden_states_scale_layout=SfLayout.layout_linear,
    )
    assert_type(fp4, list[Tensor])
    int4 = trtllm_mxint4_block_scale_moe(
        *(x, None, x, x, x, None, None, None, x, x),
        *(128, 8, None, None, 768, 0, 128, None),
        do_finalize=False,
    )
    assert_type(int4, list[Tensor])


# --- what the decorated originals would let through ---


def wrong(x: Tensor) -> None:
    """An argument that does not exist, one that is left out, one of another entry point."""
    trtllm_bf16_moe(  # type: ignore[call-arg]
        *(x, None, x, x, x, 128, 8, None, None, 768, 0, 128),
        nonsense=3,  # pyright: ignore[reportCallIssue]
    )
    trtllm_bf16_moe(  # type: ignore[call-arg]
        *(x, None, x, x, x, 128, 8, None, None, 768, 0, 128),
        gated_act_type=0,  # pyright: ignore[reportCallIssue]
    )
    trtllm_bf16_moe(
        *(x, None, x, x, x, 128, 8, None, None, 768, 0, 128),
        routing_method_type="Renormalize",  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    )
    # Only the per-tensor and the per-channel entry points have the flag, and ask for it.
    trtllm_bf16_moe(  # type: ignore[call-arg]
        *(x, None, x, x, x, 128, 8, None, None, 768, 0, 128),
        use_routing_scales_on_input=True,  # pyright: ignore[reportCallIssue]
    )
    trtllm_fp8_per_tensor_scale_moe(  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
        *(x, None, x, x, x, x, x, x, 128, 8, None, None, 768, 0, 128, None),
    )
    # A None that the other entry points take.
    trtllm_bf16_moe(
        *(x, None, x, x, x, 128, 8, None, None, 768, 0, 128),
        enable_pdl=None,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    )


def block(x: Tensor) -> None:
    """Two of the block entry point's arguments are by name only."""
    trtllm_fp8_block_scale_moe(
        *(x, None, x, x, x, x, x, x, 128, 8, None, None, 768, 0, 128, None),
        fp8_quantization_type=Fp8QuantizationType.MxFp8,
        gemm1_bias=x,
    )
    trtllm_fp8_block_scale_moe(
        *(x, None, x, x, x, x, x, x, 128, 8, None, None, 768, 0, 128, None),
        fp8_quantization_type=WeightLayout.MajorK,  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    )


# A name that a release does not have is an error here, and looked up by name at run time.
RoutingMethodType.SqrtSoftplus  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
RoutingInputMode.FromIds  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]

# --- quantisers and layouts ---


def quantisers(x: Tensor) -> None:
    """Values and scales; the per-token form has one scale more."""
    assert_type(flashinfer.mxfp8_quantize(x, is_sf_swizzled_layout=False), tuple[Tensor, Tensor])
    assert_type(flashinfer.fp4_quantize(x, x, is_sf_swizzled_layout=False), tuple[Tensor, Tensor])
    assert_type(flashinfer.nvfp4_quantize(x, 1.0), tuple[Tensor, Tensor])
    assert_type(
        flashinfer.nvfp4_quantize(x, x, per_token_activation=True), tuple[Tensor, Tensor, Tensor]
    )
    flashinfer.mxfp8_quantize(x, backend="triton")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    flashinfer.mxfp8_quantize(x, sf_layout=SfLayout.layout_8x4)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]


def layouts(x: Tensor) -> None:
    """Each gives a tensor."""
    cache: dict[tuple[object, ...], Tensor] = {}
    assert_type(reorder_rows_for_gated_act_gemm(x), Tensor)
    assert_type(convert_to_block_layout(x, 128), Tensor)
    assert_type(get_shuffle_matrix_a_row_indices(x, 128), Tensor)
    assert_type(get_w2_permute_indices_with_cache(cache, x, 128, num_elts_per_sf=16), Tensor)
    assert_type(flashinfer.shuffle_matrix_a(x, 128), Tensor)
    assert_type(flashinfer.shuffle_matrix_sf_a(x, 128), Tensor)
    assert_type(flashinfer.block_scale_interleave(x, out=None), Tensor)
    assert_type(flashinfer.nvfp4_block_scale_interleave(x), Tensor)
    flashinfer.block_scale_interleave(x, x)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
