"""Weights at the edges: shapes, zeros, extremes, memory, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from tests.quantization import grids
from typed_moe.config import (
    FORMATS,
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
)
from typed_moe.quantization import Quantized, dequantize_weight, quantize_weight

every_format = pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda fmt: str(fmt.name))
SCALES: list[tuple[Format, torch.dtype, torch.dtype, tuple[int, ...]]] = [
    (Fp8PerTensor(), torch.float8_e4m3fn, torch.float32, (3,)),
    (Fp8PerChannel(), torch.float8_e4m3fn, torch.float32, (3, 200)),
    (Fp8BlockScale(), torch.float8_e4m3fn, torch.float32, (3, 2, 3)),
    (MxFp8(), torch.float8_e4m3fn, torch.uint8, (3, 200, 9)),
    (MxFp4(), torch.uint8, torch.uint8, (3, 200, 9)),
    (Nvfp4(), torch.uint8, torch.float8_e4m3fn, (3, 200, 18)),
    (MxInt4(), torch.uint8, torch.bfloat16, (3, 200, 9)),
]


@pytest.mark.parametrize(("fmt", "data", "scale", "shape"), SCALES)
def test_shapes_and_dtypes(
    fmt: Format, data: torch.dtype, scale: torch.dtype, shape: tuple[int, ...]
) -> None:
    """Each format's tensors have the shapes and dtypes of docs/formats.md."""
    q = quantize_weight(torch.randn(3, 200, 288), fmt)
    assert q.scale is not None

    assert q.data.dtype == data
    assert q.data.shape == (3, 200, 144 if data == torch.uint8 else 288)
    assert q.scale.dtype == scale
    assert q.scale.shape == shape
    assert (q.global_scale is not None) == isinstance(fmt, Nvfp4)
    if q.global_scale is not None:
        assert q.global_scale.dtype == torch.float32
        assert q.global_scale.shape == (3,)


def test_without_scales() -> None:
    """`Unquantized` is the weight itself; `Bf16` is its bfloat16."""
    weight = torch.randn(2, 3, 5)

    assert quantize_weight(weight, Unquantized()).data is weight
    assert torch.equal(quantize_weight(weight, Bf16()).data, weight.bfloat16())


@every_format
def test_each_expert_on_its_own(fmt: Format) -> None:
    """A stack is its matrices side by side, whatever the leading dimensions and strides."""
    weight = torch.randn(2, 3, 140, 160) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    stacked = dequantize_weight(quantize_weight(weight, fmt), fmt)
    strided = weight.transpose(-1, -2).contiguous().transpose(-1, -2)

    for first in range(2):
        for second in range(3):
            alone = dequantize_weight(quantize_weight(weight[first, second], fmt), fmt)
            assert torch.equal(stacked[first, second], alone)
    assert torch.equal(stacked, dequantize_weight(quantize_weight(strided, fmt), fmt))


