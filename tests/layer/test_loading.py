"""Loading experts: every layout, every stored format, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.layer.build import Build, random_experts, relative_error, separate
from tests.quantization import grids
from typed_moe import (
    CheckpointError,
    CheckpointLayout,
    DeepSeekV3,
    FusedMoE,
    Placement,
    Relu2,
    RenormalizeNaive,
    Swiglu,
)
from typed_moe.config import (
    FORMATS,
    Format,
    FormatName,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxInt4,
)
from typed_moe.quantization import quantize_weight, relative_error_bound

RULE = oracle.RULES["RenormalizeNaive"]
H, WIDTH, E = 16, 12, 8


def _stack(experts: oracle.Experts, *, interleaved: bool = False) -> Tensor:
    """(E, 2I, H): gate over up, or in alternate rows."""
    assert experts.gate is not None
    if interleaved:
        return torch.stack((experts.gate, experts.up), dim=2).reshape(E, 2 * WIDTH, H)
    return torch.cat((experts.gate, experts.up), dim=1)


def _tensors(layout: CheckpointLayout, experts: oracle.Experts) -> list[tuple[str, Tensor]]:
    assert experts.gate is not None
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    match layout:
        case CheckpointLayout.MIXTRAL:
            parts = [(name.split("."), tensor) for name, tensor in separate(experts)]
            return [(f"{e}.{names[p]}.{kind}", tensor) for (e, p, kind), tensor in parts]
        case CheckpointLayout.STACKED:
            return [
                ("gate_proj.weight", experts.gate),
                ("up_proj.weight", experts.up),
                ("down_proj.weight", experts.down),
            ]
        case CheckpointLayout.FUSED:
            return [("gate_up_proj", _stack(experts)), ("down_proj", experts.down)]
        case CheckpointLayout.FUSED_TRANSPOSED:
            return [
                ("gate_up_proj", _stack(experts).transpose(1, 2)),
                ("down_proj", experts.down.transpose(1, 2)),
            ]
        case CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED:
            return [
                ("gate_up_proj", _stack(experts, interleaved=True).transpose(1, 2)),
                ("down_proj", experts.down.transpose(1, 2)),
            ]
        case _:
            return separate(experts)


def _check(layer: FusedMoE, experts: oracle.Experts, act: oracle.Act, bound: float) -> None:
    hidden = experts.up.shape[2]
    x, logits = torch.randn(20, hidden), torch.randn(20, E)
    layer.calibrate(x, logits)
    expected = oracle.layer(RULE, experts, x, logits, None, top_k=2, act=act)
    assert relative_error(layer(x, logits), expected) < bound


@pytest.mark.parametrize("layout", list(CheckpointLayout), ids=lambda layout: layout.value)
def test_every_layout(layout: CheckpointLayout) -> None:
    """The same experts come out of every layout that released checkpoints have."""
    gated = layout is not CheckpointLayout.SEPARATE_UNGATED
    experts = random_experts(E, H, WIDTH, gated=gated)
    act = oracle.Act(kind="swiglu" if gated else "relu2")
    build = Build(routing=RenormalizeNaive(), activation=Swiglu() if gated else Relu2())
    layer = build.empty()
    tensors = _tensors(layout, experts) if gated else separate(experts)
    read = layer.load_weights(tensors, layout=layout)

    assert read == {name for name, _ in tensors}
    _check(layer, experts, act, 2e-6)


def _big(fmt: Format, placement: Placement | None = None) -> FusedMoE:
    return Build(
        routing=RenormalizeNaive(),
        hidden_size=256,
        intermediate_size=256,
        quant=fmt,
        placement=placement or Placement(),
    ).empty()


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_from_plain_weights(name: FormatName) -> None:
    """float32 weights are quantised on loading, within the format's own error."""
    experts = random_experts(E, 256, 256)
    layer = _big(FORMATS[name])
    layer.load_weights(separate(experts))

    _check(layer, experts, oracle.Act(), relative_error_bound(FORMATS[name], Swiglu()))


