"""Agreement with torchao 0.18, an implementation that shares nothing with ours.

Bit for bit where the conventions are the same. They differ in six places, each left out by
name below and covered against float64 in `test_round_trip.py` and `test_weights.py`:

* A block of zeros under float32 scales: torchao's scale is 0 and its data 0/0 = NaN; ours is 1.
* An MX group whose byte is 0: torchao divides by 2^-126 but stores the byte of 2^-127, so that
  its own round trip halves or doubles such a group. The bytes agree, the data cannot.
* NVFP4 group scales under 2^-6: torchao holds them at 2^-6, the smallest normal E4M3; ModelOpt,
  the CUDA kernels and we use the subnormals.
* NVFP4 under a global scale below 2^-126: torchao's reciprocal of it is infinite; ours stays at
  2^-126.
* NVFP4 data: torchao multiplies by two reciprocals (three roundings), we divide once. They may
  differ where the exact quotient is a few float32 roundings from a tie, and only there.
* int4: torchao multiplies by the scale's reciprocal, with the same consequence, and gives a group
  of zeros the smallest scale that it is told to.
"""

from __future__ import annotations

import importlib
import os
import warnings
from types import ModuleType
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests.quantization import grids
from typed_moe.config import (
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
)
from typed_moe.quantization import quantize_activation, quantize_weight

ROWS, COLUMNS = 256, 256


def _torchao(name: str) -> ModuleType:
    """A module of torchao, which warns on import and has CUDA libraries to load."""
    with warnings.catch_warnings(), mock.patch.dict(os.environ):
        os.environ["TORCHAO_FORCE_SKIP_LOADING_SO_FILES"] = "1"
        warnings.simplefilter("ignore")
        return importlib.import_module(f"torchao.{name}")


mx = _torchao("prototype.mx_formats.mx_tensor")
nvfp4 = _torchao("prototype.mx_formats.nvfp4_tensor")
primitives = _torchao("quantization.quant_primitives")


def _inputs() -> dict[str, Tensor]:
    """Matrices of every size of value: what a checkpoint may hold, and worse."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(ROWS, COLUMNS, generator=generator)
    outlier, zeros, mixed = normal.clone(), normal.clone(), normal.clone()
    outlier[::7, ::50] *= 1e4
    zeros[128:, :128] = 0.0
    zeros[3] = 0.0
    mixed *= torch.exp2(torch.randint(-60, 60, (ROWS, 1), generator=generator))
    return {
        "normal": normal,
        "bfloat16": normal.to(torch.bfloat16),
        "tiny": normal * 1e-30,
        "subnormal": normal * 1e-38,
        "huge": normal * 1e37,
        "outlier": outlier,
        "zeros": zeros,
        "mixed": mixed,
    }


INPUTS = _inputs()
every_input = pytest.mark.parametrize("name", list(INPUTS))


BLOCKS: dict[tuple[int, int], Format] = {
    (128, 128): Fp8BlockScale(),
    (1, COLUMNS): Fp8PerChannel(),
    (ROWS, COLUMNS): Fp8PerTensor(),
}


def _same_bits(left: Tensor, right: Tensor) -> bool:
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))


@every_input
@pytest.mark.parametrize("block", [(128, 128), (1, 128), (1, COLUMNS), (ROWS, COLUMNS)], ids=str)
def test_fp8_with_float32_scales(name: str, block: tuple[int, int]) -> None:
    """Scales and data of 128x128, 1x128, whole rows and tensors, where torchao's is not 0."""
    values = INPUTS[name].float()
    scale = primitives._choose_scale_float8(values, list(block))
    data = primitives._quantize_affine_float8(values, scale)
    if block == (1, 128):
        ours = quantize_activation(INPUTS[name], Fp8BlockScale())
    else:
        ours = quantize_weight(INPUTS[name], BLOCKS[block])
    assert ours.scale is not None

    normal = scale >= torch.finfo(torch.float32).tiny
    there = normal.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)

    assert torch.equal(ours.scale.reshape(scale.shape)[normal], scale[normal])
    assert _same_bits(ours.data[there], data[there])
    assert bool(normal.all()) or name in {"zeros", "subnormal"}


