"""Quantised checkpoints through SGLang's own weight loaders into our runners.

Tensors by their published names, one call of the layer's `weight_loader` each. The oracle has the values
that the bytes mean, decoded here, and rounds activations as the format says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.oracle import RULES, Act
from tests.sglang.test_backend import make_layer, make_topk, run
from typed_moe import CheckpointError, UnsupportedRouting
from typed_moe.sglang import Plugin, plans_of

pytestmark = pytest.mark.sglang

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 7, 256, 128, 4, 2
PROJECTIONS = (("w1", "gate_proj"), ("w3", "up_proj"), ("w2", "down_proj"))
Sglang = Any  # type: ignore[explicit-any]  # SGLang's objects are not typed here
E4M3 = torch.float8_e4m3fn
Values = dict[tuple[int, str], Tensor]
Rounding = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def _backend(typed_moe: Plugin) -> None:
    torch.manual_seed(5)


def draw(name: str) -> Tensor:
    shape = (HIDDEN, WIDTH) if name == "w2" else (WIDTH, HIDDEN)
    return torch.randn(shape) / math.sqrt(shape[1])


def layer_of(quant: object, **settings: object) -> Sglang:
    layer: Sglang = make_layer(
        quant_config=quant,
        num_experts=EXPERTS,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        **settings,
    )
    return layer


def load(layer: Sglang, expert: int, shard: str, tensors: dict[str, Tensor]) -> None:
    """As a model's `load_weights` does it with `FusedMoE.make_expert_params_mapping`."""
    projection = dict(PROJECTIONS)[shard]
    half = "w2" if shard == "w2" else "w13"
    for kind, tensor in tensors.items():
        parameter = layer.get_parameter(f"{half}_{kind}")
        name = f"model.layers.0.mlp.experts.{expert}.{projection}.{kind}"
        parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=expert)


def experts_of(values: Values) -> oracle.Experts:
    def stack(shard: str) -> Tensor:
        return torch.stack([values[expert, shard] for expert in range(EXPERTS)])

    return oracle.Experts(gate=stack("w1"), up=stack("w3"), down=stack("w2"))


def check(layer: Sglang, values: Values, on_input: Rounding, between: Rounding, fmt: str) -> None:
    topk = make_topk(layer)
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)
    found = run(layer, x, topk(x, logits)).double()
    routing = oracle.route(RULES["RenormalizeNaive"], logits, None, TOP_K)
    wanted = oracle.moe(
        experts_of(values),
        on_input(x),
        routing.ids,
        routing.weights,
        Act(),
        rounding=between,
    )
    error = (found - wanted).norm() / wanted.norm()
    # A value that lies on a border is rounded up in float32 and down in float64, rarely: one of 256
    # by a step of 3 (FP8) or 1 (FP4) bits. A scale that is off by a tenth would be 0.1.
    assert error < 0.01, error
    (plan,) = plans_of(layer)
    assert plan.request.quant.name == fmt


# --- FP8 in blocks of 128 x 128 ---