@every_format
def test_chunks_join(fmt: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 128 rows give what one chunk gives, a ragged last one included."""
    weight = torch.randn(2, 300, 160)
    whole = quantize_weight(weight, fmt)
    back = dequantize_weight(whole, fmt)

    monkeypatch.setattr("typed_moe.quantization._weights._CHUNK_VALUES", 1)
    chunked = quantize_weight(weight, fmt)

    assert torch.equal(whole.data.view(torch.uint8), chunked.data.view(torch.uint8))
    if whole.scale is not None and chunked.scale is not None:
        assert torch.equal(whole.scale.view(torch.uint8), chunked.scale.view(torch.uint8))
    assert torch.equal(back, dequantize_weight(chunked, fmt))


@every_format
def test_all_zeros(fmt: Format) -> None:
    """Zeros come back as zeros, under scales that are finite and not 0."""
    q = quantize_weight(torch.zeros(2, 130, 160), fmt)

    assert not bool(dequantize_weight(q, fmt).any())
    for scale in (q.scale, q.global_scale):
        if scale is not None and scale.dtype != torch.uint8:
            assert bool(scale.float().isfinite().all())
            assert bool((scale.float() > 0).all())
    if q.scale is not None and q.scale.dtype == torch.uint8:
        assert not bool((q.scale == 255).any())


@every_format
@pytest.mark.parametrize("size", [1e-38, 3e-45, 3e38])
def test_extremes_stay_finite(fmt: Format, size: float) -> None:
    """The smallest and the largest float32 values come back finite, within half a grid step."""
    weight = torch.full((1, 128, 128), size)
    weight[0, 0, 0] = -size

    back = dequantize_weight(quantize_weight(weight, fmt), fmt)

    assert bool(back.isfinite().all())
    half_step = 2.0**-2 if isinstance(fmt, (MxFp4, MxInt4, Nvfp4)) else 2.0**-4
    assert bool((back.abs() <= weight.abs() * (1 + half_step) + 2.0**-136).all())
    assert back[0, 0, 0] <= 0


def test_mx_saturates_above_the_largest_value() -> None:
    """The floor rule leaves 7.9 over a scale of 1: E2M1 holds 6; E4M3 holds 448 of 511."""
    fp4, fp8 = torch.full((1, 32), 7.9), torch.full((1, 32), -511.0)

    assert dequantize_weight(quantize_weight(fp4, MxFp4()), MxFp4())[0, 0] == 6.0
    assert dequantize_weight(quantize_weight(fp8, MxFp8()), MxFp8())[0, 0] == -448.0


def test_int4_uses_both_ends() -> None:
    """The scale is the larger of max / 7 and -min / 8, in bfloat16, for each group of 32."""
    weight = torch.linspace(-1.0, 1.0, 96)[None]
    weight[0, 32:64] = torch.linspace(-16.0, 3.5, 32)
    weight[0, 64:] = torch.linspace(-8.0, 14.0, 32)
    q = quantize_weight(weight, MxInt4())
    assert q.scale is not None
    values = grids.int4(q.data)

    assert q.scale[0].tolist() == [torch.tensor(1 / 8).bfloat16().item(), 2.0, 2.0]
    assert (values[0, 32].item(), values[0, 63].item()) == (-8.0, 2.0)  # 1.75 is nearer to 2
    assert (values[0, 64].item(), values[0, 95].item()) == (-4.0, 7.0)


def test_int4_is_rounded_under_the_scale_as_stored() -> None:
    """amax / 7 = 1.0067 is stored as 1.0078: 5.541 is 5.498 of those, and 5.504 of the former."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 1] = 7 * 1.0067, 5.541

    assert grids.int4(quantize_weight(weight, MxInt4()).data)[0, :2].tolist() == [7.0, 5.0]


def test_nvfp4_group_far_below_the_matrix() -> None:
    """A group too small for E4M3's scales keeps the smallest of them, and turns to zeros."""
    weight = torch.full((1, 32), 1.0)
    weight[0, 16:] = 1e-9
    q = quantize_weight(weight, Nvfp4())
    assert q.scale is not None

    assert q.scale.float().tolist() == [[448.0, 2.0**-9]]
    assert dequantize_weight(q, Nvfp4())[0, 16:].tolist() == [0.0] * 16


@every_format
def test_no_experts(fmt: Format) -> None:
    """A rank that holds no expert has an empty stack, and gets one back."""
    q = quantize_weight(torch.empty(0, 128, 128), fmt)

    assert dequantize_weight(q, fmt).shape == (0, 128, 128)


@every_format
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_weights_are_refused(fmt: Format, value: float) -> None:
    """A NaN or an infinity is an error that names the expert."""
    weight = torch.randn(4, 32, 32)
    weight[2, 5, 7] = value

    with pytest.raises(ValueError, match=r"NaN, an infinity .* matrices \[2\]"):
        quantize_weight(weight, fmt)


@pytest.mark.parametrize(
    ("fmt", "group"), [(MxFp8(), 32), (MxFp4(), 32), (Nvfp4(), 16), (MxInt4(), 32)]
)
def test_ragged_groups_are_refused(fmt: Format, group: int) -> None:
    """K not in whole groups is an error with K, the group, and what to pad to."""
    with pytest.raises(ValueError, match=rf"K = 40; .* multiple of {group}\. Pad K to (48|64)"):
        quantize_weight(torch.randn(1, 4, 40), fmt)


@every_format
@pytest.mark.parametrize("shape", [(64,), (2, 0, 64), (2, 64, 0)], ids=str)
def test_no_matrix_is_refused(fmt: Format, shape: tuple[int, ...]) -> None:
    """A vector, or a matrix without rows or columns, is an error that shows the shape."""
    with pytest.raises(ValueError, match=r"has shape"):
        quantize_weight(torch.empty(shape), fmt)


@every_format
def test_integers_are_refused(fmt: Format) -> None:
    """Packed codes are no weight to quantise."""
    with pytest.raises(TypeError, match=r"weight is torch\.uint8; allowed: float32"):
        quantize_weight(torch.zeros(1, 32, 32, dtype=torch.uint8), fmt)


@pytest.mark.parametrize("fmt", [case[0] for case in SCALES], ids=lambda fmt: str(fmt.name))
def test_dequantize_refuses_what_does_not_fit(fmt: Format) -> None:
    """Missing, misshapen or wrongly typed parts are errors, not broadcasts."""
    q = quantize_weight(torch.randn(2, 128, 128), fmt)
    assert q.scale is not None

    with pytest.raises(ValueError, match=r"scale is None; the format"):
        dequantize_weight(replace(q, scale=None), fmt)
    with pytest.raises(ValueError, match=r"scale has shape"):
        dequantize_weight(replace(q, scale=q.scale[:1]), fmt)
    with pytest.raises(ValueError, match=r"dtype torch\.float16"):
        dequantize_weight(replace(q, scale=q.scale.to(torch.float16)), fmt)
    with pytest.raises(ValueError, match=r"data is torch\.float32; the format .* stores"):
        dequantize_weight(Quantized(data=torch.randn(2, 128, 128), scale=q.scale), fmt)


@pytest.mark.parametrize("global_scale", [None, torch.ones(3)])
def test_nvfp4_needs_its_global_scale(global_scale: Tensor | None) -> None:
    """One second-level scale for each matrix, or an error that names the checkpoint's tensor."""
    q = quantize_weight(torch.randn(2, 16, 32), Nvfp4())

    with pytest.raises(ValueError, match=r"global_scale is .* \(2,\) \(`weight_scale_2`"):
        dequantize_weight(replace(q, global_scale=global_scale), Nvfp4())


@every_format
def test_no_float32_copy_of_the_stack(fmt: Format) -> None:
    """Nothing larger than a 4 MiB chunk is allocated beside the result, says the profiler."""
    weight = torch.randn(2, 1280, 2048).to(torch.bfloat16)

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        q = quantize_weight(weight, fmt)

    largest = max(event.self_cpu_memory_usage for event in profiler.events())
    assert largest <= max(4 << 20, q.data.nbytes)
    assert 4 * weight.numel() > max(4 << 20, q.data.nbytes)
