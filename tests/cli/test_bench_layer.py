"""`typed-moe bench layer` without a GPU: what is checked, what is timed, what the report says.

The clocks are told; everything else is real: layers, peers, oracle, floor, options, files.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.cli.calls import Cli, items, number, part
from tests.cli.clocks import EAGER_US, GRAPH_US, PEAK_BYTES, ToldClocks
from tests.cli.plain import rule_of
from tests.models.hf import quiet_import
from typed_moe.cli import (
    _bench_layer_command,
    _bench_weights,
    _peer,
    _peer_cutile,
    _peer_sglang,
)
from typed_moe.cli._bench_card import Card, floor_of, measure_card
from typed_moe.cli._bench_layer import Block, Cell, LayerBench, bench_layer
from typed_moe.cli._bench_shapes import SHAPE_NAMES, LayerShape, chosen_shapes, layer_shapes
from typed_moe.cli._bench_weights import StoredLayer, draw_inputs, draw_layer, num_layers
from typed_moe.cli._peer import Built, Ours, Side
from typed_moe.cli._peer_routing import route_in_torch
from typed_moe.cli._peer_sglang import Sglang
from typed_moe.cli._peer_torch import TorchGroupedMm
from typed_moe.cli._peer_transformers import Transformers
from typed_moe.cli._progress import Steps
from typed_moe.cli._verify_expected import as_read
from typed_moe.config import FORMATS, Bf16, Format, Fp8BlockScale, MxFp4, MxFp8, Nvfp4
from typed_moe.kernels import DeepGemmKernel, ReferenceKernel
from typed_moe.routing import BiasRule, MiniMax2, Refused
from typed_moe.testing._oracle import experts_float64

CPU = torch.device("cpu")
HIDDEN, INTERMEDIATE, EXPERTS = 128, 256, 8
CARD = Card(bytes_per_second=2e12, bf16_flops=5e14, fp8_flops=1e15, fp8_source="told", width=64)


def small(shape: LayerShape) -> LayerShape:
    """A released model's shape with its widths and experts cut down."""
    return attrs.evolve(
        shape,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_experts=EXPERTS,
        top_k=min(shape.top_k, 4),
        tokens=(1, 8),
    )


SMALL = tuple(small(shape) for shape in layer_shapes())


