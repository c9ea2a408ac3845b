"""`typed-moe bench layer --peer sglang` on a CPU: what SGLang is handed, as its own code reads it.

Its Triton kernels need a card. In their place SGLang's plain PyTorch experts read the very arguments;
its `TopK`, its configuration and the bench's check against float64 are the real ones.
"""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import attrs
import pytest
from torch import Tensor

from tests.cli.clocks import ToldClocks
from tests.quantization import grids
from typed_moe.cli import _bench_weights
from typed_moe.cli._bench_card import Card
from typed_moe.cli._bench_layer import Cell, LayerBench, bench_layer
from typed_moe.cli._bench_shapes import LayerShape, layer_shapes
from typed_moe.cli._peer_sglang import Sglang
from typed_moe.cli._progress import Steps
from typed_moe.config import Bf16, Format, Fp8BlockScale

pytestmark = [pytest.mark.sglang, pytest.mark.usefixtures("sglang_host")]

CARD = Card(bytes_per_second=2e12, bf16_flops=5e14, fp8_flops=1e15, fp8_source="told", width=64)
SHAPES = {
    shape.name: attrs.evolve(
        shape, hidden_size=256, intermediate_size=128, num_experts=16, top_k=4, tokens=(33,)
    )
    for shape in layer_shapes()
}
TILE = 128


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, object]]:
    """SGLang's plain experts in place of its Triton kernels, behind the same signature; all calls."""
    import sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe as triton
    from sglang.srt.layers.moe.fused_moe_native import fused_moe_forward_native

    signature = inspect.signature(triton.fused_experts)
    calls: list[dict[str, object]] = []

    def plain(*args: object, **kwargs: object) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = SimpleNamespace(**bound.arguments)
        calls.append(bound.arguments)
        layer = SimpleNamespace(
            moe_runner_config=given.moe_runner_config,
            w13_weight=_worth(given.w1, given.w1_scale, given),
            w2_weight=_worth(given.w2, given.w2_scale, given),
        )
        x = given.hidden_states.float()
        if given.use_fp8_w8a8:
            groups = x.double().reshape(-1, TILE)
            scale = groups.abs().amax(dim=1, keepdim=True) / 448
            x = (grids.nearest(groups / scale, grids.E4M3) * scale).reshape(x.shape).float()
        handed = SimpleNamespace(hidden_states=x, topk_output=given.topk_output)
        output: Tensor = fused_moe_forward_native(layer, handed).hidden_states
        return output.bfloat16()

    monkeypatch.setattr(triton, "fused_experts", plain)
    monkeypatch.setattr(_bench_weights, "ROTATED_BYTES", 1e5)
    return calls


def _worth(weight: Tensor, scale: Tensor | None, given: SimpleNamespace) -> Tensor:
    """What SGLang's kernel makes of stored weights: one scale for each block of `block_shape`."""
    if scale is None:
        assert given.use_fp8_w8a8 is False
        return weight.float()
    assert given.use_fp8_w8a8 is True
    rows, columns = given.block_shape
    blocks = scale.repeat_interleave(rows, dim=1).repeat_interleave(columns, dim=2)
    return weight.float() * blocks


def cell_of(shape: LayerShape, quant: Format) -> Cell:
    bench = LayerBench(clocks=ToldClocks(), card=CARD, sides=(Sglang(),))
    (block,) = bench_layer(bench, (shape,), (quant,), (), Steps())
    (cell,) = block.cells
    return cell


@pytest.mark.parametrize("quant", [Bf16(), Fp8BlockScale()], ids=["bf16", "fp8_block"])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "deepseek-v3-32", "glm-4.5-air"])
def test_the_layer_is_the_benchs(
    name: str, quant: Format, kernels: list[dict[str, object]]
) -> None:
    """Weights, scales, gate, bias and factor: what is out of the bound of float64 is not timed."""
    cell = cell_of(SHAPES[name], quant)
    assert (cell.state, cell.reason) == ("timed", "")
    config = kernels[0]["moe_runner_config"]
    experts = SHAPES[name].num_experts
    # Unequal, SGLang looks for rows of other ranks' experts in every launch.
    assert vars(config)["num_experts"] == vars(config)["num_local_experts"] == experts
    assert vars(config)["inplace"] is False


def test_what_the_process_has_published_stays(kernels: list[dict[str, object]]) -> None:
    from sglang.srt.runtime_context import get_context, get_parallel

    before = get_context(), get_parallel()
    assert cell_of(SHAPES["qwen3-30b-a3b"], Bf16()).state == "timed"
    assert (get_context(), get_parallel()) == before
    assert kernels
