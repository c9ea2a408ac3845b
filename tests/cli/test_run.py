"""`typed-moe run` on drawn weights: what it computes, prints and refuses to pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.cli.calls import Cli, number, part
from tests.cli.folders import model_folder
from typed_moe import FusedMoE, Swiglu, load_config, moe_spec, shipped_configs
from typed_moe.cli import _weights
from typed_moe.cli._weights import LOGITS_STD, DrawnWeights, draw_tokens, router_logits
from typed_moe.config import FORMATS, FormatName
from typed_moe.quantization import relative_error_bound

_SMALL = ("--layer-scale", "0.01")  # widths of 128, and 128 by 128 in most


def test_a_run_has_the_models_routing_shape_and_scaled_widths(cli: Cli) -> None:
    """E and k are the config's; the widths are shrunk to multiples of 128."""
    config = load_config("qwen3-30b-a3b")

    done = cli("run", "qwen3-30b-a3b", "--layer-scale", "0.2", "--tokens", "8", "--json")

    data = done.json()
    assert (done.status, done.err) == (0, "")
    assert data["num_experts"] == config["num_experts"]
    assert data["top_k"] == config["num_experts_per_tok"]
    assert (data["hidden_size"], data["intermediate_size"]) == (384, 128)  # 409.6 and 153.6
    assert (data["model_type"], data["layer"], data["tokens"]) == ("qwen3_moe", 0, 8)
    assert part(data, "plan")["strategy"] == "RenormalizeNaive()"


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_every_format_is_within_its_bound_and_is_really_used(cli: Cli, name: FormatName) -> None:
    """The error is under the format's bound, and over a fiftieth of it unless nothing is rounded."""
    done = cli("run", "deepseek-v3", "--quant", name, "--tokens", "32", "--json", *_SMALL)

    accuracy = part(done.json(), "accuracy")
    bound = relative_error_bound(FORMATS[name], Swiglu())
    error = number(accuracy, "relative_error")
    assert done.status == 0
    assert accuracy["passed"] is True
    assert accuracy["bound"] == pytest.approx(bound)
    assert accuracy["rows_with_other_experts"] == 0
    assert error < (1e-6 if name == "unquantized" else bound)
    assert name == "unquantized" or error > bound / 50


@pytest.mark.parametrize("model", shipped_configs())
def test_every_shipped_config_runs(cli: Cli, model: str) -> None:
    """A layer of each released model, in float32: the error is float32's."""
    done = cli(
        "run", model, "--quant", "unquantized", "--layer-scale", "0.01", "--tokens", "4", "--json"
    )

    accuracy = part(done.json(), "accuracy")
    assert done.status == 0
    assert number(accuracy, "relative_error") < 2e-6
    assert accuracy["rows_with_other_experts"] == accuracy["undecided_rows"]


def test_the_load_histogram_counts_every_slot(cli: Cli) -> None:
    """Counts add up to tokens times top_k, and the summary is the counts'."""
    done = cli("run", "olmoe-1b-7b", "--tokens", "40", "--json", *_SMALL)

    load = part(done.json(), "expert_load")
    counts = load["tokens_per_expert"]
    assert isinstance(counts, list)
    assert len(counts) == 64
    assert sum(counts) == 40 * 8
    assert (load["min"], load["max"]) == (min(counts), max(counts))
    assert load["unused"] == counts.count(0)
    assert number(load, "imbalance") == pytest.approx(max(counts) / (40 * 8 / 64))


def test_the_load_is_that_of_plain_top_k(cli: Cli) -> None:
    """The counts are those of torch.topk on the logits that the run draws."""
    done = cli("run", "olmoe-1b-7b", "--tokens", "40", "--seed", "5", "--json", *_SMALL)

    tokens = draw_tokens(40, 128, 128, seed=5)
    stream = torch.Generator().manual_seed(5 << 24)
    gate = torch.empty(64, 128).normal_(0.0, LOGITS_STD / 128**0.5, generator=stream).bfloat16()
    logits = tokens.router_input @ gate.T
    counts = torch.bincount(logits.float().topk(8).indices.flatten(), minlength=64)
    assert part(done.json(), "expert_load")["tokens_per_expert"] == counts.tolist()


