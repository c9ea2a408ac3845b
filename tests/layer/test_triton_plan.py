"""What the Triton experts take, which tiles they run with, and the plan's choice. No GPU, no Triton."""

from __future__ import annotations

from typing import Literal

import attrs
import pytest
import torch

from typed_moe import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
    ReferenceKernel,
    Refused,
    RenormalizeNaive,
    RoutingForm,
    RoutingShape,
    Swiglu,
    TritonKernel,
    Unquantized,
    UnsupportedRouting,
)
from typed_moe.config import Placement
from typed_moe.kernels import ExpertWeights, KernelRequest, triton_experts
from typed_moe.kernels._expert_tiles import (
    ANY_CARD,
    HOPPER,
    ExpertTile,
    GemmTile,
    Operand,
    table_of,
    tile_of,
    tile_refusal,
)
from typed_moe.routing import KernelRules
from typed_moe.runners import _planning
from typed_moe.runners._planning import decide

REQUEST = KernelRequest(
    shape=RoutingShape(num_experts=16, top_k=4),
    quant=Bf16(),
    activation=Swiglu(),
    placement=Placement(),
    hidden_size=256,
    intermediate_size=256,
    num_fused_shared_experts=0,
    has_bias=True,
    device=torch.device("cuda"),
    dtype=torch.bfloat16,
)
OPERANDS = pytest.mark.parametrize("operand", ["bf16", "fp8", "mxfp8", "fp4"])


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a Hopper card: Triton runs there, FlashInfer's kernels do not."""
    monkeypatch.setattr(triton_experts, "fused_routing_refusal", lambda _device: None)
    monkeypatch.setattr(
        _planning, "installed_flashinfer", lambda _device: Refused("Blackwell only")
    )


@pytest.mark.usefixtures("card")
def test_it_is_taken_after_flashinfer_and_before_the_reference() -> None:
    """From logits, without being asked for, and the plan has every reason."""
    plan = decide(REQUEST, RenormalizeNaive()).plan
    assert plan.kernel == "triton"
    assert plan.form is RoutingForm.IN_KERNEL
    assert not plan.degraded
    assert [one.taken for one in plan.candidates] == [False, False, True]
    assert all("Blackwell only" in one.reason for one in plan.candidates[:2])


@pytest.mark.usefixtures("card")
def test_what_it_refuses_has_no_kernel_on_the_card() -> None:
    """The reference still runs only when asked for, and the message has both reasons."""
    request = attrs.evolve(REQUEST, quant=MxInt4(), has_bias=False)
    with pytest.raises(UnsupportedRouting) as raised:
        decide(request, RenormalizeNaive())
    assert "refused  triton, in-kernel routing: multiplies bf16, unquantized" in str(raised.value)
    assert "nvfp4; this layer's format is mxint4" in str(raised.value)
    assert "only when asked for" in str(raised.value)
    assert decide(request, RenormalizeNaive(), kernel=ReferenceKernel()).plan.kernel == "reference"


GEMM = GemmTile(block_n=64, block_k=128, warps=4, stages=3)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("tile", "quant", "reason"),
    [
        (
            ExpertTile(block_m=32, first=GEMM, second=attrs.evolve(GEMM, block_k=256)),
            Fp8BlockScale(),
            "block_n or block_k of 256; allowed in fp8_block: up to 128",
        ),
        (
            ExpertTile(block_m=16, first=GEMM, second=attrs.evolve(GEMM, block_k=512)),
            Fp8BlockScale(),
            "block_n or block_k of 512; allowed in fp8_block: up to 256",
        ),
        (
            ExpertTile(block_m=16, first=attrs.evolve(GEMM, block_k=256, tma=True), second=GEMM),
            Fp8BlockScale(),
            "block_n or block_k of 256; allowed in fp8_block: up to 128",
        ),
        (
            ExpertTile(block_m=64, first=attrs.evolve(GEMM, block_n=256), second=GEMM),
            Fp8BlockScale(),
            "block_n or block_k of 256; allowed in fp8_block: up to 128",
        ),
        (
            ExpertTile(block_m=16, first=GEMM, second=GEMM, second_block_m=32),
            Bf16(),
            "second_block_m is 32, and its block_m 16; allowed: a divisor",
        ),
        (
            ExpertTile(block_m=48, first=GEMM, second=GEMM),
            Bf16(),
            "a size of 48; allowed: powers of two from 16 on",
        ),
        (
            ExpertTile(block_m=128, first=attrs.evolve(GEMM, persistent=True), second=GEMM),
            Bf16(),
            "persistent with block_m 128, second_block_m 128 and block_n 64; allowed: 128 each",
        ),
        (
            ExpertTile(
                block_m=128,
                first=attrs.evolve(GEMM, block_n=128, block_k=32, persistent=True),
                second=GEMM,
            ),
            Bf16(),
            "persistent with block_k 32; allowed: 64 in bf16 and 128 in fp8",
        ),
    ],
)
def test_a_tile_that_would_compute_something_else(
    tile: ExpertTile, quant: Format, reason: str
) -> None:
    """A step of FP8 blocks has one scale, and a grid of no programs writes nothing."""
    refused = TritonKernel(tile=tile).rules(attrs.evolve(REQUEST, quant=quant))
    assert isinstance(refused, Refused)
    assert reason in refused.reason


