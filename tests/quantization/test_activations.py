"""Activations at run time: no synchronisation, no graph break, and the edges."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

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
from typed_moe.quantization import (
    calibration_scale,
    dequantize_activation,
    quantize_activation,
)

EVERY: list[Format] = [*FORMATS.values(), MxFp4(activation="mxfp8")]
STATIC = (Fp8PerTensor, Nvfp4)
every_format = pytest.mark.parametrize("fmt", EVERY, ids=str)


def _scale(x: Tensor, fmt: Format) -> Tensor | None:
    """The static scale where the format has one."""
    return calibration_scale(x.abs().amax(), fmt) if isinstance(fmt, STATIC) else None


@pytest.mark.parametrize(
    ("fmt", "columns", "data", "scale"),
    [
        (Unquantized(), 160, torch.float32, None),
        (Bf16(), 160, torch.bfloat16, None),
        (Fp8PerTensor(), 160, torch.float8_e4m3fn, ()),
        (Fp8PerChannel(), 160, torch.float8_e4m3fn, (5, 1)),
        (Fp8BlockScale(), 160, torch.float8_e4m3fn, (5, 2)),
        (MxFp8(), 160, torch.float8_e4m3fn, (5, 5)),
        (MxFp4(), 160, torch.bfloat16, None),
        (MxInt4(), 160, torch.bfloat16, None),
        (MxFp4(activation="mxfp8"), 160, torch.float8_e4m3fn, (5, 5)),
        (Nvfp4(), 80, torch.uint8, (5, 10)),
    ],
    ids=str,
)
def test_shapes_and_dtypes(
    fmt: Format, columns: int, data: torch.dtype, scale: tuple[int, ...] | None
) -> None:
    """Each format's activation has the shapes and dtypes of docs/formats.md, in C order."""
    x = torch.randn(5, 160)

    q = quantize_activation(x, fmt, input_scale=_scale(x, fmt))

    assert q.data.shape == (5, columns)
    assert q.data.dtype == data
    assert q.data.is_contiguous()
    assert (None if q.scale is None else tuple(q.scale.shape)) == scale
    assert dequantize_activation(q, fmt).dtype == torch.float32


@every_format
def test_no_host_synchronisation(fmt: Format) -> None:
    """Fake tensors hold no values, so that reading one back to the host would raise."""
    with FakeTensorMode():
        x = torch.empty(7, 160, dtype=torch.bfloat16)
        q = quantize_activation(x, fmt, input_scale=_scale(x, fmt))
        back = dequantize_activation(q, fmt)

    assert back.shape == (7, 160)


@every_format
def test_compiles_without_a_graph_break(fmt: Format) -> None:
    """One graph, with the eager result."""
    x = torch.randn(4, 256)
    scale = _scale(x, fmt)

    def round_trip(x: Tensor) -> Tensor:
        return dequantize_activation(quantize_activation(x, fmt, input_scale=scale), fmt)

    torch.compiler.reset()  # there are more formats than recompilations allowed
    compiled = torch.compile(round_trip, backend="eager", fullgraph=True)

    assert torch.equal(compiled(x), round_trip(x))


@every_format
def test_no_tokens(fmt: Format) -> None:
    """T = 0 gives an empty result of the right width."""
    x = torch.empty(0, 160)
    scale = torch.tensor(0.5) if isinstance(fmt, STATIC) else None

    q = quantize_activation(x, fmt, input_scale=scale)

    assert dequantize_activation(q, fmt).shape == (0, 160)


@every_format
def test_zeros_and_tiny_rows(fmt: Format) -> None:
    """A row of zeros, and one of the smallest float32, leave finite values behind."""
    x = torch.randn(3, 160)
    x[0], x[1] = 0.0, 1e-45

    back = dequantize_activation(quantize_activation(x, fmt, input_scale=_scale(x, fmt)), fmt)

    assert not bool(back[0].any())
    assert bool(back.isfinite().all())
    assert back[1].abs().max() <= 1e-40