def in_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    tiles = weight.reshape(rows // 128, 128, columns // 128, 128)
    scale = tiles.abs().amax(dim=(1, 3)) / 448.0
    data = (tiles / scale[:, None, :, None]).reshape(rows, columns).to(E4M3)
    return data, scale


def out_of_blocks(data: Tensor, scale: Tensor) -> Tensor:
    return data.double() * scale.double().repeat_interleave(128, 0).repeat_interleave(128, 1)


def per_128(x: Tensor) -> Tensor:
    groups = x.float().reshape(x.shape[0], -1, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 448.0
    return ((groups / scale).to(E4M3).double() * scale.double()).reshape(x.shape)


def test_fp8_blocks() -> None:
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    layer = layer_of(
        Fp8Config(
            is_checkpoint_fp8_serialized=True,
            activation_scheme="dynamic",
            weight_block_size=[128, 128],
        )
    )
    values: Values = {}
    for expert in range(EXPERTS):
        for shard, _ in PROJECTIONS:
            data, scale = in_blocks(draw(shard))
            values[expert, shard] = out_of_blocks(data, scale)
            load(layer, expert, shard, {"weight": data, "weight_scale_inv": scale})
    check(layer, values, per_128, per_128, "fp8_block")


def test_fp8_blocks_of_a_checkpoint() -> None:
    """A Qwen3-MoE of SGLang's, by `load_weights` and the names of the published FP8 checkpoints."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.models.qwen3_moe import Qwen3MoeForCausalLM
    from transformers import Qwen3MoeConfig

    config = Qwen3MoeConfig.from_dict(
        {
            "vocab_size": 64,
            "hidden_size": HIDDEN,
            "intermediate_size": WIDTH,
            "moe_intermediate_size": WIDTH,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "norm_topk_prob": True,
        }
    )
    quant = Fp8Config.from_config(
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            # SGLang's FP8 linear layers want a GPU.
            "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"],
        }
    )
    model = Qwen3MoeForCausalLM(config, quant_config=quant)
    values: Values = {}
    gate = torch.randn(EXPERTS, HIDDEN) * 0.2
    checkpoint = {"model.layers.0.mlp.gate.weight": gate}
    for expert in range(EXPERTS):
        for shard, projection in PROJECTIONS:
            data, scale = in_blocks(draw(shard))
            values[expert, shard] = out_of_blocks(data, scale)
            name = f"model.layers.0.mlp.experts.{expert}.{projection}"
            checkpoint |= {f"{name}.weight": data, f"{name}.weight_scale_inv": scale}
    model.load_weights(checkpoint.items())
    block = model.model.layers[0].mlp
    block.experts.quant_method.process_weights_after_loading(block.experts)
    x = torch.randn(TOKENS, HIDDEN)
    with torch.no_grad():
        found = block(x.clone()).double()
    routing = oracle.route(RULES["Renormalize"], x.double() @ gate.double().T, None, TOP_K)
    wanted = oracle.moe(
        experts_of(values), per_128(x), routing.ids, routing.weights, Act(), rounding=per_128
    )
    assert (found - wanted).norm() / wanted.norm() < 0.01
    (plan,) = plans_of(block.experts)
    assert (plan.request.quant.name, plan.strategy.name) == ("fp8_block", "Renormalize")


# --- FP8 with one scale per matrix ---


def per_tensor(scale: float) -> Rounding:
    def rounding(x: Tensor) -> Tensor:
        return (x.float() / scale).clamp(-448, 448).to(E4M3).double() * scale

    return rounding


def _static_fp8() -> Iterator[object]:
    from sglang.srt.layers.quantization.fp8 import Fp8Config
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp8Config

    yield Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static")
    yield ModelOptFp8Config(is_checkpoint_fp8_serialized=True)


@pytest.mark.parametrize("number", [0, 1], ids=["fp8", "modelopt"])
def test_fp8_per_tensor(number: int) -> None:
    """Gate and up have scales of their own; the activations' are the widest expert's."""
    layer = layer_of(list(_static_fp8())[number])
    values: Values = {}
    for expert in range(EXPERTS):
        for shard, _ in PROJECTIONS:
            weight = draw(shard) * (1.0 if shard == "w1" else 0.5)
            scale = weight.abs().max() / 448.0
            data = (weight / scale).to(E4M3)
            values[expert, shard] = data.double() * scale.double()
            static = torch.tensor(0.01 if expert == 1 else 0.005)
            load(
                layer,
                expert,
                shard,
                {"weight": data, "weight_scale": scale, "input_scale": static},
            )
        # One matrix, one scale: the smaller half is rounded once more, in units of the larger.
        widest = max(values[expert, shard].abs().max().item() for shard in ("w1", "w3")) / 448.0
        for shard in ("w1", "w3"):
            values[expert, shard] = per_tensor(widest)(values[expert, shard])
    check(layer, values, per_tensor(0.01), per_tensor(0.01), "fp8_per_tensor")


def test_a_scale_that_the_checkpoint_lacks() -> None:
    layer = layer_of(list(_static_fp8())[1])
    layer.w13_weight_scale.data.fill_(torch.finfo(torch.float32).min)
    with pytest.raises(CheckpointError, match=r"w13_weight_scale holds .* allowed: positive"):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"is_checkpoint_fp8_serialized": True, "activation_scheme": "dynamic"},
            "activations quantised per call; allowed: static",
        ),
        (
            {"is_checkpoint_fp8_serialized": False, "activation_scheme": "dynamic"},
            "makes of another checkpoint at start-up",
        ),
        (
            {
                "is_checkpoint_fp8_serialized": True,
                "activation_scheme": "dynamic",
                "weight_block_size": [64, 128],
            },
            r"blocks of \[64, 128\]; allowed: \[128, 128\]",
        ),
    ],
    ids=["dynamic", "online", "blocks"],
)
def test_fp8_that_is_not_served(settings: dict[str, Any], said: str) -> None:  # type: ignore[explicit-any]  # SGLang's
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    with pytest.raises(UnsupportedRouting, match=said):
        layer_of(Fp8Config(**settings))


def test_a_format_that_is_not_served() -> None:
    from sglang.srt.layers.quantization.blockwise_int8 import BlockInt8Config

    quant = BlockInt8Config(
        is_checkpoint_int8_serialized=True,
        activation_scheme="dynamic",
        weight_block_size=[128, 128],
    )
    with pytest.raises(UnsupportedRouting, match="is read by SGLang's BlockInt8MoEMethod; typed"):
        layer_of(quant)


# --- FP4 ---

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NIBBLES = torch.tensor([*E2M1, *(-value for value in E2M1)], dtype=torch.float64)


def to_e2m1(values: Tensor) -> Tensor:
    """The nearest of the 16, as a number from 0 to 15."""
    return (values.double().unsqueeze(-1) - NIBBLES).abs().argmin(-1).to(torch.uint8)


def pack(codes: Tensor) -> Tensor:
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def per_16(x: Tensor, scale: float) -> Tensor:
    """NVFP4: E2M1 in groups of 16 with an FP8 scale, times one scale."""
    groups = x.float().reshape(x.shape[0], -1, 16)
    inner = (groups.abs().amax(-1, keepdim=True) / 6.0 / scale).clamp(max=448).to(E4M3)
    whole = inner.double() * scale
    safe = torch.where(whole == 0, torch.ones_like(whole), whole)
    return (NIBBLES[to_e2m1(groups.double() / safe).long()] * whole).reshape(x.shape)


def _nvfp4_config(**settings: object) -> object:
    from sglang.srt.layers.quantization.modelopt_quant import ModelOptFp4Config

    made: object = ModelOptFp4Config(is_checkpoint_nvfp4_serialized=True, group_size=16, **settings)
    return made


def _nvfp4(layer: Sglang) -> Values:
    values: Values = {}
    for expert in range(EXPERTS):
        for shard, _ in PROJECTIONS:
            weight, second = draw(shard), 2.0**-10 if shard == "w2" else 2.0**-11
            groups = weight.reshape(weight.shape[0], -1, 16)
            first = (groups.abs().amax(-1) / 6.0 / second).to(E4M3)
            whole = first.double().unsqueeze(-1) * second
            codes = to_e2m1(groups.double() / whole).reshape(weight.shape)
            values[expert, shard] = (NIBBLES[codes.long()].reshape(groups.shape) * whole).reshape(
                weight.shape
            )
            tensors = {
                "weight": pack(codes),
                "weight_scale": first,
                "weight_scale_2": torch.tensor(second),
                "input_scale": torch.tensor(2.0**-9),
            }
            load(layer, expert, shard, tensors)
    return values


def test_nvfp4() -> None:
    layer = layer_of(_nvfp4_config())
    assert layer.w13_blockscale_swizzled is None
    values = _nvfp4(layer)

    def rounding(x: Tensor) -> Tensor:
        return per_16(x, 2.0**-9)

    check(layer, values, rounding, rounding, "nvfp4")


def test_nvfp4_with_two_scales_for_one_matrix() -> None:
    layer = layer_of(_nvfp4_config())
    _nvfp4(layer)
    layer.w13_weight_scale_2.data[1, 1] *= 2
    with pytest.raises(
        CheckpointError, match="gate_proj and up_proj have different weight_scale_2"
    ):
        layer.quant_method.process_weights_after_loading(layer)


def test_mxfp4_of_gpt_oss() -> None:
    """Gate and up rows by turns, with bias vectors, as gpt-oss is published; bfloat16 activations."""
    from sglang.srt.layers.quantization.mxfp4 import Mxfp4Config

    layer = layer_of(
        Mxfp4Config(is_checkpoint_mxfp4_serialized=True),
        with_bias=True,
        gemm1_alpha=1.702,
        gemm1_clamp_limit=7.0,
        params_dtype=torch.bfloat16,
    )
    for parameter in layer.parameters():
        # Beyond what the checkpoint has, SGLang pads with zeros and scales of one.
        parameter.data.fill_(127 if parameter.shape[-1] in (HIDDEN // 32, WIDTH // 32) else 0)
    stacks: dict[str, Tensor] = {}
    for half, rows, columns in (("w13", 2 * WIDTH, HIDDEN), ("w2", HIDDEN, WIDTH)):
        weight = torch.randn(EXPERTS, rows, columns) * columns**-0.5
        groups = weight.reshape(EXPERTS, rows, -1, 32)
        exponent = torch.floor(torch.log2(groups.abs().amax(-1))) - 2
        codes = to_e2m1(groups.double() / torch.exp2(exponent.double()).unsqueeze(-1))
        decoded = NIBBLES[codes.long()] * torch.exp2(exponent.double()).unsqueeze(-1)
        stacks[half] = decoded.reshape(weight.shape)
        stacks[f"{half}_bias"] = (torch.randn(EXPERTS, rows) * 0.1).bfloat16()
        for kind, tensor in (
            ("weight", pack(codes.reshape(weight.shape))),
            ("weight_scale", (exponent + 127).to(torch.uint8)),
            ("weight_bias", stacks[f"{half}_bias"]),
        ):
            parameter = layer.get_parameter(f"{half}_{kind}")
            parameter.weight_loader(
                parameter, tensor, f"experts.{half}_{kind}", shard_id=None, expert_id=None
            )
    topk = make_topk(layer, None)
    x = torch.randn(TOKENS, HIDDEN).bfloat16().float()
    logits = torch.randn(TOKENS, EXPERTS)
    found = run(layer, x, topk(x, logits)).double()
    routing = oracle.route(RULES["RenormalizeNaive"], logits, None, TOP_K)
    first, bias = stacks["w13"], stacks["w13_bias"]
    experts = oracle.Experts(
        gate=first[:, ::2],
        up=first[:, 1::2],
        down=stacks["w2"],
        gate_bias=bias[:, ::2],
        up_bias=bias[:, 1::2],
        down_bias=stacks["w2_bias"],
    )
    act = Act(alpha=1.702, beta=1.0, limit=7.0)
    wanted = oracle.moe(
        experts, x, routing.ids, routing.weights, act, rounding=lambda h: h.bfloat16().double()
    )
    assert (found - wanted).norm() / wanted.norm() < 1e-3
    (plan,) = plans_of(layer)
    assert plan.request.quant.name == "mxfp4"