@pytest.mark.parametrize("name", ["w13_weight", "w2_scale"])
def test_transposed_tensors_are_refused(name: str) -> None:
    """As `load_state_dict(assign=True)` may bring them: they are read row by row."""
    given = {
        "w13_weight": torch.zeros(2, 512, 256, dtype=torch.float8_e4m3fn),
        "w2_weight": torch.zeros(2, 256, 256, dtype=torch.float8_e4m3fn),
        "w13_scale": torch.ones(2, 4, 2),
        "w2_scale": torch.ones(2, 2, 2),
    }
    kernel, request = TritonKernel(), attrs.evolve(REQUEST, quant=Fp8BlockScale())
    kernel.prepare(ExpertWeights(**given), request)
    given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match=rf"{name} .*Pass {name}.contiguous\(\)"):
        kernel.prepare(ExpertWeights(**given), request)


def test_without_a_card_it_says_so() -> None:
    """A CPU layer that asks for it: a sentence, not a fault."""
    rules = TritonKernel().rules(attrs.evolve(REQUEST, device=torch.device("meta")))
    if isinstance(rules, KernelRules):
        pytest.skip("Triton's interpreter serves every device")
    assert "needs Triton" in rules.reason or "runs on CUDA devices" in rules.reason


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (
            attrs.evolve(REQUEST, quant=Unquantized(), dtype=torch.float32),
            "this layer's are torch.float32; pass dtype=torch.bfloat16",
        ),
        (attrs.evolve(REQUEST, quant=MxInt4()), "this layer's format is mxint4"),
        (
            attrs.evolve(REQUEST, quant=Fp8PerTensor(), hidden_size=264),
            "multiples of 16 in the format fp8_per_tensor; this layer has hidden_size 264",
        ),
        (
            attrs.evolve(REQUEST, quant=MxFp4(), hidden_size=272),
            "multiples of 32 in the format mxfp4; this layer has hidden_size 272",
        ),
        (
            attrs.evolve(REQUEST, quant=MxFp8(), intermediate_size=272),
            "multiples of 32 in the format mxfp8; this layer has hidden_size 256 and, on",
        ),
        (
            attrs.evolve(REQUEST, quant=Nvfp4(), intermediate_size=40),
            "multiples of 16 in the format nvfp4; this layer has hidden_size 256 and, on",
        ),
        (
            attrs.evolve(REQUEST, hidden_size=36),
            "multiples of 8 in the format bf16; this layer has hidden_size 36",
        ),
        (
            attrs.evolve(REQUEST, quant=Fp8BlockScale(), placement=Placement(tp_size=4)),
            "multiples of 128 in the format fp8_block; this layer has hidden_size 256 and, on",
        ),
        (
            attrs.evolve(REQUEST, num_fused_shared_experts=1, placement=Placement(ep_size=2)),
            "added once per rank; run them unfused",
        ),
    ],
)
def test_refusals(request_: KernelRequest, reason: str) -> None:
    """What it does not multiply, with the numbers."""
    rules = TritonKernel().rules(request_)
    assert isinstance(rules, Refused)
    assert reason in rules.reason


