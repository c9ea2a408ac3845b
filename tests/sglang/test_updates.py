"""Weights that SGLang's own updater writes over while a model is served."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.oracle import RULES, Act
from tests.sglang.test_backend import EXPERTS, HIDDEN, TOP_K, WIDTH, make_layer, make_topk
from tests.sglang.test_backend_formats import per_128
from typed_moe import UnsupportedRouting

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("typed_moe")]

Sglang = Any  # type: ignore[explicit-any]  # SGLang's objects are not typed here
TOKENS = 5
Named = list[tuple[str, Tensor]]
SHARDS = {"gate_proj": ("w13_weight", "w1"), "up_proj": ("w13_weight", "w3")}
SHARDS["down_proj"] = ("w2_weight", "w2")


class Model(nn.Module):
    """One layer, and the `load_weights` that SGLang's models have."""

    def __init__(self, layer: Sglang) -> None:
        super().__init__()
        self.experts = layer

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Tensors named `experts.0.gate_proj.weight`."""
        for name, tensor in weights:
            _, expert, projection, _ = name.split(".")
            parameter_name, shard = SHARDS[projection]
            parameter = self.experts.get_parameter(parameter_name)
            parameter.weight_loader(parameter, tensor, name, shard_id=shard, expert_id=int(expert))


def updater(model: Model) -> Sglang:
    """SGLang's, of a process with this model."""
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

    def update_fields(*_: object, **__: object) -> None:
        return None

    known: dict[str, object] = {
        "tp_rank": 0,
        "device": "cpu",
        "gpu_id": 0,
        "model_config": SimpleNamespace(model_path="", dtype=torch.float32),
        "custom_weight_loaders": [],
        "get_model": lambda: model,
        "update_model_fields": update_fields,
    }
    asked = WeightUpdater.__dataclass_fields__
    return WeightUpdater(**{name: known.get(name) for name in asked})


def checkpoint(seed: int) -> Named:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "gate_proj": (WIDTH, HIDDEN),
        "up_proj": (WIDTH, HIDDEN),
        "down_proj": (HIDDEN, WIDTH),
    }
    return [
        (f"experts.{expert}.{name}.weight", torch.randn(shape, generator=generator) * 0.05)
        for expert in range(EXPERTS)
        for name, shape in shapes.items()
    ]


def experts_of(named: Named) -> oracle.Experts:
    def stack(projection: str) -> Tensor:
        return torch.stack([tensor for name, tensor in named if projection in name])

    return oracle.Experts(gate=stack("gate_proj"), up=stack("up_proj"), down=stack("down_proj"))


def load_first(model: Model, named: Named) -> None:
    """As SGLang's loader does at start-up."""
    model.load_weights(named)
    model.experts.quant_method.process_weights_after_loading(model.experts)


def test_new_weights_are_served() -> None:
    """A session of SGLang's: begin, tensors, end. The parameters stay where a CUDA graph knows them."""
    layer = make_layer()
    topk, model = make_topk(layer), Model(layer)
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)
    places: list[tuple[int, int]] = []
    for seed in (1, 2):
        named = checkpoint(seed)
        if seed == 1:
            load_first(model, named)
        else:
            updates = updater(model)
            updates.begin_weight_update()
            assert updates.update_weights_from_tensor(named) == (True, "Success")
            updates.end_weight_update(run_post_load=False)
        places.append((layer.w13_weight.data_ptr(), layer.w2_weight.data_ptr()))
        with torch.no_grad():
            found = layer(x, topk(x, logits))
        rule = RULES["RenormalizeNaive"]
        wanted = oracle.layer(rule, experts_of(named), x, logits, None, top_k=TOP_K, act=Act())
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    assert places[0] == places[1]


def interleaved() -> Sglang:
    """gpt-oss: a gate row and an up row by turns, which our kernels do not read so."""
    return make_layer(gemm1_alpha=1.702, gemm1_clamp_limit=7.0, gate_up_interleaved=True)


def test_weights_in_another_form_are_not_updated() -> None:
    """The answer comes before anything is written, and names the layer and the way out."""
    layer = interleaved()
    make_topk(layer)
    model = Model(layer)
    load_first(model, checkpoint(1))
    before = [parameter.data.clone() for parameter in layer.parameters()]
    updates = updater(model)
    done, sentence = updates.update_weights_from_tensor(checkpoint(2))
    assert not done
    assert "model.layers.0.mlp.experts: typed-moe's reference kernel" in sentence
    assert "load the model anew" in sentence
    answer, _ = updates.update_weights_from_disk("elsewhere", "auto")
    assert not answer
    with pytest.raises(UnsupportedRouting, match="not written over in place"):
        updates.begin_weight_update()
    for old, parameter in zip(before, layer.parameters(), strict=True):
        assert torch.equal(old, parameter.data)


def test_a_loader_that_does_not_ask_is_stopped() -> None:
    """By the parameter's own `weight_loader`; and what is loaded is not made ready twice."""
    layer = interleaved()
    make_topk(layer)
    model = Model(layer)
    load_first(model, checkpoint(1))
    with pytest.raises(UnsupportedRouting, match="not written over in place"):
        model.load_weights(checkpoint(2))
    with pytest.raises(UnsupportedRouting, match="not written over in place"):
        layer.quant_method.process_weights_after_loading(layer)


def test_scales_that_were_derived_are_not_updated() -> None:
    """FP8 with one scale per matrix: gate and up are brought under one when they are loaded."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    quant = Fp8Config(is_checkpoint_fp8_serialized=True, activation_scheme="static")
    layer = make_layer(quant_config=quant)
    for name, parameter in layer.named_parameters():
        parameter.data.fill_(1.0 if "scale" in name else 0.5)
    make_topk(layer)
    layer.quant_method.process_weights_after_loading(layer)
    done, sentence = updater(Model(layer)).update_weights_from_tensor([])
    assert not done
    assert "Fp8PerTensor" in sentence


def test_new_blocks_and_scales_are_served() -> None:
    """FP8 in blocks: the kernel reads the scales where they were loaded, too."""
    from sglang.srt.layers.quantization.fp8 import Fp8Config

    quant = Fp8Config(
        is_checkpoint_fp8_serialized=True, activation_scheme="dynamic", weight_block_size=[128, 128]
    )
    layer = make_layer(quant_config=quant)
    topk = make_topk(layer)
    x, logits = torch.randn(TOKENS, HIDDEN), torch.randn(TOKENS, EXPERTS)
    outputs: list[Tensor] = []
    for scale in (0.001, 0.002):
        generator = torch.Generator().manual_seed(7)
        for name, parameter in layer.named_parameters():
            if "scale" in name:
                parameter.data.fill_(scale)
            else:
                values = torch.randn(parameter.shape, generator=generator) * 64
                parameter.data.copy_(values.clamp(-448, 448))
        if not outputs:
            layer.quant_method.process_weights_after_loading(layer)
        with torch.no_grad():
            outputs.append(layer(x, topk(x, logits)).double())
    # Both products double, and silu is not linear: by float64 on what is stored now.
    w13, w2 = layer.w13_weight.data.double() * 0.002, layer.w2_weight.data.double() * 0.002
    experts = oracle.Experts(gate=w13[:, :WIDTH], up=w13[:, WIDTH:], down=w2)
    routing = oracle.route(RULES["RenormalizeNaive"], logits, None, TOP_K)
    wanted = oracle.moe(experts, per_128(x), routing.ids, routing.weights, Act(), rounding=per_128)
    assert (outputs[1] - wanted).norm() / wanted.norm() < 0.01
    assert (outputs[0] - wanted).norm() / wanted.norm() > 0.5
