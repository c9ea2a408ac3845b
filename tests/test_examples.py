"""The code in docs/ and in the README runs, and a stranger's strategy runs everywhere."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from typed_moe import FusedMoE, RoutingForm, RoutingStrategy, UnsupportedRouting
from typed_moe.config import FORMATS, FormatName, Swiglu
from typed_moe.quantization import relative_error_bound
from typed_moe.testing import check_strategy

ROOT = Path(__file__).parent.parent


def _example(name: str) -> ModuleType:
    """A module of docs/examples, by path."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _strangers_strategy() -> RoutingStrategy:
    strategy: RoutingStrategy = _example("custom_strategy").Tempered()
    return strategy


def _experts(count: int, hidden: int, width: int) -> list[tuple[str, Tensor]]:
    """Random weights under checkpoint names, exact in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    weights = []
    for expert in range(count):
        for projection, rows, columns in (
            ("gate_proj", width, hidden),
            ("up_proj", width, hidden),
            ("down_proj", hidden, width),
        ):
            matrix = torch.randn(rows, columns, generator=generator) / columns**0.5
            weights.append((f"{expert}.{projection}.weight", matrix.bfloat16().float()))
    return weights


def test_the_custom_strategy_keeps_the_contract() -> None:
    """The ten-line strategy of the docs passes the check that users run."""
    check_strategy(_strangers_strategy(), num_experts=64, top_k=4)
    check_strategy(_strangers_strategy(), num_experts=8, top_k=8)


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_the_custom_strategy_runs_in_every_format(name: FormatName) -> None:
    """Its output equals float64 on the unquantised weights within the format's own bound."""
    fmt, count, hidden, width, top_k = FORMATS[name], 8, 256, 128, 2
    layer = FusedMoE(
        num_experts=count,
        top_k=top_k,
        hidden_size=hidden,
        intermediate_size=width,
        routing=_strangers_strategy(),
        quant=fmt,
    )
    weights = _experts(count, hidden, width)
    layer.load_weights(weights)
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(64, hidden, generator=generator).bfloat16().float()
    logits = torch.randn(64, count, generator=generator)
    layer.calibrate(x, logits)
    # The rule by hand, in float64: softmax over the k best logits at a temperature of 2.
    best, ids = logits.double().topk(top_k, dim=-1)
    expected = _by_hand(x, dict(weights), ids, (best / 2.0).softmax(dim=-1))

    error = (layer(x, logits).double() - expected).norm() / expected.norm()

    assert float(error) <= relative_error_bound(fmt, Swiglu())
    assert layer.plan.form is RoutingForm.PRECOMPUTED


def _by_hand(x: Tensor, weights: dict[str, Tensor], ids: Tensor, probs: Tensor) -> Tensor:
    """The experts' weighted sum in float64."""
    output = torch.zeros_like(x, dtype=torch.float64)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token].tolist(), probs[token], strict=True):
            gate, up, down = (
                weights[f"{expert}.{projection}.weight"].double()
                for projection in ("gate_proj", "up_proj", "down_proj")
            )
            row = x[token].double()
            gated = gate @ row
            output[token] += weight * (down @ (gated * gated.sigmoid() * (up @ row)))
    return output


def test_strict_refuses_a_strategy_that_no_kernel_knows() -> None:
    """`strict=True` says why a custom rule is a degraded plan."""
    with pytest.raises(UnsupportedRouting, match="no routing method for Tempered"):
        FusedMoE(
            num_experts=8,
            top_k=2,
            hidden_size=64,
            intermediate_size=64,
            routing=_strangers_strategy(),
            strict=True,
        )


def test_the_example_program_prints_its_plan(capsys: pytest.CaptureFixture[str]) -> None:
    """`python docs/examples/custom_strategy.py` runs to its end."""
    _example("custom_strategy").main()

    assert "precomputed: Tempered.select_experts" in capsys.readouterr().out


def test_the_readme_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The README's first lines, typed by hand, do what they say."""
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    small = code.group(1).replace("num_experts=128", "num_experts=8")
    names: dict[str, object] = {
        "checkpoint_tensors": _experts(8, 2048, 768),
        "router_logits": torch.randn(64, 8),
    }

    exec(compile(small, "README.md", "exec"), names)

    output = names["output"]
    assert isinstance(output, Tensor)
    assert output.shape == (64, 2048)
    assert "RenormalizeNaive()" in capsys.readouterr().out


@pytest.mark.parametrize("row", range(10))
def test_the_measured_strategies_fit_their_shapes(row: int) -> None:
    """Every row of the cost table routes at its model's own E and k, onto distinct experts."""
    module = _example("routing_table")
    _, strategy, num_experts, top_k = module.ROWS[row]
    fullest, unused = module.load(
        strategy,
        module.RoutingShape(num_experts=num_experts, top_k=top_k),
        torch.device("cpu"),
    )

    assert 1.0 <= fullest < 2.0
    assert unused == 0
