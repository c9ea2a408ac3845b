"""`typed-moe run --checkpoint`: every layout, end to end, against a plain float64 computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.cli.calls import Cli, Done, number, part
from tests.cli.folders import MODELS, Folder, Tensors, model_folder
from tests.cli.plain import layer_output, relative
from typed_moe import (
    CheckpointLayout,
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    FusedMoE,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
)
from typed_moe.cli import _run
from typed_moe.cli._compare import Comparison, compare
from typed_moe.cli._stored import _plain
from typed_moe.cli._weights import draw_tokens
from typed_moe.quantization import dequantize_weight, quantize_weight
from typed_moe.testing._oracle import OracleExperts

TOKENS = 24


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The layer outputs that a run compared."""
    seen: list[Tensor] = []

    def watched(
        layer: FusedMoE, output: Tensor, hidden_states: Tensor, logits: Tensor, e: OracleExperts
    ) -> Comparison:
        seen.append(output)
        return compare(layer, output, hidden_states, logits, e)

    monkeypatch.setattr(_run, "compare", watched)
    return seen


def _expected(folder: Folder, *, num_shared: int = 0) -> Tensor:
    """Router and experts in float64, from the tensors that the test has written."""
    spec = folder.spec
    tokens = draw_tokens(TOKENS, spec.hidden_size, spec.router_hidden_size, seed=0)
    logits = torch.nn.functional.linear(tokens.router_input.float(), folder.gate, folder.gate_bias)
    return layer_output(
        spec, folder.experts, tokens.hidden_states, logits, folder.bias, num_shared=num_shared
    )


def _run_folder(cli: Cli, folder: Folder, *more: str) -> Done:
    path = str(folder.path)
    return cli("run", path, "--checkpoint", path, "--tokens", str(TOKENS), "--json", *more)


def test_every_layout_has_a_model() -> None:
    """The table below leaves no layout out."""
    assert set(MODELS.values()) == set(CheckpointLayout)


@pytest.mark.parametrize("model", MODELS)
def test_a_checkpoint_runs_to_the_plain_float64_output(
    cli: Cli, tmp_path: Path, outputs: list[Tensor], model: str
) -> None:
    """In float32 the output is the test's own; in bfloat16 within the bound, and the JSON says so."""
    folder = model_folder(tmp_path, model)
    assert folder.spec.layout is MODELS[model]

    exact = _run_folder(cli, folder, "--quant", "unquantized")
    rounded = _run_folder(cli, folder, "--quant", "bf16")

    expected = _expected(folder)
    assert (exact.status, rounded.status) == (0, 0)
    assert relative(outputs[0], expected) < 2e-6
    told = number(part(exact.json(), "accuracy"), "relative_error")
    assert told == pytest.approx(relative(outputs[0], expected), rel=0.05)
    assert str(exact.json()["weights"]) == f"read from {tmp_path}"
    assert "read" in part(exact.json(), "milliseconds")
    told = number(part(rounded.json(), "accuracy"), "relative_error")
    assert told == pytest.approx(relative(outputs[1], expected), rel=0.01)


def test_the_checkpoint_is_what_is_run(cli: Cli, tmp_path: Path, outputs: list[Tensor]) -> None:
    """One changed value in one expert that tokens go to changes the output."""
    folder = model_folder(tmp_path, "qwen3-30b-a3b")
    _run_folder(cli, folder, "--quant", "unquantized")
    changed = {
        name: tensor * (1.5 if "3.down_proj" in name else 1.0)
        for name, tensor in folder.tensors.items()
    }
    folder.write(changed)
    _run_folder(cli, folder, "--quant", "unquantized")

    assert relative(outputs[1], outputs[0].double()) > 0.01