def _stored(experts: oracle.Experts, fmt: Format, suffix: str) -> list[tuple[str, Tensor]]:
    """A checkpoint in a format: each projection quantised by itself."""
    tensors = []
    for name, matrix in separate(experts):
        stored = quantize_weight(matrix, fmt)
        assert stored.scale is not None
        tensors += [(name, stored.data), (name.replace(".weight", suffix), stored.scale)]
        if stored.global_scale is not None:
            tensors.append((name.replace(".weight", ".weight_scale_2"), stored.global_scale))
    return tensors


@pytest.mark.parametrize(
    ("name", "suffix"),
    [
        ("fp8_block", ".weight_scale_inv"),
        ("fp8_per_tensor", ".weight_scale"),
        ("fp8_per_channel", ".weight_scale"),
        ("mxfp8", ".weight_scale"),
        ("mxfp4", ".weight_scale"),
        ("mxint4", ".weight_scale"),
        ("nvfp4", ".weight_scale"),
    ],
)
def test_quantised_checkpoints(name: FormatName, suffix: str) -> None:
    """Each stored format loads into its own layer and into a plain one; both agree with float64."""
    fmt = FORMATS[name]
    experts = random_experts(E, 256, 256)
    tensors = _stored(experts, fmt, suffix)
    own, plain = _big(fmt), _big(FORMATS["unquantized"])
    own.load_weights(tensors)
    plain.load_weights(tensors)
    bound = relative_error_bound(fmt, Swiglu())

    # Unequal per-tensor scales of gate and up make the layer quantise the pair anew.
    _check(own, experts, oracle.Act(), bound * (1.5 if name in ("fp8_per_tensor", "nvfp4") else 1))
    _check(plain, experts, oracle.Act(), bound)