@pytest.fixture(autouse=True)
def few_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not so many that small layers are more than 100 MB."""
    monkeypatch.setattr(_bench_weights, "ROTATED_BYTES", 2.5e6)


def block_of(
    *sides: Side,
    shape: LayerShape = SMALL[0],
    quant: Format = Bf16(),  # noqa: B008 - frozen
    tokens: Sequence[int] = (8,),
    clocks: ToldClocks | None = None,
) -> Block:
    bench = LayerBench(clocks=clocks or ToldClocks(), card=CARD, sides=sides)
    (block,) = bench_layer(bench, (shape,), (quant,), tokens, Steps())
    return block


def only(block: Block) -> Cell:
    (cell,) = block.cells
    return cell


@attrs.frozen(kw_only=True)
class Bent:
    """This package's layer, whose output is then changed."""

    change: Callable[[Tensor], Tensor]
    name: str = "bent"

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        made = Ours().build(stored)
        assert isinstance(made, Built)

        def bent(run: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
            return lambda x, logits: self.change(run(x, logits))

        return attrs.evolve(made, layers=tuple(bent(run) for run in made.layers))


def unwritten_row(output: Tensor) -> Tensor:
    made = torch.empty_like(output)
    made[1:] = output[1:]
    return made


def raises(output: Tensor) -> Tensor:
    raise RuntimeError("CUDA error: an illegal memory access\nmore of it")


# --- what is checked ------------------------------------------------------------------------------


@pytest.mark.parametrize("quant", FORMATS.values(), ids=FORMATS)
def test_every_format_is_drawn_and_its_layer_is_right(quant: Format) -> None:
    """The stored values, their scales by name, and the oracle's reading of them agree."""
    cell = only(block_of(Ours(), quant=quant))
    assert (cell.state, cell.reason) == ("timed", "")
    assert cell.error is not None
    assert 0 < cell.error < 0.01


@pytest.mark.parametrize("shape", SMALL, ids=[shape.name for shape in SMALL])
@pytest.mark.parametrize("side", [Ours(), TorchGroupedMm(), Transformers()])
def test_every_side_is_right_at_every_shape(shape: LayerShape, side: Side) -> None:
    """Or says which shape it is not timed at."""
    if isinstance(side, Transformers):
        pytest.importorskip("transformers")
        quiet_import("transformers.models.qwen3_moe.modeling_qwen3_moe")
    block = block_of(side, shape=shape, tokens=(1, 33))
    plain = shape.name not in {"llama4-scout", "gpt-oss-120b-32"}
    timed = plain or not isinstance(side, Transformers)
    assert {cell.state for cell in block.cells} == {"timed" if timed else "absent"}
    if not timed:
        assert "plain SwiGLU" in block.cells[0].reason


@pytest.mark.parametrize(
    ("change", "state", "said"),
    [
        (lambda output: output * 1.02, "wrong", "1.02 times the oracle's"),
        (lambda output: output.flip(0), "wrong", "the error is"),
        (unwritten_row, "wrong", "not finite"),
        (raises, "failed", "RuntimeError: CUDA error: an illegal memory access"),
    ],
    ids=["two per cent", "other rows", "a row unwritten", "raises"],
)
def test_what_is_wrong_is_said_and_not_timed(
    change: Callable[[Tensor], Tensor], state: str, said: str
) -> None:
    """And the sides after it are measured all the same."""
    clocks = ToldClocks()
    block = block_of(Bent(change=change), Ours(), clocks=clocks)
    first, second = block.cells

    assert first.state == state
    assert said in first.reason
    assert (first.us, first.share, first.eager_us) == (None, None, None)
    assert second.state == "timed"
    assert clocks.graphs == 1


def test_an_error_that_is_no_number_is_none_in_the_file() -> None:
    """JSON has neither NaN nor infinity."""
    for factor in (torch.nan, torch.inf):
        bent = Bent(change=partial(torch.full_like, fill_value=factor))
        cell = only(block_of(bent))
        assert (cell.state, cell.error) == ("wrong", None)


def test_nothing_is_kept_for_a_gradient() -> None:
    seen: list[bool] = []

    def look(output: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return output

    bench = LayerBench(clocks=ToldClocks(), card=CARD, sides=(Bent(change=look),))
    for _ in bench_layer(bench, SMALL[:2], (Bf16(),), (1,), Steps()):
        assert torch.is_grad_enabled()
    assert seen
    assert not any(seen)


@attrs.frozen(kw_only=True)
class Exact:
    """Experts whose intermediate is not rounded, which `rounds_intermediate` may deny."""

    rounds_intermediate: bool
    name: str = "exact"

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        one = stored[0]

        def run(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
            routed = route_in_torch(one.shape, router_logits, one.correction_bias)
            return experts_float64(
                as_read(hidden_states, one.quant, None),
                routed.topk_ids,
                routed.topk_weights,
                one.oracle(rounded=False),
            ).bfloat16()

        return Built(layers=(run,), about="", rounds_intermediate=self.rounds_intermediate)


def test_the_oracle_rounds_in_between_where_a_side_does() -> None:
    """Without MXFP8's rounding in between nothing is left of the error but bfloat16's."""
    right = only(block_of(Exact(rounds_intermediate=False), quant=MxFp8()))
    other = only(block_of(Exact(rounds_intermediate=True), quant=MxFp8()))
    assert right.error is not None
    assert other.error is not None
    assert right.error < 0.003 < 0.01 < other.error


def test_a_side_that_cannot_be_captured_has_its_host_time() -> None:
    clocks = ToldClocks(no_graph="operation not permitted when stream is capturing")
    cell = only(block_of(Ours(), clocks=clocks))
    assert (cell.state, cell.graph_us, cell.us) == ("timed", None, EAGER_US)
    assert cell.reason.startswith("in no CUDA graph: RuntimeError: operation not permitted")


def test_other_formats_are_refused_by_the_peers() -> None:
    for side in (TorchGroupedMm(), Transformers(), _peer_cutile.FlashInferCuTile()):
        cell = only(block_of(side, quant=Fp8BlockScale()))
        assert cell.state == "absent"
        assert "bfloat16 alone" in cell.reason or "timed in bf16, and in mxfp4" in cell.reason
    cell = only(block_of(Sglang(), quant=MxFp8()))
    assert (cell.state, cell.reason) == (
        "absent",
        "SGLang's Triton runner is timed in bf16 and in fp8_block",
    )


def test_sglang_says_what_it_is_not_timed_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not installed; in parts; other experts; a gate that its TopK is not made for here."""
    monkeypatch.setattr(_peer_sglang, "version_of", lambda name: None)
    shapes = {shape.name: shape for shape in SMALL}
    said = {name: only(block_of(Sglang(), shape=shape)).reason for name, shape in shapes.items()}
    other = {name: said.pop(name) for name in ("llama4-scout", "gpt-oss-120b-32")}
    assert set(said.values()) == {"sglang is not installed; pip install sglang"}
    assert all("plain SwiGLU" in reason for reason in other.values())
    minimax = attrs.evolve(SMALL[0], routing=MiniMax2())
    assert (
        "softmax and DeepSeek gates, not MiniMax2" in only(block_of(Sglang(), shape=minimax)).reason
    )

    monkeypatch.setattr(_peer_sglang, "version_of", lambda name: "0.5.23")
    monkeypatch.setitem(sys.modules, "sglang.srt.runtime_context", None)
    cell = only(block_of(Sglang()))
    assert cell.state == "absent"
    assert cell.reason.startswith("sglang 0.5.23: ")


def test_cutile_gets_the_gate_where_it_reads_it() -> None:
    """FlashInfer's preparation turns its own order into the kernel's, which is ours, transposed."""
    pytest.importorskip("flashinfer")
    fused_moe = quiet_import("flashinfer.fused_moe")
    stored = draw_layer(SMALL[0], Bf16(), 0, CPU)
    view = _peer_cutile.weight_view(fused_moe, stored)
    assert torch.equal(view["w1"].transpose(1, 2), stored.state["w13_weight"])
    assert torch.equal(view["w2"].transpose(1, 2), stored.state["w2_weight"])
    packed = draw_layer(SMALL[0], MxFp4(), 0, CPU)
    made = _peer_cutile.weight_view(fused_moe, packed)
    for name, ours in (("w1", "w13_weight"), ("w2", "w2_weight")):
        assert torch.equal(made[name], packed.state[ours])


def test_cutile_without_a_gpu_is_absent_with_a_reason() -> None:
    cell = only(block_of(_peer_cutile.FlashInferCuTile()))
    assert cell.state == "absent"
    assert cell.reason


@pytest.mark.parametrize("shape", SMALL, ids=[shape.name for shape in SMALL])
def test_the_peers_routing_is_the_models(shape: LayerShape) -> None:
    """Against the tests' own float64 rule."""
    inputs = draw_inputs(shape, 64, CPU)
    bias = None
    if shape.routing.bias is BiasRule.REQUIRED:
        bias = torch.linspace(-0.1, 0.1, EXPERTS)
    routed = route_in_torch(shape, inputs.router_logits, bias)
    expected = oracle.route(rule_of(shape.routing), inputs.router_logits, bias, shape.top_k)
    mine = oracle.dense(routed.topk_ids.long(), routed.topk_weights.double(), EXPERTS)
    theirs = oracle.dense(expected.ids, expected.weights, EXPERTS)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


# --- the floor and the weights --------------------------------------------------------------------


def test_the_floor_is_bytes_over_the_copy_or_operations_over_the_product() -> None:
    """By hand: at T = 1 the weights of k experts, at T = 1024 the products of T k slots."""
    few, many = block_of(Ours(), tokens=(1, 1024)).cells
    top_k = SMALL[0].top_k
    expert = 3 * HIDDEN * INTERMEDIATE
    assert few.experts_used == top_k
    assert few.floor.memory_us == pytest.approx((top_k * expert * 2 + 2 * HIDDEN * 2) / 2e12 * 1e6)
    assert many.experts_used == EXPERTS
    assert many.floor.compute_us == pytest.approx(2 * 1024 * top_k * expert / 5e14 * 1e6)
    assert (few.floor.by, many.floor.by) == ("memory", "matrix")
    assert many.floor.us == many.floor.compute_us
    assert many.share == pytest.approx(many.floor.us / GRAPH_US)
    assert many.intermediate_bytes == 1024 * top_k * INTERMEDIATE * 2


@pytest.mark.parametrize(
    ("quant", "bits", "rate"),
    [
        (Fp8BlockScale(), 8 + 32 / 128**2, 1e15),
        (Nvfp4(), 4 + 8 / 16, 1e15),
        (MxFp4(), 4 + 8 / 32, 5e14),
    ],
)
def test_the_floor_counts_stored_bits_and_the_formats_units(
    quant: Format, bits: float, rate: float
) -> None:
    cell = only(block_of(Ours(), quant=quant, tokens=(1,)))
    values = SMALL[0].top_k * 3 * HIDDEN * INTERMEDIATE
    moved = values * bits / 8 + 2 * HIDDEN * 2
    # Nvfp4 has two more numbers per expert.
    assert cell.floor.memory_us == pytest.approx(moved / 2e12 * 1e6, rel=1e-3)
    assert cell.floor.compute_us == pytest.approx(2 * values / rate * 1e6)


def test_a_card_is_what_its_copy_and_products_take() -> None:
    """Each of the told clock's calls takes 100 microseconds."""
    card = measure_card(ToldClocks(), copied=1 << 16, width=64)
    assert card.bytes_per_second == pytest.approx(2 * (1 << 16) / 100e-6)
    assert card.bf16_flops == pytest.approx(2 * 64**3 / 100e-6)
    assert card.fp8_flops in {card.bf16_flops, 2 * card.bf16_flops}
    assert ("twice" in card.fp8_source) == (card.fp8_flops == 2 * card.bf16_flops)


def test_a_card_without_fp8_products_is_said_to_have_twice_the_bf16_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_arguments: object, **_keywords: object) -> Tensor:
        raise RuntimeError("torch._scaled_mm is only supported on CUDA devices with 8.9")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    card = measure_card(ToldClocks(), copied=1 << 16, width=64)
    assert card.fp8_flops == 2 * card.bf16_flops
    assert card.fp8_source.startswith("twice the bfloat16 rate")


def test_the_larger_limit_is_the_floor() -> None:
    floor = floor_of(CARD, Bf16(), moved_bytes=2e6, flops=1e9)
    assert (floor.memory_us, floor.compute_us) == (1.0, 2.0)
    assert (floor.us, floor.by) == (2.0, "matrix")


def test_layers_are_more_than_the_cache_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two readings of an expert the others' chosen experts are read, 100 MB and more."""
    monkeypatch.setattr(_bench_weights, "ROTATED_BYTES", 100e6)
    stored = draw_layer(SMALL[0], Bf16(), 0, CPU)
    per_call = SMALL[0].top_k * 3 * HIDDEN * INTERMEDIATE * 2
    assert (num_layers(stored) - 1) * per_call > 100e6


def test_two_layers_have_other_weights_and_one_seed_the_same() -> None:
    first, second, again = (draw_layer(SMALL[1], Fp8BlockScale(), seed, CPU) for seed in (0, 1, 0))
    for name, tensor in first.state.items():
        assert torch.equal(tensor.float(), again.state[name].float()), name
        assert not torch.equal(tensor.float(), second.state[name].float()), name


def test_the_shapes_are_the_released_ones() -> None:
    sizes = {
        shape.name: (shape.num_experts, shape.top_k, shape.hidden_size, shape.intermediate_size)
        for shape in layer_shapes()
    }
    assert sizes == {
        "qwen3-30b-a3b": (128, 8, 2048, 768),
        "deepseek-v3-32": (32, 8, 7168, 2048),
        "qwen3-next-80b-a3b": (512, 10, 2048, 512),
        "llama4-scout": (16, 1, 5120, 8192),
        "gpt-oss-120b-32": (32, 4, 2880, 2880),
        "glm-4.5-air": (128, 8, 4096, 1408),
    }
    assert tuple(sizes) == SHAPE_NAMES
    assert [shape.name for shape in chosen_shapes(("glm-4.5-air", "glm-4.5-air"))] == [
        "glm-4.5-air"
    ]


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> ToldClocks:
    """The command, on told clocks and small shapes."""
    clocks = ToldClocks()
    by_name = {shape.name: shape for shape in SMALL}

    def small_shapes(names: tuple[str, ...]) -> tuple[LayerShape, ...]:
        return tuple(by_name[shape.name] for shape in chosen_shapes(names))

    monkeypatch.setattr(_bench_layer_command, "cuda_clocks", lambda command: clocks)
    monkeypatch.setattr(_bench_layer_command, "measure_card", lambda clocks: CARD)
    monkeypatch.setattr(_bench_layer_command, "chosen_shapes", small_shapes)
    return clocks


@pytest.mark.usefixtures("told")
def test_table_json_and_picture_have_the_same(cli: Cli, tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "times.svg"
    names = ("--model", "glm-4.5-air", "--model", "llama4-scout", "--peer", "torch")
    done = cli("bench", "layer", *names, "--json", str(report), "--picture", str(picture))
    data = json.loads(report.read_text())
    rows = items(data, "rows")

    assert done.status == 0
    assert {(row["model"], row["format"], row["tokens"], row["side"]) for row in rows} == {
        (model, quant, tokens, side)
        for model in ("glm-4.5-air", "llama4-scout")
        for quant in ("bf16", "fp8_block")
        for tokens in (1, 8)
        for side in ("typed-moe", "torch")
    }
    for row in rows:
        if row["state"] == "timed":
            assert number(row, "graph_us") == GRAPH_US
            assert number(row, "eager_us") == EAGER_US
            assert number(row, "peak_bytes") == PEAK_BYTES
            assert number(row, "share_of_floor") == number(row, "floor_us") / GRAPH_US
        else:
            assert (row["side"], row["format"]) == ("torch", "fp8_block")
    assert part(data, "card")["bytes_per_second"] == 2e12
    # Title, then a heading, and a line of numbers per T, for each model and format.
    assert done.out.count("\nglm-4.5-air, ") == done.out.count("\nllama4-scout, ") == 2
    assert sum(line.split()[:1] in (["1"], ["8"]) for line in done.out.splitlines()) == 8
    assert "torch._grouped_mm takes bfloat16 alone" in done.out
    assert picture.read_text().count("<polyline") == 2 * (3 + 2)


@pytest.mark.usefixtures("told")
def test_launches_are_shown_where_they_are_asked_for(cli: Cli, tmp_path: Path) -> None:
    """Those of a hundredth of the call or more in the table, all of them in the file."""
    report = tmp_path / "report.json"
    argv = ("bench", "layer", "--model", "glm-4.5-air", "--format", "bf16", "--peer", "none")
    plain = cli(*argv)
    done = cli(*argv, "--tokens", "8", "--launches", "--json", str(report))
    assert "first_kernel" not in plain.out
    assert "T 8, typed-moe  first_kernel 60.0, fill 30.0 (2 times)\n" in done.out
    (row,) = items(json.loads(report.read_text()), "rows")
    assert [one["name"] for one in items(row, "launches")] == ["first_kernel", "fill", "small"]


def test_a_wrong_layer_of_ours_is_exit_status_1(
    cli: Cli, told: ToldClocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent = Bent(change=lambda output: output * 1.02, name="typed-moe")
    monkeypatch.setattr(_bench_layer_command, "sides", lambda peers, kernels: (bent,))
    done = cli("bench", "layer", "--model", "glm-4.5-air", "--tokens", "8", "--format", "bf16")
    assert done.status == 1
    assert "typed-moe wrong: the error is" in done.out
    assert told.graphs == 0


@pytest.mark.usefixtures("told")
def test_kernels_by_name_are_columns(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each a layer on that kernel, by its name in the report; one that is not there is a line."""
    kernels = {"triton": ReferenceKernel, "deep_gemm": DeepGemmKernel}
    monkeypatch.setattr(_peer, "_KERNELS", kernels)
    report = tmp_path / "report.json"
    argv = ("--model", "glm-4.5-air", "--format", "bf16", "--tokens", "8", "--peer", "none")
    named = ("--kernel", "triton", "--kernel", "deep_gemm", "--kernel", "triton")
    done = cli("bench", "layer", *argv, *named, "--json", str(report))
    data = json.loads(report.read_text())
    first, second = items(data, "rows")
    (block,) = items(data, "blocks")

    assert done.status == 0
    assert (first["side"], first["state"]) == ("triton", "timed")
    assert "kernel reference" in str(part(block, "sides")["triton"])
    assert (second["side"], second["state"]) == ("deep_gemm", "absent")
    assert "deep_gemm" in str(second["reason"])
    assert (block["num_experts"], block["top_k"]) == (EXPERTS, 4)
    assert (block["hidden_size"], block["intermediate_size"]) == (HIDDEN, INTERMEDIATE)
    assert block["libraries"] == {}
    assert str(data["date"]).count("-") == 2


def test_a_wrong_layer_on_a_kernel_by_name_is_exit_status_1(
    cli: Cli, told: ToldClocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    bent = Bent(change=lambda output: output * 1.02, name="triton")
    monkeypatch.setattr(_bench_layer_command, "sides", lambda peers, kernels: (bent,))
    argv = ("--model", "glm-4.5-air", "--tokens", "8", "--format", "bf16", "--kernel", "triton")
    assert cli("bench", "layer", *argv).status == 1
    assert told.graphs == 0


def test_a_format_that_cannot_store_a_shape_is_a_line(
    cli: Cli, told: ToldClocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = attrs.evolve(SMALL[0], intermediate_size=72)
    monkeypatch.setattr(_bench_layer_command, "chosen_shapes", lambda names: (odd,))
    done = cli("bench", "layer", "--format", "mxfp4", "--peer", "none")
    assert done.status == 0
    assert "not in this format" in done.out
    assert told.graphs == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("--model", "qwen"), "--model is 'qwen'; allowed: qwen3-30b-a3b, deepseek-v3-32"),
        (("--format", "fp4"), "--format is 'fp4'; allowed: unquantized, bf16"),
        (("--peer", "vllm"), "--peer is 'vllm'; allowed: torch, transformers, flashinfer-cutile"),
        (("--kernel", "vllm"), "--kernel is 'vllm'; allowed: triton, deep_gemm"),
        (("--tokens", "0"), "--tokens is 0; allowed: 1 to 1048576"),
        (("--json", "/no/such/folder/x.json"), "there is no folder /no/such/folder"),
        (("--json", "/tmp"), "/tmp is a folder; name a file in it"),
        (("--peer", "none", "--peer", "torch"), "--peer is 'none' beside others"),
        (("--picture", "/no/such/folder/x.svg"), "there is no folder /no/such/folder"),
    ],
)
def test_a_mistake_is_a_sentence(cli: Cli, argv: tuple[str, ...], said: str) -> None:
    done = cli("bench", "layer", *argv)
    assert (done.status, done.out) == (2, "")
    assert said in done.err
    assert done.err.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_it_says_so(cli: Cli) -> None:
    done = cli("bench", "layer")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: bench layer runs on a CUDA device; this torch (")