@pytest.mark.parametrize("model", ["deepseek-v3", "deepseek-v4-flash"])
def test_shared_experts_of_a_checkpoint_are_fused(
    cli: Cli, tmp_path: Path, outputs: list[Tensor], model: str
) -> None:
    """Two shared experts, stored as one wide expert, are added with weight 1."""
    folder = model_folder(tmp_path, model, shared=2, n_shared_experts=2)
    if model == "deepseek-v4-flash":
        letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
        folder.write({_renamed(name, letters): t for name, t in folder.tensors.items()})

    done = _run_folder(cli, folder, "--quant", "unquantized", "--fused-shared")

    assert done.status == 0
    assert "8 + 2 fused shared" in str(part(done.json(), "plan")["experts"])
    assert relative(outputs[0], _expected(folder, num_shared=2)) < 2e-6


def _renamed(name: str, words: dict[str, str]) -> str:
    for word, other in words.items():
        name = name.replace(word, other)
    return name


def _fp8(folder: Folder) -> Tensors:
    """The experts as DeepSeek stores them: FP8 in blocks, `weight_scale_inv` beside."""
    stored: Tensors = {}
    for name, tensor in folder.tensors.items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        q = quantize_weight(tensor, Fp8BlockScale())
        assert q.scale is not None
        stored |= {name: q.data, f"{name}_scale_inv": q.scale}
    return stored


def test_an_fp8_checkpoint(cli: Cli, tmp_path: Path, outputs: list[Tensor]) -> None:
    """Run in float32 it is exact on its own values; in FP8 only the activations are rounded."""
    folder = model_folder(tmp_path, "deepseek-v3", shared=1)
    folder.write(_fp8(folder))

    exact = _run_folder(cli, folder, "--quant", "unquantized", "--fused-shared")
    fp8 = _run_folder(cli, folder, "--quant", "fp8_block", "--fused-shared")

    assert number(part(exact.json(), "accuracy"), "relative_error") < 2e-6
    again = number(part(fp8.json(), "accuracy"), "relative_error")
    # Weights and activations: e * sqrt(2 * 2) over two products; activations alone: e * sqrt(2).
    assert 0.02 < again < number(part(fp8.json(), "accuracy"), "bound") * 0.75
    assert relative(outputs[0], _expected(folder, num_shared=1)) < 0.06


def test_a_scale_that_a_cut_would_go_through(cli: Cli, tmp_path: Path) -> None:
    """Two shared experts of 96 in one of 192: two blocks of 128 rows, but none for each."""
    folder = model_folder(
        tmp_path, "deepseek-v3", shared=2, n_shared_experts=2, moe_intermediate_size=96
    )
    folder.write(_fp8(folder))

    done = _run_folder(cli, folder, "--quant", "fp8_block", "--fused-shared")

    assert done.status == 2
    assert "does not cut into 2 experts that are 96 wide" in done.err


def test_an_mxfp4_checkpoint(cli: Cli, tmp_path: Path, outputs: list[Tensor]) -> None:
    """gpt-oss as published: blocks and scales; exact in float32 and in MXFP4 but for bfloat16."""
    folder = model_folder(tmp_path, "gpt-oss-20b")
    stored = {n: t for n, t in folder.tensors.items() if not n.endswith("_proj")}
    for name in ("gate_up_proj", "down_proj"):
        full = f"{folder.spec.experts_prefix}.{name}"
        q = quantize_weight(folder.tensors[full].transpose(1, 2).contiguous(), MxFp4())
        assert q.scale is not None
        stored[f"{full}_blocks"] = q.data.reshape(*q.data.shape[:2], -1, 16)
        stored[f"{full}_scales"] = q.scale
    folder.write(stored)

    exact = _run_folder(cli, folder, "--quant", "unquantized")
    again = _run_folder(cli, folder, "--quant", "mxfp4")

    assert number(part(exact.json(), "accuracy"), "relative_error") < 2e-6
    assert number(part(again.json(), "accuracy"), "relative_error") < 0.008
    assert 0.03 < relative(outputs[0], _expected(folder)) < 0.4


