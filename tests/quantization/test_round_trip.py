"""What goes in comes out, within half a step of the format's grid: properties, in float64.

The scales are checked for what the format says they are, the values for being the nearest the
grid has under that scale. Both are worked out by `grids.py`, which imports nothing of ours.
"""

from __future__ import annotations

import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

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
)
from typed_moe.quantization import (
    Quantized,
    calibration_scale,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
    quantize_weight,
)

SCALED: list[Format] = [
    Fp8PerTensor(),
    Fp8PerChannel(),
    Fp8BlockScale(),
    MxFp8(),
    MxFp4(),
    Nvfp4(),
    MxInt4(),
]
every_scaled = pytest.mark.parametrize("fmt", SCALED, ids=lambda fmt: str(fmt.name))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    """A (2, N, K) weight whose rows, and single values, differ wildly in size."""
    rows = draw(st.integers(1, 140))
    columns = 32 * draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    spread = draw(st.integers(0, 40))
    values = torch.randn(2, rows, columns, generator=generator)
    values *= torch.exp2(torch.randint(-spread, spread + 1, (2, rows, 1), generator=generator))
    kept = torch.rand(values.shape, generator=generator) < draw(st.sampled_from([1.0, 0.5, 0.02]))
    return values * kept * 2.0 ** draw(st.integers(-40, 40))


def _multiplier(q: Quantized, fmt: Format, shape: torch.Size) -> Tensor:
    """What each stored value is multiplied by, float64, from the scales alone."""
    assert q.scale is not None
    match fmt:
        case Fp8PerTensor():
            return q.scale.double()[..., None, None].expand(shape)
        case Fp8PerChannel():
            return q.scale.double()[..., None].expand(shape)
        case Fp8BlockScale():
            expanded = q.scale.double().repeat_interleave(128, -1).repeat_interleave(128, -2)
            return expanded[..., : shape[-2], : shape[-1]]
        case MxFp8() | MxFp4():
            return grids.e8m0(q.scale).repeat_interleave(32, -1)
        case MxInt4():
            return q.scale.double().repeat_interleave(32, -1)
        case _:
            assert q.global_scale is not None
            scale = q.scale.double() * q.global_scale.double()[..., None, None]
            return scale.repeat_interleave(16, -1)


def _grid(fmt: Format) -> Tensor:
    if isinstance(fmt, MxInt4):
        return grids.INT4
    return grids.E2M1 if isinstance(fmt, (MxFp4, Nvfp4)) else grids.E4M3


def _stored(q: Quantized, fmt: Format) -> Tensor:
    """The stored values without their scales, float64."""
    if isinstance(fmt, MxInt4):
        return grids.int4(q.data)
    return grids.e2m1(q.data) if q.data.dtype == torch.uint8 else q.data.double()


@every_scaled
@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_half_a_step(fmt: Format, weight: Tensor) -> None:
    """A value comes back within half a grid step, or saturated at the largest value."""
    q = quantize_weight(weight, fmt)
    back = dequantize_weight(q, fmt).double()
    multiplier = _multiplier(q, fmt, weight.shape)
    grid = _grid(fmt)

    scaled = weight.double() / multiplier
    half_step = grids.step(scaled, grid) / 2 * multiplier
    error = (back - weight.double()).abs()
    saturated = scaled.abs() >= grid[-1]
    rounding = weight.double().abs() * 2.0**-21  # of the float32 arithmetic

    assert bool((error <= half_step + rounding)[~saturated].all())
    largest = (grid[-1] * multiplier)[saturated]
    assert bool((back.abs()[saturated] - largest).abs().le(largest * 2.0**-22).all())


@every_scaled
@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_nearest_value(fmt: Format, weight: Tensor) -> None:
    """The stored value is the nearest of the grid, but for a quotient next to a tie."""
    q = quantize_weight(weight, fmt)
    grid = _grid(fmt)
    scaled = weight.double() / _multiplier(q, fmt, weight.shape)

    wrong = _stored(q, fmt) != grids.nearest(scaled, grid)

    assert not bool((wrong & ~grids.near_tie(scaled, grid)).any())


@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_float32_scales_are_amax_over_448(weight: Tensor) -> None:
    """Per matrix, row and 128x128 block, edges included; 1 where there are only zeros."""
    tensor, rows, block = (
        quantize_weight(weight, fmt).scale
        for fmt in (Fp8PerTensor(), Fp8PerChannel(), Fp8BlockScale())
    )
    assert tensor is not None
    assert rows is not None
    assert block is not None
    for expert in range(2):
        amax = float(weight[expert].abs().max())
        assert tensor[expert].item() == _float32(amax / 448 if amax else 1.0)
        of_rows = weight[expert].abs().amax(dim=1).tolist()
        assert rows[expert].tolist() == [_float32(a / 448 if a else 1.0) for a in of_rows]
        for row in range(block.shape[1]):
            for column in range(block.shape[2]):
                part = weight[
                    expert, row * 128 : row * 128 + 128, column * 128 : column * 128 + 128
                ]
                amax = float(part.abs().max())
                expected = _float32(amax / 448 if amax else 1.0)
                assert block[expert, row, column].item() == expected