@every_input
def test_mxfp8(name: str) -> None:
    """Exponent bytes everywhere, data wherever the byte is not 0; weight and activation."""
    scale, data = mx.to_mx(INPUTS[name], torch.float8_e4m3fn, 32)
    there = (scale.view(torch.uint8) > 0).repeat_interleave(32, 1)

    for ours in (
        quantize_weight(INPUTS[name], MxFp8()),
        quantize_activation(INPUTS[name], MxFp8()),
        quantize_activation(INPUTS[name], MxFp4(activation="mxfp8")),
    ):
        assert ours.scale is not None
        assert torch.equal(ours.scale, scale.view(torch.uint8))
        assert _same_bits(ours.data[there], data[there])
    assert bool(there.all()) or name in {"zeros", "subnormal"}


@every_input
def test_mxfp4(name: str) -> None:
    """Exponent bytes everywhere, packed data wherever the byte is not 0."""
    scale, data = mx.to_mx(INPUTS[name], torch.float4_e2m1fn_x2, 32)
    there = (scale.view(torch.uint8) > 0).repeat_interleave(16, 1)

    ours = quantize_weight(INPUTS[name], MxFp4())

    assert ours.scale is not None
    assert torch.equal(ours.scale, scale.view(torch.uint8))
    assert torch.equal(ours.data[there], data[there])
    assert bool(there.all()) or name in {"zeros", "subnormal"}


@every_input
def test_mxint4(name: str) -> None:
    """Scales and data of 1x32 groups, by torchao's symmetric rule that clips nothing."""
    values, block = INPUTS[name].float(), (1, 32)
    scale, zero_point = primitives.choose_qparams_affine(
        values,
        primitives.MappingType.SYMMETRIC_NO_CLIPPING_ERR,
        block,
        torch.int8,
        quant_min=-8,
        quant_max=7,
        eps=2.0**-126,
        scale_dtype=torch.bfloat16,
        zero_point_dtype=torch.int8,
    )
    data = primitives.quantize_affine(
        values, block, scale.float(), zero_point, torch.int8, quant_min=-8, quant_max=7
    )
    there = (values.reshape(ROWS, -1, 32) != 0).any(dim=-1)

    ours = quantize_weight(INPUTS[name], MxInt4())
    assert ours.scale is not None
    tie = grids.near_tie(values.double() / scale.double().repeat_interleave(32, 1), grids.INT4)
    difference = (grids.int4(ours.data) - data.double()).abs()

    assert torch.equal(ours.scale[there], scale[there])
    assert not bool(difference[~tie].any())
    assert int(difference.max()) <= 1


@pytest.mark.parametrize("name", sorted(set(INPUTS) - {"subnormal"}))
def test_nvfp4(name: str) -> None:
    """Group scales of 2^-6 and more bit for bit; their data but for what is next to a tie."""
    values = INPUTS[name].float()
    global_scale = values.abs().amax() / (6.0 * 448.0)
    scale, data = nvfp4.nvfp4_quantize(INPUTS[name], 16, global_scale)

    for ours in (
        quantize_weight(INPUTS[name], Nvfp4()),
        quantize_activation(INPUTS[name], Nvfp4(), input_scale=global_scale),
    ):
        assert ours.scale is not None
        assert ours.global_scale is not None
        normal = ours.scale.float() >= 2.0**-6
        multiplier = scale.double().repeat_interleave(16, 1) * global_scale.double()
        tie = grids.near_tie(values.double() / multiplier, grids.E2M1)
        there = normal.repeat_interleave(16, 1)
        difference = (grids.codes(ours.data) - grids.codes(data))[there].abs()

        assert ours.global_scale.item() == global_scale.item()
        assert _same_bits(ours.scale[normal], scale[normal])
        assert not bool(difference[~tie[there]].any())
        assert int(difference.max()) <= 1
        # A bfloat16 input has some exact ties: its values are few-digit ratios of its amax.
        assert float(tie.double().mean()) < 0.005
        assert bool(normal.all()) or name in {"zeros", "mixed", "outlier"}