def test_an_int4_checkpoint(cli: Cli, tmp_path: Path) -> None:
    """Kimi K2's form, packed by compressed-tensors: exact in float32, and in int4 but for bf16."""
    folder = model_folder(tmp_path, "kimi-k2")
    stored: Tensors = {}
    for name, tensor in folder.tensors.items():
        if "_proj" not in name:
            stored[name] = tensor
            continue
        q = quantize_weight(tensor, MxInt4())
        assert q.scale is not None
        offset = (q.data ^ 0x88).view(torch.int32)
        stored |= {f"{name}_packed": offset, f"{name}_scale": q.scale}
        stored[f"{name}_shape"] = torch.tensor(tensor.shape)
    folder.write(stored)

    exact = _run_folder(cli, folder, "--quant", "unquantized")
    again = _run_folder(cli, folder, "--quant", "mxint4")

    assert number(part(exact.json(), "accuracy"), "relative_error") < 2e-6
    assert number(part(again.json(), "accuracy"), "relative_error") < 0.008


def _static(folder: Folder, largest: float) -> Tensors:
    """The experts as ModelOpt stores them: FP8 with static activation scales for `largest`."""
    stored: Tensors = {}
    for name, tensor in folder.tensors.items():
        stored[name] = tensor
        if "_proj" in name:
            q = quantize_weight(tensor, Fp8PerTensor())
            assert q.scale is not None
            base = name.removesuffix("weight")
            stored |= {name: q.data, f"{base}weight_scale": q.scale}
            stored[f"{base}input_scale"] = torch.tensor(largest / 448)
    return stored


def test_static_scales_of_a_checkpoint_are_kept(cli: Cli, tmp_path: Path) -> None:
    """They are not calibrated anew; one that saturates what it has to hold exits with 1."""
    folder = model_folder(tmp_path, "qwen3-30b-a3b")
    folder.write(_static(folder, largest=40.0))
    good = _run_folder(cli, folder, "--quant", "fp8_per_tensor")
    folder.write(_static(folder, largest=2.0))
    saturated = _run_folder(cli, folder, "--quant", "fp8_per_tensor")

    assert (good.status, saturated.status) == (0, 1)
    assert "calibrate" not in part(good.json(), "milliseconds")
    assert number(part(good.json(), "accuracy"), "relative_error") < 0.08
    assert number(part(saturated.json(), "accuracy"), "relative_error") > 0.2


@pytest.mark.parametrize(
    "fmt",
    [Fp8PerTensor(), Fp8PerChannel(), Fp8BlockScale(), MxFp8(), MxFp4(), MxInt4(), Nvfp4()],
    ids=str,
)
def test_stored_values_are_read_as_the_format_says(
    fmt: Fp8PerTensor | Fp8PerChannel | Fp8BlockScale | MxFp8 | MxFp4 | MxInt4 | Nvfp4,
) -> None:
    """The oracle's own reading of each format equals the package's, block edges included."""
    weight = torch.randn(160, 224) * torch.logspace(-2, 2, 224)
    q = quantize_weight(weight, fmt)

    values = _plain(q.data, q.scale, q.global_scale)

    assert values.dtype is torch.float64
    torch.testing.assert_close(values.float(), dequantize_weight(q, fmt), rtol=1e-6, atol=0)


def test_an_expert_of_the_tests_is_plain_arithmetic() -> None:
    """What the expected values above rest on, once by hand: w2 @ (silu(gate x) * up x)."""
    experts = oracle.Experts(
        up=torch.tensor([[[2.0]]]), gate=torch.tensor([[[1.0]]]), down=torch.tensor([[[3.0]]])
    )

    y = oracle.expert(experts, 0, torch.tensor([[0.5]]), oracle.Act())

    assert float(y) == pytest.approx(3.0 * (0.5 / (1 + 2.718281828**-0.5)) * 1.0, rel=1e-6)