@pytest.mark.parametrize(("fmt", "largest_exponent"), [(MxFp8(), 8), (MxFp4(), 2)])
@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_mx_scales_follow_the_floor_rule(
    fmt: Format, largest_exponent: int, weight: Tensor
) -> None:
    """2^(floor(log2(amax)) - emax), by frexp, for each group of 32."""
    q = quantize_weight(weight, fmt)
    assert q.scale is not None
    groups = weight.reshape(-1, 32).abs().amax(dim=1).tolist()

    expected = [math.frexp(amax)[1] - 1 - largest_exponent + 127 if amax else 0 for amax in groups]

    assert q.scale.flatten().tolist() == expected


@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_int4_scales_reach_7_or_minus_8(weight: Tensor) -> None:
    """max / 7 or -min / 8, rounded to bfloat16, for each group of 32; 1 for zeros."""
    q = quantize_weight(weight, MxInt4())
    assert q.scale is not None
    groups = weight.reshape(-1, 32)
    wanted = torch.maximum(groups.amax(dim=1) / 7, groups.amin(dim=1) / -8)

    expected = torch.where(wanted == 0, 1.0, wanted.clamp(min=2.0**-126)).bfloat16()

    assert torch.equal(q.scale.flatten(), expected)


@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_nvfp4_scales_have_two_levels(weight: Tensor) -> None:
    """amax / 2688 for each expert; amax / 6 over that, in E4M3 and never 0, for each group."""
    q = quantize_weight(weight, Nvfp4())
    assert q.scale is not None
    assert q.global_scale is not None
    amax = weight.double().abs().amax(dim=(1, 2))

    wanted = weight.double().abs().reshape(2, -1, 16).amax(dim=2) / 6
    wanted = (wanted / q.global_scale.double()[:, None]).clamp(min=2.0**-9)
    wrong = q.scale.reshape(2, -1).double() != grids.nearest(wanted, grids.E4M3)

    expected = torch.where(amax == 0, 1.0, amax / 2688)
    assert torch.equal(q.global_scale, expected.float())
    assert not bool((wrong & ~grids.near_tie(wanted, grids.E4M3)).any())


@pytest.mark.parametrize(
    "fmt", [Fp8PerChannel(), Fp8BlockScale(), MxFp8(), MxFp4(activation="mxfp8"), Nvfp4()]
)
@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_activations_are_rows_of_weights(fmt: Format, weight: Tensor) -> None:
    """An activation's row is quantised as a weight's row is where both have groups in a row."""
    x = weight[0]
    static = calibration_scale(x.abs().max(), fmt) if isinstance(fmt, Nvfp4) else None
    as_weight = MxFp8() if isinstance(fmt, MxFp4) else fmt

    q = quantize_activation(x, fmt, input_scale=static)

    if isinstance(fmt, Fp8BlockScale):
        x = x[:, None]  # matrices of one row: a block of theirs is 1x128
    expected = quantize_weight(x, as_weight)
    back = dequantize_weight(expected, as_weight)

    assert torch.equal(q.data.view(torch.uint8), expected.data.view(torch.uint8).view(q.data.shape))
    assert torch.equal(dequantize_activation(q, fmt), back.view(weight[0].shape))


@hypothesis.given(weight=matrices())
@hypothesis.settings(max_examples=8)
def test_static_fp8_activation(weight: Tensor) -> None:
    """A static scale divides every value, and what it does not cover saturates at 448."""
    x = weight[0]
    static = calibration_scale(x.abs().max() / 4, Fp8PerTensor())

    back = dequantize_activation(
        quantize_activation(x, Fp8PerTensor(), input_scale=static), Fp8PerTensor()
    )

    scaled = x.double() / static.double()
    expected = grids.nearest(scaled, grids.E4M3) * static.double()
    close = (back.double() - expected).abs() <= expected.abs() * 2.0**-22
    assert bool((close | grids.near_tie(scaled, grids.E4M3)).all())
    assert back.abs().max().item() <= 448 * static.item() * (1 + 2.0**-23)


@pytest.mark.parametrize("fmt", list(FORMATS.values()), ids=lambda fmt: str(fmt.name))
def test_round_trip_is_idempotent(fmt: Format) -> None:
    """Values that the format holds come back as they are, scales and all."""
    weight = torch.randn(2, 130, 288)
    once = dequantize_weight(quantize_weight(weight, fmt), fmt)

    twice = dequantize_weight(quantize_weight(once, fmt), fmt)

    assert torch.allclose(once, twice, rtol=2.0**-22, atol=0.0)


def test_bf16_rounds_to_even() -> None:
    """1 + 2^-8 is half way, and goes to 1; 1 + 3 * 2^-8 goes to 1 + 2^-6."""
    weight = torch.tensor([[1 + 2.0**-8, 1 + 3 * 2.0**-8]])

    assert quantize_weight(weight, Bf16()).data.tolist() == [[1.0, 1 + 2.0**-6]]


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()