@pytest.mark.parametrize("ranks", [1, 2])
def test_block_scaled_values_are_copied_bit_for_bit(ranks: int) -> None:
    """An FP8 checkpoint's values and scales reach the parameters as they are, sharded or not."""
    experts = random_experts(E, 256, 256)
    tensors = dict(_stored(experts, Fp8BlockScale(), ".weight_scale_inv"))
    width = 256 // ranks
    for rank in range(ranks):
        layer = _big(Fp8BlockScale(), Placement(tp_size=ranks, tp_rank=rank))
        layer.load_weights(tensors.items())
        mine = slice(rank * width, (rank + 1) * width)
        blocks = slice(rank * width // 128, (rank + 1) * width // 128)
        for e in range(E):
            first, second = (layer.get_parameter(n).data[e] for n in ("w13_weight", "w2_weight"))
            assert _bits(first[:width], tensors[f"{e}.gate_proj.weight"][mine])
            assert _bits(first[width:], tensors[f"{e}.up_proj.weight"][mine])
            assert _bits(second, tensors[f"{e}.down_proj.weight"][:, mine])
            scales = layer.get_parameter("w2_weight_scale_inv").data[e]
            assert torch.equal(scales, tensors[f"{e}.down_proj.weight_scale_inv"][:, blocks])


def _bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one.view(torch.uint8), other.contiguous().view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ranks", [1, 2])
def test_channel_scales_of_compressed_tensors(ranks: int, dtype: torch.dtype) -> None:
    """`weight_scale` (N, 1), float32 or bfloat16: values as stored, scales with their rows."""
    tensors = {
        name: tensor[:, None].to(dtype) if name.endswith("_scale") else tensor
        for name, tensor in _stored(random_experts(E, 256, 256), Fp8PerChannel(), ".weight_scale")
    }
    width = 256 // ranks
    for rank in range(ranks):
        layer = _big(Fp8PerChannel(), Placement(tp_size=ranks, tp_rank=rank))
        layer.load_weights(tensors.items())
        mine = slice(rank * width, (rank + 1) * width)
        for e in range(E):
            first, second = (layer.get_parameter(n).data[e] for n in ("w13_weight", "w2_weight"))
            assert _bits(first[:width], tensors[f"{e}.gate_proj.weight"][mine])
            assert _bits(first[width:], tensors[f"{e}.up_proj.weight"][mine])
            assert _bits(second, tensors[f"{e}.down_proj.weight"][:, mine])
            rows = layer.get_parameter("w13_weight_scale").data[e]
            halves = [tensors[f"{e}.{p}_proj.weight_scale"][mine, 0] for p in ("gate", "up")]
            assert torch.equal(rows, torch.cat(halves).float())
            down = tensors[f"{e}.down_proj.weight_scale"][:, 0].float()
            assert torch.equal(layer.get_parameter("w2_weight_scale").data[e], down)


def test_gpt_oss_mxfp4_blocks() -> None:
    """gpt-oss's published form: interleaved rows, 16-byte blocks, biases; values as stored."""
    experts = random_experts(E, 64, 32, biases=True)
    assert experts.gate is not None
    assert experts.gate_bias is not None
    assert experts.up_bias is not None
    assert experts.down_bias is not None
    rows = torch.stack((experts.gate, experts.up), dim=2).reshape(E, 64, 64)
    first, down = quantize_weight(rows, MxFp4()), quantize_weight(experts.down, MxFp4())
    assert first.scale is not None
    assert down.scale is not None
    layer = Build(
        routing=RenormalizeNaive(),
        hidden_size=64,
        intermediate_size=32,
        quant=MxFp4(),
        has_bias=True,
    ).empty()
    bias = torch.stack((experts.gate_bias, experts.up_bias), dim=2).reshape(E, 64)
    layer.load_weights(
        [
            ("gate_up_proj_blocks", first.data.reshape(E, 64, 2, 16)),
            ("gate_up_proj_scales", first.scale),
            ("gate_up_proj_bias", bias),
            ("down_proj_blocks", down.data.reshape(E, 64, 1, 16)),
            ("down_proj_scales", down.scale),
            ("down_proj_bias", experts.down_bias),
        ],
        layout=CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED,
    )

    assert torch.equal(layer.get_parameter("w13_weight").data[:, :32], first.data[:, ::2])
    _check(layer, experts, oracle.Act(), relative_error_bound(MxFp4(), Swiglu()))


def _pack_quantized(matrix: Tensor) -> dict[str, Tensor]:
    """compressed-tensors' int4: value + 8, eight to an int32, the first in its lowest bits."""
    stored = quantize_weight(matrix, MxInt4())
    assert stored.scale is not None
    codes = (grids.int4(stored.data) + 8).long().reshape(matrix.shape[0], -1, 8)
    words = (codes << torch.arange(0, 32, 4)).sum(dim=2)
    return {
        "weight_packed": torch.where(words >= 2**31, words - 2**32, words).int(),
        "weight_scale": stored.scale,
        "weight_shape": torch.tensor(matrix.shape),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": torch.ones(256, 2).bfloat16()}, r"\(256, 2\); allowed: \(256, 8\)"),
        ({"weight_scale": torch.ones(256, 8).half()}, "weight is torch.uint8 with"),
        ({"weight_packed": torch.zeros(256, 64).int()}, r"\(256, 256\); allowed: \(256, 128\)"),
        ({"weight_zero_point": torch.zeros(32, 8).int()}, "no expert tensor of the layout"),
    ],
    ids=["groups of 128", "float16 scales", "int8", "zero points"],
)
def test_other_integers_of_compressed_tensors(change: dict[str, Tensor], message: str) -> None:
    """Symmetric int4 in groups of 32 is read; what else is packed so is refused, not misread."""
    tensors = [
        (name.replace("weight", kind), tensor)
        for name, matrix in separate(random_experts(E, 256, 256))
        for kind, tensor in (_pack_quantized(matrix) | change).items()
    ]
    with pytest.raises(CheckpointError, match=message):
        _big(MxInt4()).load_weights(tensors)


