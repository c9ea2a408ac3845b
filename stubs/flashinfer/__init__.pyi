# Quantisers of activations, and helpers that lay weights out. They are here in every release since
# 0.5.0; the modules that define them have moved.

from typing import Literal, overload

from flashinfer.fused_moe import reorder_rows_for_gated_act_gemm as reorder_rows_for_gated_act_gemm
from flashinfer.tllm_enums import SfLayout as SfLayout
from torch import Tensor

__version__: str

# `nvfp4_4over6` also takes a recipe; without one, FlashInfer reads environment variables.
def fp4_quantize(
    input: Tensor,
    global_scale: Tensor | None = None,
    sf_vec_size: int = 16,
    sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True,
    is_sf_8x4_layout: bool = False,
    is_global_scale_inversed: bool = False,
    enable_pdl: bool | None = None,
    backend: Literal["cuda", "cute-dsl"] = "cuda",
    nvfp4_4over6: None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def nvfp4_quantize(
    a: Tensor,
    a_global_sf: Tensor | float,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: Literal["cuda", "cute-dsl", "cake"] = "cuda",
    per_token_activation: Literal[False] = False,
    expanded_idx_to_permuted_idx: Tensor | None = None,
    out_scale: Tensor | None = None,
    nvfp4_4over6: None = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def nvfp4_quantize(
    a: Tensor,
    a_global_sf: Tensor | float,
    sfLayout: SfLayout = SfLayout.layout_128x4,
    do_shuffle: bool = False,
    sf_vec_size: int = 16,
    enable_pdl: bool | None = None,
    backend: Literal["cuda", "cute-dsl", "cake"] = "cuda",
    *,
    per_token_activation: Literal[True],
    expanded_idx_to_permuted_idx: Tensor | None = None,
    out_scale: Tensor | None = None,
    nvfp4_4over6: None = ...,
) -> tuple[Tensor, Tensor, Tensor]: ...
def mxfp8_quantize(
    input: Tensor,
    is_sf_swizzled_layout: bool = True,
    alignment: int = 32,
    enable_pdl: bool | None = None,
    backend: Literal["cuda", "cute-dsl"] = "cuda",
    sf_swizzle_layout: SfLayout | None = None,
) -> tuple[Tensor, Tensor]: ...
def block_scale_interleave(unswizzled_sf: Tensor, *, out: Tensor | None = None) -> Tensor: ...

nvfp4_block_scale_interleave = block_scale_interleave

def shuffle_matrix_a(input_tensor: Tensor, epilogue_tile_m: int) -> Tensor: ...
def shuffle_matrix_sf_a(
    input_tensor: Tensor, epilogue_tile_m: int, num_elts_per_sf: int = 16
) -> Tensor: ...
