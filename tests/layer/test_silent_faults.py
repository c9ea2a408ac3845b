"""What a layer must not do silently: wrong numbers from shards, stale scales, foreign ids."""

from __future__ import annotations

from typing import final

import attrs
import pytest
import torch
from torch import Tensor
from typing_extensions import override

from tests import oracle
from tests.layer.build import Build, random_experts, relative_error, separate
from typed_moe import (
    CheckpointError,
    DeepSeekV3,
    Format,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    Placement,
    ReferenceKernel,
    Relu2,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    RoutingStrategy,
    UnsupportedRouting,
)
from typed_moe.quantization import quantize_weight

RULE = oracle.RULES["Renormalize"]


def _quantised(experts: oracle.Experts, fmt: Format, scale_name: str) -> list[tuple[str, Tensor]]:
    named: list[tuple[str, Tensor]] = []
    for name, weight in separate(experts):
        stored = quantize_weight(weight, fmt)
        named.append((name, stored.data))
        assert stored.scale is not None
        named.append((name.replace("weight", scale_name), stored.scale))
        if stored.global_scale is not None:
            named.append((name.replace("weight", "weight_scale_2"), stored.global_scale))
    return named


@pytest.mark.parametrize(
    ("fmt", "scale_name", "width"),
    [
        (Fp8BlockScale(), "weight_scale_inv", 384),
        (Fp8PerChannel(), "weight_scale", 90),
        (MxFp8(), "weight_scale", 96),
        (MxFp4(), "weight_scale", 96),
        (MxInt4(), "weight_scale", 96),
        (Nvfp4(), "weight_scale", 48),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_shards_that_cut_a_checkpoints_blocks(fmt: Format, scale_name: str, width: int) -> None:
    """A quantised checkpoint into an unquantised layer, its blocks cut in two by the ranks."""
    experts = random_experts(2, 128, width)
    # Rows and columns of very different size, so that each block's scale matters.
    size = torch.exp2(torch.arange(width) % 7 - 3.0)
    experts.up.mul_(size.unsqueeze(1))
    tensors = _quantised(experts, fmt, scale_name)
    x, logits = torch.randn(8, 128), torch.randn(8, 2)
    build = Build(routing=Renormalize(), num_experts=2, hidden_size=128, intermediate_size=width)
    whole = build.empty()
    whole.load_weights(tensors)
    total = torch.zeros(8, 128)
    for rank in range(2):
        part = attrs.evolve(build, placement=Placement(tp_size=2, tp_rank=rank)).empty()
        part.load_weights(tensors)
        total += part(x, logits)

    assert relative_error(total, whole(x, logits).double()) < 1e-5


def test_loading_again_forgets_the_last_static_scales() -> None:
    """A second checkpoint's input scales replace the first one's, smaller or not."""
    layer = Build(routing=Renormalize(), quant=Fp8PerTensor()).empty()
    for scale in (0.5, 0.125):
        weights = separate(random_experts(8, 16, 12))
        weights += [
            (name.replace("weight", "input_scale"), torch.tensor(scale)) for name, _ in weights
        ]
        layer.load_weights(weights)

        assert float(layer.get_parameter("w13_input_scale")) == scale
        assert float(layer.get_parameter("w2_input_scale")) == scale


@final
@attrs.frozen(kw_only=True)
class Foreign(RoutingStrategy):
    """Ids that the layer does not have, or more of them than it asked for."""

    ids: tuple[int, ...]

    @property
    @override
    def name(self) -> str:
        """The name in plans."""
        return "Foreign"

    @override
    def select_experts(
        self, router_logits: Tensor, e_score_correction_bias: Tensor | None, *, shape: RoutingShape
    ) -> Routed:
        """The same ids for every token."""
        del e_score_correction_bias, shape
        ids = torch.tensor([self.ids], dtype=torch.int32).expand(router_logits.shape[0], -1)
        return Routed(topk_ids=ids, topk_weights=torch.ones(ids.shape))


def test_a_strategy_that_gives_more_slots_than_top_k() -> None:
    """The record says top_k, and a fused kernel would read the ids with that stride."""
    layer = Build(routing=Foreign(ids=(0, 1, 2))).loaded(random_experts(8, 16, 12))
    with pytest.raises(ValueError, match="top_k"):
        layer(torch.randn(3, 16), torch.randn(3, 8))


def test_ids_that_the_layer_does_not_have() -> None:
    """Acceptance 47: an id outside -1 to E - 1 raises; here it would run a shared expert twice."""
    build = Build(routing=Foreign(ids=(0, 8)), num_fused_shared_experts=1)
    layer = build.loaded(random_experts(9, 16, 12))
    with pytest.raises(ValueError, match="8"):
        layer(torch.randn(3, 16), torch.randn(3, 8))


@pytest.mark.parametrize("shape", [(0, 7), (0, 0)], ids=str)
def test_logits_of_another_layer_without_tokens(shape: tuple[int, int]) -> None:
    """T = 0 with the wrong number of experts is the same mistake as with tokens."""
    layer = Build(routing=Renormalize()).loaded(random_experts(8, 16, 12))
    with pytest.raises(ValueError, match=r"num_experts\) = \(0, 8\)"):
        layer(torch.empty(0, 16), torch.empty(shape))


def test_a_kernel_with_the_other_row_order() -> None:
    """It would compute silu(up) * gate from what a layer stores; without a gate it may run."""
    build = Build(routing=RenormalizeNaive(), kernel=ReferenceKernel(gate_first=False))
    with pytest.raises(UnsupportedRouting, match="up projection's rows first"):
        build.empty()
    attrs.evolve(build, activation=Relu2()).empty()


@pytest.mark.parametrize("top_k", [1.5, True, 2.0], ids=repr)
def test_a_top_k_that_is_no_int(top_k: int) -> None:
    """A config's 2.0 or true is refused where the shape is made, not inside a kernel."""
    with pytest.raises(TypeError, match="top_k"):
        RoutingShape(num_experts=8, top_k=top_k)


def test_calibrate_sees_what_the_oracle_sees() -> None:
    """The static scales are the largest input and the largest intermediate, over 448."""
    experts = random_experts(8, 16, 12)
    x, logits = torch.randn(64, 16), torch.randn(64, 8)
    layer = Build(routing=Renormalize(), quant=Fp8PerTensor()).loaded(experts)
    layer.calibrate(x, logits)
    seen: list[Tensor] = []

    def watch(hidden: Tensor) -> Tensor:
        seen.append(hidden.abs().max())
        return hidden

    chosen = oracle.route(RULE, logits, None, 2)
    oracle.moe(experts, x, chosen.ids, chosen.weights, oracle.Act(), rounding=watch)

    first, second = (float(layer.get_parameter(f"{n}_input_scale")) for n in ("w13", "w2"))
    assert first == pytest.approx(float(x.abs().max()) / 448, rel=1e-6)
    # The weights that calibrate multiplies with are the quantised ones.
    assert second == pytest.approx(float(torch.stack(seen).max()) / 448, rel=0.1)


def test_a_state_dict_does_not_round_the_bias() -> None:
    """sglang#37133 by another door: a float32 bias stays float32, or is refused."""
    experts, bias = random_experts(8, 16, 12), torch.linspace(6.817, 7.063, 8)
    build = Build(routing=DeepSeekV3())
    source, target = build.loaded(experts, bias), build.loaded(experts, bias.bfloat16())
    target.load_state_dict(source.state_dict())
    stored = target.e_score_correction_bias

    assert stored is not None
    assert torch.equal(stored.float(), bias)


def test_a_bias_that_is_given_twice() -> None:
    """As for every other tensor: two of one name are a mistake of the checkpoint's reader."""
    layer = Build(routing=DeepSeekV3()).empty()
    twice = [("e_score_correction_bias", torch.full((8,), value)) for value in (0.0, 1.0)]
    with pytest.raises(CheckpointError, match="given twice"):
        layer.load_weights(twice)
