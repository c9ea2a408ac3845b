"""SGLang's calls to FlashInfer's trtllm MoE kernels, on a machine without a GPU.

SGLang's argument building runs as it is. In the place of what needs a GPU: the kernels (functions of
the same signature that give zeros, so that an argument they do not take fails as it would there),
the activation quantisers, the probe for programmatic dependent launch, and the registration of
SGLang's custom operators, which are registered for CUDA alone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import Tensor

from typed_moe import Nvfp4
from typed_moe.quantization import quantize_activation
from typed_moe.sglang._protocols import Function
from typed_moe.sglang._watch import ENTRY_POINTS

_OPERATORS = (
    "trtllm_fp8_block_scale_moe_out_wrapper",
    "trtllm_fp8_block_scale_routed_moe_out_wrapper",
    "trtllm_fp8_per_tensor_scale_moe_wrapper",
    "trtllm_fp8_per_tensor_scale_routed_moe_out_wrapper",
)


@functools.cache
def _operators_on_cpu() -> object:
    import sglang.srt.layers.moe.flashinfer_trtllm_moe as operators

    library = torch.library.Library("sglang", "IMPL", "CPU")  # type: ignore[no-untyped-call]  # torch's
    for name in _OPERATORS:
        library.impl(name, getattr(operators, name).__wrapped__)  # type: ignore[no-untyped-call]  # torch's
    return library


def _zeros(entry: str, real: Function) -> Function:
    signature = inspect.signature(inspect.unwrap(real))

    @functools.wraps(real)
    def kernel(*args: object, **kwargs: object) -> object:
        given = signature.bind(*args, **kwargs).arguments
        output, hidden = given.get("output"), given["hidden_states"]
        if output is None:
            rows = given["gemm2_weights"]
            width = rows.shape[1] if rows.dim() == 3 else hidden.shape[1]
            output = torch.zeros(hidden.shape[0], width, dtype=torch.bfloat16)
        else:
            output.zero_()
        return [output] if "fp4" in entry else output

    return kernel


def _blocks(x: Tensor, group: int, column_major_scales: bool = False) -> tuple[Tensor, Tensor]:
    """1 x 128 groups, amax / 448: SGLang's `per_token_group_quant_fp8`."""
    groups = x.float().reshape(x.shape[0], x.shape[1] // group, group)
    scale = groups.abs().amax(-1).clamp_min(1e-10) / 448.0
    data = (groups / scale[..., None]).flatten(1).to(torch.float8_e4m3fn)
    return data, scale.t().contiguous().t() if column_major_scales else scale


def _per_tensor(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn), scale


def _nvfp4(
    x: Tensor, inverse: Tensor, group: int, ue8m0: bool, swizzled: bool
) -> tuple[Tensor, Tensor]:
    assert (group, ue8m0, swizzled) == (16, False, False)
    found = quantize_activation(x, Nvfp4(), input_scale=1.0 / inverse.flatten()[0])
    assert found.scale is not None
    return found.data, found.scale.view(torch.uint8)


@contextmanager
def kernels_on_cpu() -> Iterator[None]:
    """SGLang may call the trtllm kernels."""
    import flashinfer
    import flashinfer.fused_moe
    import sglang.kernels.jit.utils as probes
    import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm as trtllm
    import sglang.srt.layers.quantization.modelopt_quant as modelopt

    _operators_on_cpu()
    with ExitStack() as stack:
        for entry in ENTRY_POINTS:
            kernel = _zeros(entry, getattr(flashinfer.fused_moe, entry))
            for module in (flashinfer.fused_moe, flashinfer):
                if hasattr(module, entry):
                    stack.enter_context(mock.patch.object(module, entry, kernel))
        for module, name, stand_in in (
            (trtllm, "per_token_group_quant_fp8", _blocks),
            (trtllm, "scaled_fp8_quant", _per_tensor),
            (modelopt, "scaled_fp8_quant", _per_tensor),
            (trtllm, "fp4_quantize", _nvfp4),
        ):
            stack.enter_context(mock.patch.object(module, name, stand_in))
        stack.enter_context(mock.patch.object(probes, "is_arch_support_pdl", return_value=True))
        yield