def test_a_seed_is_repeatable_and_seeds_differ(cli: Cli) -> None:
    """The same seed gives the same error to the last bit; another one another."""

    def error(seed: str) -> float:
        done = cli("run", "mixtral-8x7b", "--tokens", "4", "--seed", seed, "--json", *_SMALL)
        return number(part(done.json(), "accuracy"), "relative_error")

    first = error("1")

    assert error("1") == first
    assert error("2") != first


def test_no_tokens_is_no_error(cli: Cli) -> None:
    """T = 0 gives an empty output, and says that there is nothing to compare."""
    done = cli("run", "qwen3-30b-a3b", "--tokens", "0", "--json", *_SMALL)
    text = cli("run", "qwen3-30b-a3b", "--tokens", "0", *_SMALL)

    data = done.json()
    assert (done.status, text.status) == (0, 0)
    assert part(data, "accuracy")["relative_error"] is None
    assert part(data, "expert_load")["imbalance"] is None
    assert data["tokens_per_second"] is None
    assert "nothing to compare" in text.out


def test_an_error_beyond_the_bound_exits_with_1(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that multiplies by 1.5 too much is off by a half, and that is said."""
    honest = FusedMoE.forward

    def wrong(self: FusedMoE, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        return 1.5 * honest(self, hidden_states, router_logits)

    monkeypatch.setattr(FusedMoE, "forward", wrong)
    done = cli("run", "qwen3-30b-a3b", "--tokens", "8", "--json", *_SMALL)
    text = cli("run", "qwen3-30b-a3b", "--tokens", "8", *_SMALL)

    accuracy = part(done.json(), "accuracy")
    assert (done.status, text.status) == (1, 1)
    assert number(accuracy, "relative_error") == pytest.approx(0.5, abs=0.01)
    assert accuracy["passed"] is False
    assert "FAIL" in text.out


def test_a_nan_in_the_output_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is not within any bound, and the JSON stays JSON."""

    def broken(self: FusedMoE, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        del self, router_logits
        return torch.full_like(hidden_states, torch.nan)

    monkeypatch.setattr(FusedMoE, "forward", broken)
    done = cli("run", "qwen3-30b-a3b", "--tokens", "8", "--json", *_SMALL)

    accuracy = part(done.json(), "accuracy")
    assert done.status == 1
    assert (accuracy["relative_error"], accuracy["passed"]) == (None, False)


def test_mistakes_of_ours_are_not_swallowed(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ValueError from the forward pass is a bug to be seen, not the user's mistake."""

    def broken(self: FusedMoE, hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        raise ValueError("a bug")

    monkeypatch.setattr(FusedMoE, "forward", broken)

    with pytest.raises(ValueError, match="a bug"):
        cli("run", "qwen3-30b-a3b", "--tokens", "8", *_SMALL)


def test_shared_experts_are_fused_on_request(cli: Cli) -> None:
    """DeepSeek-V2's two shared experts run as experts 160 and 161; without the flag they do not."""
    fused = cli("run", "deepseek-v2", "--tokens", "8", "--fused-shared", "--json", *_SMALL)
    plain = cli("run", "deepseek-v2", "--tokens", "8", "--json", *_SMALL)

    assert (fused.status, plain.status) == (0, 0)
    assert "160 + 2 fused shared" in str(part(fused.json(), "plan")["experts"])
    assert "fused shared" not in str(part(plain.json(), "plan")["experts"])
    assert "--fused-shared fuses it" in str(plain.json()["notes"])
    error = number(part(fused.json(), "accuracy"), "relative_error")
    assert error != number(part(plain.json(), "accuracy"), "relative_error")


@pytest.mark.parametrize(
    ("model", "why"),
    [
        ("qwen3-next-80b-a3b", "sigmoid_gated"),
        ("llama4-scout", "Llama4 weights the experts' input"),
        ("qwen3-30b-a3b", "has no shared expert to fuse"),
    ],
)
def test_shared_experts_that_cannot_be_fused_are_named(cli: Cli, model: str, why: str) -> None:
    """The run goes on without them and says why."""
    done = cli("run", model, "--tokens", "4", "--fused-shared", "--json", *_SMALL)

    data = done.json()
    assert done.status == 0
    assert why in str(data["notes"])
    assert "fused shared" not in str(part(data, "plan")["experts"])


def test_a_shared_expert_of_another_width_is_not_fused(cli: Cli, tmp_path: Path) -> None:
    """48 is no multiple of the routed experts' 32."""
    path = model_folder(
        tmp_path, "nemotron-3-nano-30b-a3b", moe_shared_expert_intermediate_size=48
    ).path

    done = cli("run", str(path), "--tokens", "4", "--fused-shared", "--json")

    assert done.status == 0
    assert "its width 48 is no multiple of an expert's, 32" in str(done.json()["notes"])


def test_weights_that_are_not_kept_are_drawn_again(
    cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle reads the same values either way."""

    def error() -> float:
        done = cli("run", "gpt-oss-20b", "--tokens", "4", "--json", *_SMALL)
        return number(part(done.json(), "accuracy"), "relative_error")

    kept = error()
    monkeypatch.setattr(_weights, "_KEPT_BYTES", 0)

    assert error() == kept


def test_a_layer_of_its_own_activation(cli: Cli) -> None:
    """Step-3.5's last layers clamp; --layer runs one of them."""
    done = cli("run", "step-3.5-flash", "--layer", "43", "--tokens", "4", "--json", *_SMALL)

    assert done.status == 0
    assert done.json()["layer"] == 43
    assert part(done.json(), "plan")["activation"] == "SwigluStep(limit=7.0)"


def test_static_scales_are_calibrated_and_said(cli: Cli) -> None:
    """NVFP4 has static activation scales; FP8 with block scales has none."""
    static = cli("run", "mixtral-8x7b", "--quant", "nvfp4", "--tokens", "4", "--json", *_SMALL)
    dynamic = cli("run", "mixtral-8x7b", "--quant", "fp8_block", "--tokens", "4", "--json", *_SMALL)

    assert "calibrate" in part(static.json(), "milliseconds")
    assert "calibrate" not in part(dynamic.json(), "milliseconds")
    assert "other drawn tokens" in str(static.json()["notes"])


def test_calibration_tokens_are_not_the_measured_ones() -> None:
    """No row is in both, and a seed draws them again."""
    measured = draw_tokens(16, 32, 32, seed=3).hidden_states
    apart = draw_tokens(16, 32, 32, seed=3, calibration=True).hidden_states

    assert not any(torch.equal(one, other) for one in measured for other in apart)
    assert torch.equal(measured, draw_tokens(16, 32, 32, seed=3).hidden_states)


def test_drawn_logits_are_spread_and_in_the_gates_dtype() -> None:
    """Standard deviation about 1.5; float32 for DeepSeek-V3's gate, bfloat16 for Qwen3's."""
    for model, dtype in (("deepseek-v3", torch.float32), ("qwen3-30b-a3b", torch.bfloat16)):
        spec = moe_spec(load_config(model))
        weights = DrawnWeights(
            spec=spec,
            hidden_size=512,
            router_hidden_size=512,
            intermediate_size=128,
            num_fused_shared_experts=0,
            seed=0,
        )
        logits = router_logits(
            spec, draw_tokens(256, 512, 512, seed=0).router_input, weights.gate()
        )

        assert logits.dtype is dtype
        assert float(logits.float().std()) == pytest.approx(LOGITS_STD, rel=0.05)


@pytest.mark.parametrize("columns", [80, 120])
def test_the_text_fits_the_terminal(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    """No line is wider than the terminal or padded; the parts are there in order."""
    monkeypatch.setenv("COLUMNS", str(columns))
    done = cli("run", "deepseek-v3", "--quant", "fp8_block", "--tokens", "16", *_SMALL)

    lines = done.out.splitlines()
    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if line != line.rstrip()]
    heads = ("Plan", "Kernels considered", "Accuracy", "Expert load", "Time")
    found = [next(i for i, line in enumerate(lines) if line.startswith(head)) for head in heads]
    assert found == sorted(found)
    assert "refused" in done.out
    assert "█" in done.out
    assert "imbalance" in done.out