@pytest.mark.parametrize("fmt", [Fp8BlockScale(), MxFp8(), MxFp4(activation="mxfp8")], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_spoil_their_group_only(fmt: Format, value: float) -> None:
    """A NaN or an infinity makes its own group NaN, which shows, and no other."""
    x = torch.randn(2, 256)
    x[0, 3] = value

    back = dequantize_activation(quantize_activation(x, fmt), fmt)

    assert bool(back[0, 3].isnan())
    assert bool(back[0, 128:].isfinite().all())
    assert bool(back[1].isfinite().all())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_spoil_their_token_only(value: float) -> None:
    """Where a token has one scale, the whole of it shows."""
    x = torch.randn(2, 256)
    x[0, 3] = value

    back = dequantize_activation(quantize_activation(x, Fp8PerChannel()), Fp8PerChannel())

    assert bool(back[0, 3].isnan())
    assert not bool(back[0].isfinite().any())
    assert bool(back[1].isfinite().all())


def test_static_scales_saturate_infinity_and_keep_nan() -> None:
    """Under a static scale an infinity is the largest value, a NaN stays NaN."""
    x = torch.ones(1, 32)
    x[0, 0], x[0, 16] = torch.inf, torch.nan
    one = torch.tensor(1.0)

    fp8 = quantize_activation(x, Fp8PerTensor(), input_scale=one)
    fp4 = quantize_activation(x, Nvfp4(), input_scale=one)

    assert dequantize_activation(fp8, Fp8PerTensor())[0, 0] == 448.0
    assert bool(dequantize_activation(fp8, Fp8PerTensor())[0, 16].isnan())
    assert dequantize_activation(fp4, Nvfp4())[0, 0] == 6.0 * 448.0
    assert bool(dequantize_activation(fp4, Nvfp4())[0, 16].isnan())


@pytest.mark.parametrize(("fmt", "largest"), [(Fp8PerTensor(), 448.0), (Nvfp4(), 2688.0)])
def test_calibration_scale(fmt: Format, largest: float) -> None:
    """amax over the largest value; 1 where nothing was seen; never subnormal."""
    amax = torch.tensor([largest, 3.0, 0.0, 1e-44])

    scale = calibration_scale(amax, fmt)

    assert scale.tolist() == [1.0, torch.tensor(3.0 / largest).item(), 1.0, 2.0**-126]
    covered = torch.linspace(-3.0, 3.0, 32)[None]
    back = dequantize_activation(quantize_activation(covered, fmt, input_scale=scale[1]), fmt)
    assert back[0, 0].item() == pytest.approx(-3.0, rel=1e-6)


def test_calibration_scale_refuses_dynamic_formats() -> None:
    """A format that takes its scales from each call has none to calibrate."""
    with pytest.raises(ValueError, match=r"'fp8_block' has no static activation scale"):
        calibration_scale(torch.tensor(1.0), Fp8BlockScale())


@pytest.mark.parametrize("fmt", [Fp8PerTensor(), Nvfp4()], ids=str)
def test_static_scale_is_needed(fmt: Format) -> None:
    """A missing static scale, or one for each expert, is an error with what to do."""
    x = torch.randn(2, 32)

    with pytest.raises(ValueError, match=r"input_scale is None; .*FusedMoE\.calibrate"):
        quantize_activation(x, fmt)
    with pytest.raises(ValueError, match=r"input_scale has shape \(4,\)"):
        quantize_activation(x, fmt, input_scale=torch.ones(4))


def test_one_element_scale_of_any_shape() -> None:
    """Checkpoints store the static scale as () or (1,): both are one value."""
    x = torch.randn(2, 32)
    scale = torch.tensor([0.25])

    q = quantize_activation(x, Nvfp4(), input_scale=scale)

    assert q.global_scale is not None
    assert q.global_scale.shape == ()


@pytest.mark.parametrize("fmt", [MxFp8(), MxFp4(activation="mxfp8"), Nvfp4()], ids=str)
def test_ragged_groups_are_refused(fmt: Format) -> None:
    """K not in whole groups is an error."""
    with pytest.raises(ValueError, match=r"x has shape \(2, 40\), K = 40; .* multiple of"):
        quantize_activation(torch.randn(2, 40), fmt, input_scale=torch.tensor(1.0))


@pytest.mark.parametrize("fmt", [MxFp4(), MxInt4()], ids=str)
def test_bf16_activations_have_no_groups(fmt: Format) -> None:
    """They are multiplied as bfloat16, which needs no groups of 32 along K."""
    assert quantize_activation(torch.randn(2, 40), fmt).data.shape == (2, 40)


@every_format
def test_no_token_rows_are_refused(fmt: Format) -> None:
    """Three dimensions, or integers, are errors."""
    with pytest.raises(ValueError, match=r"allowed: \(T, K\)"):
        quantize_activation(torch.randn(2, 3, 32), fmt)
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        quantize_activation(torch.zeros(2, 32, dtype=torch.int64), fmt)


@pytest.mark.parametrize(
    "fmt", [Fp8PerTensor(), Fp8PerChannel(), Fp8BlockScale(), MxFp8(), Nvfp4()], ids=str
)
def test_dequantize_refuses_what_does_not_fit(fmt: Format) -> None:
    """Missing or misshapen scales are errors, not broadcasts."""
    x = torch.randn(4, 256)
    q = quantize_activation(x, fmt, input_scale=_scale(x, fmt))
    assert q.scale is not None

    if not isinstance(fmt, Nvfp4):
        with pytest.raises(ValueError, match=r"scale is None"):
            dequantize_activation(replace(q, scale=None), fmt)
    else:
        with pytest.raises(ValueError, match=r"global_scale is None"):
            dequantize_activation(replace(q, global_scale=None), fmt)
    with pytest.raises(ValueError, match=r"scale has shape"):
        dequantize_activation(replace(q, scale=q.scale.reshape(1, -1)), fmt)
    with pytest.raises(ValueError, match=r"data is torch\.bfloat16"):
        dequantize_activation(replace(q, data=x.bfloat16()), fmt)


@pytest.mark.gpu
@every_format
def test_cuda_agrees_and_can_be_captured(fmt: Format) -> None:
    """A CUDA graph captures the quantisation, and a replay has the CPU's bits."""
    x = torch.randn(64, 256)
    scale = _scale(x, fmt)
    expected = quantize_activation(x, fmt, input_scale=scale)
    on_device, static = torch.zeros(64, 256, device="cuda"), None
    if scale is not None:
        static = scale.cuda()
    quantize_activation(on_device, fmt, input_scale=static)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        q = quantize_activation(on_device, fmt, input_scale=static)
    on_device.copy_(x)
    graph.replay()

    assert torch.equal(q.data.cpu().view(torch.uint8), expected.data.view(torch.uint8))
    if q.scale is not None and expected.scale is not None:
        scales = q.scale.cpu().flatten(), expected.scale.flatten()
        assert torch.equal(scales[0].view(torch.uint8), scales[1].view(torch.uint8))