@pytest.mark.parametrize("ranks", [1, 2])
def test_int4_of_compressed_tensors(ranks: int) -> None:
    """Kimi K2's published form, sharded or not: the stored numbers, and within the format's error."""
    experts = random_experts(E, 256, 256)
    tensors = [
        (name.replace("weight", kind), tensor)
        for name, matrix in separate(experts)
        for kind, tensor in _pack_quantized(matrix).items()
    ]
    width = 256 // ranks
    for rank in range(ranks):
        layer = _big(MxInt4(), Placement(tp_size=ranks, tp_rank=rank))
        layer.load_weights(tensors)
        mine = quantize_weight(experts.down[:, :, rank * width : (rank + 1) * width], MxInt4())
        assert mine.scale is not None
        assert torch.equal(layer.get_parameter("w2_weight").data, mine.data)
        assert torch.equal(layer.get_parameter("w2_weight_scale").data, mine.scale)
        if ranks == 1:
            _check(layer, experts, oracle.Act(), relative_error_bound(MxInt4(), Swiglu()))


def test_state_dict_round_trip() -> None:
    """A state dict restores the layer bit for bit."""
    experts = random_experts(E, 256, 256)
    first, second = _big(Fp8PerTensor()), _big(Fp8PerTensor())
    first.load_weights(separate(experts))
    x, logits = torch.randn(20, 256), torch.randn(20, E)
    first.calibrate(x, logits)
    second.load_state_dict(first.state_dict())

    assert torch.equal(first(x, logits), second(x, logits))


def _without(tensors: list[tuple[str, Tensor]], name: str) -> list[tuple[str, Tensor]]:
    return [(n, t) for n, t in tensors if n != name]


def test_what_is_refused() -> None:
    """Missing, doubled, misshapen, mistyped and unknown tensors: a sentence each."""
    tensors = separate(random_experts(E, H, WIDTH))
    one = "3.up_proj.weight"
    wrong: list[tuple[list[tuple[str, Tensor]], str]] = [
        (_without(tensors, one), "expert 3's up_proj is missing"),
        (tensors[: 3 * (E - 2)], "experts 6-7 are missing; the checkpoint has 0-5"),
        ([*tensors, tensors[0]], "0.gate_proj.weight is given twice"),
        ([*_without(tensors, one), (one, torch.ones(WIDTH, H + 1))], r"shape \(12, 17\); allowed"),
        (
            [*_without(tensors, one), (one, torch.ones(WIDTH, H).long())],
            "is torch.int64 with no scale",
        ),
        ([*tensors, ("3.up_proj.bias", torch.ones(WIDTH))], "made without; make it with has_bias"),
        ([*tensors, (f"{E}.up_proj.weight", torch.ones(WIDTH, H))], "experts 0 to 7"),
        ([*tensors, ("3.up_proj.weight_scale", torch.ones(()))], "has a scale; allowed"),
        (
            [*tensors, ("router.weight", torch.ones(WIDTH))],
            "no expert tensor of the layout separate",
        ),
        ([("e_score_correction_bias", torch.ones(E))], "RenormalizeNaive reads none"),
    ]
    for given, message in wrong:
        with pytest.raises(CheckpointError, match=message):
            Build(routing=RenormalizeNaive()).empty().load_weights(given)
    with pytest.raises(CheckpointError, match=r"of shape \(7,\); allowed"):
        Build(routing=DeepSeekV3()).empty().load_weights(
            [("e_score_correction_bias", torch.ones(7))]
        )


def test_the_correction_bias_keeps_its_stored_dtype() -> None:
    """sglang#37133: storage dtype is a fact of the checkpoint; nothing rounds it."""
    layer = Build(routing=DeepSeekV3()).empty()
    for dtype in (torch.float32, torch.bfloat16):
        layer.load_weights([("e_score_correction_bias", torch.ones(E, dtype=dtype))])
        assert layer.e_score_correction_bias is not None
        assert layer.e_score_correction_bias.dtype is dtype