@pytest.mark.usefixtures("card")
def test_native_fp8_is_refused_where_a_card_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name; left out, such a card converts in registers."""
    monkeypatch.setattr(triton_experts, "_has_fp8", lambda _device: False)
    request = attrs.evolve(REQUEST, quant=Fp8BlockScale())
    rules = TritonKernel(fp8="native").rules(request)
    assert isinstance(rules, Refused)
    assert "start at compute capability 8.9; leave it out" in rules.reason
    assert isinstance(TritonKernel().rules(request), KernelRules)


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "quant",
    [Fp8PerTensor(), MxFp8(), MxFp4(), MxFp4(activation="mxfp8"), Nvfp4()],
    ids=repr,
)
def test_the_formats_are_planned_on_every_card(
    quant: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without being asked for, with FP8 matrix units or without."""
    for has_fp8 in (True, False):
        monkeypatch.setattr(triton_experts, "_has_fp8", lambda _device, has=has_fp8: has)
        plan = decide(attrs.evolve(REQUEST, quant=quant, has_bias=False), RenormalizeNaive()).plan
        assert plan.kernel == "triton"
        assert plan.form is RoutingForm.IN_KERNEL


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("quant", [MxFp8(), MxFp4(), Nvfp4()], ids=lambda quant: quant.name)
@pytest.mark.parametrize("fp8", ["native", "bits"])
def test_fp8_says_nothing_about_mx_and_fp4(fp8: Literal["native", "bits"], quant: Format) -> None:
    """Refused instead of ignored."""
    rules = TritonKernel(fp8=fp8).rules(attrs.evolve(REQUEST, quant=quant))
    assert isinstance(rules, Refused)
    assert f"{quant.name} becomes bfloat16 in registers on every card" in rules.reason


@pytest.mark.usefixtures("card")
def test_a_step_is_whole_groups() -> None:
    """A tile of one's own whose step is less than a matrix unit takes of two bytes a time."""
    gemm = GemmTile(block_n=32, block_k=32, warps=4, stages=2)
    kernel = TritonKernel(
        tile=ExpertTile(block_m=16, first=attrs.evolve(gemm, block_k=64), second=gemm)
    )
    rules = kernel.rules(attrs.evolve(REQUEST, quant=Nvfp4()))
    assert isinstance(rules, Refused)
    assert "block_k are 64 and 32; allowed in nvfp4: 64 and above" in rules.reason
    assert isinstance(kernel.rules(attrs.evolve(REQUEST, quant=MxFp8())), KernelRules)
    assert isinstance(kernel.rules(REQUEST), KernelRules)


@pytest.mark.usefixtures("card")
def test_blocks_of_eight_rows_are_for_weights_with_groups() -> None:
    """There rows are a product's columns, of which eight are enough; not in bfloat16, and not four."""
    gemm = GemmTile(block_n=32, block_k=64, warps=4, stages=2)
    eight = TritonKernel(tile=ExpertTile(block_m=8, first=gemm, second=gemm))
    assert isinstance(eight.rules(attrs.evolve(REQUEST, quant=MxFp4())), KernelRules)
    rules = eight.rules(REQUEST)
    assert isinstance(rules, Refused)
    assert "the tile has a size of 8; allowed: powers of two from 16 on" in rules.reason
    four = TritonKernel(tile=ExpertTile(block_m=4, first=gemm, second=gemm))
    rules = four.rules(attrs.evolve(REQUEST, quant=MxFp4()))
    assert isinstance(rules, Refused)
    assert "the tile has a size of 4; allowed: powers of two from 8 on" in rules.reason


@OPERANDS
def test_tiles_fit_their_cards(operand: Operand) -> None:
    """Pipelines within the shared memory of a program: 227 KB on Hopper, 99 KB on any card."""
    for tables, limit in ((HOPPER, 227), (ANY_CARD, 99)):
        for _, tile in tables[operand]:
            assert tile.shared_memory(operand, gated=True) <= limit * 1024
            if operand == "fp8":
                assert tile_refusal(tile, blocks=True) is None


@OPERANDS
def test_a_tile_for_every_size_and_card(operand: Operand) -> None:
    """Taller blocks for fuller experts; a card of another name has the tiles that fit any."""
    assert table_of("NVIDIA H100 80GB HBM3", operand, 4096) is HOPPER[operand]
    assert table_of("NVIDIA GeForce RTX 4090", operand, 4096) is ANY_CARD[operand]
    narrow = table_of("NVIDIA H100 80GB HBM3", operand, 2048)
    for table in (HOPPER[operand], narrow, ANY_CARD[operand]):
        assert [most for most, _ in table] == sorted({most for most, _ in table})
        heights = [tile_of(table, rows).block_m for rows in (0.01, 1, 8, 8.1, 64, 97, 4096, 2**40)]
        assert heights == sorted(heights)
        assert heights[0] == (8 if operand in {"mxfp8", "fp4"} else 16)
        assert heights[-1] == table[-1][1].block_m
