"""`typed-moe explain`: layers, plans and sources of real configs."""

from __future__ import annotations

import re

import pytest

from tests.cli.calls import Cli, items, part
from typed_moe import Fp8BlockScale, FusedMoE, moe_spec, shipped_configs
from typed_moe.cli._explain import layer_ranges
from typed_moe.models import load_config


def test_deepseek_v3s_layers_and_sources(cli: Cli) -> None:
    """Dense layers 0 to 2, MoE layers 3 to 60, and the field behind each setting."""
    data = cli("explain", "deepseek-v3", "--json").json()

    (group,) = items(data, "moe_layers")
    (dense,) = items(data, "other_layers")
    assert data["num_layers"] == 61
    assert group["layers"] == list(range(3, 61))
    assert (dense["layers"], dense["kind"]) == ([0, 1, 2], "dense")
    assert dense["reason"] == "first_k_dense_replace = 3"
    config = part(group, "config")
    assert config["routing.num_expert_group"] == "n_group = 8"
    assert config["routing.routed_scaling_factor"] == "routed_scaling_factor = 2.5"
    plan = part(group, "plan")
    assert plan["groups"] == "n_group 8, topk_group 4"
    assert plan["scale"] == "2.5 by the kernel"
    assert "model.layers.3.mlp.experts" in str(part(group, "checkpoint")["experts"])


@pytest.mark.parametrize("model", shipped_configs())
def test_the_plan_is_the_layers_own(cli: Cli, model: str) -> None:
    """What is explained is what a layer on this machine decides, rows and kernels."""
    spec = moe_spec(load_config(model))
    layer = FusedMoE(
        num_experts=spec.num_experts,
        top_k=spec.top_k,
        hidden_size=128,
        intermediate_size=128,
        routing=spec.routing,
        quant=Fp8BlockScale(),
        activation=spec.activation,
        has_bias=spec.has_bias,
        device="meta",
    )

    data = cli("explain", model, "--quant", "fp8_block", "--json").json()

    first = items(data, "moe_layers")[0]
    plan = part(first, "plan")
    rows = dict(layer.plan.rows())
    same = ("strategy", "format", "kernel", "routing", "router logits", "correction bias", "groups")
    for row in (*same, "scale", "weight goes on"):
        assert plan[row.replace(" ", "_")] == rows[row]
    kernels = items(plan, "kernels_considered")
    assert [one["kernel"] for one in kernels] == [one.kernel for one in layer.plan.candidates]
    assert [one["taken"] for one in kernels] == [one.taken for one in layer.plan.candidates]
    assert all(one["reason"] for one in kernels)


def test_every_layer_is_told_once(cli: Cli) -> None:
    """Whatever the model, its groups are a partition of its layers."""
    for model in shipped_configs():
        data = cli("explain", model, "--json").json()
        groups = (*items(data, "moe_layers"), *items(data, "other_layers"))
        told = [layer for group in groups for layer in _layers(group)]
        count = data["num_layers"]
        assert isinstance(count, int)
        assert sorted(told) == list(range(count))


def _layers(group: dict[str, object]) -> list[int]:
    layers = group["layers"]
    assert isinstance(layers, list)
    return layers


def test_layers_that_differ_are_apart(cli: Cli) -> None:
    """Step-3.5 clamps in its last two layers; the text shows only what differs."""
    data = cli("explain", "step-3.5-flash", "--json").json()
    text = cli("explain", "step-3.5-flash").out

    assert [_layers(one)[0] for one in items(data, "moe_layers")] == [3, 43]
    tail = text.partition("Layers 43-44 differ\n")[2].splitlines()
    assert tail == [
        "  activation       SwigluStep(limit=7.0)",
        "  from the config  swiglu_limits[43] = 7.0",
    ]


def test_hash_layers_are_named_with_their_reason(cli: Cli) -> None:
    """DeepSeek-V4's first layers have no strategy; the others are explained all the same."""
    data = cli("explain", "deepseek-v4-flash", "--json").json()

    (hashed,) = items(data, "other_layers")
    assert (hashed["layers"], hashed["kind"]) == ([0, 1, 2], "not supported")
    assert "table of token ids" in str(hashed["reason"])
    assert items(data, "moe_layers")[0]["strategy"] == "SqrtSoftplus"


def test_a_degraded_plan_is_shown(cli: Cli) -> None:
    """SqrtSoftplus runs before the kernel, and both outputs say so."""
    text = cli("explain", "deepseek-v4-flash").out
    (group,) = items(cli("explain", "deepseek-v4-flash", "--json").json(), "moe_layers")

    assert "degraded" in text
    assert "routing runs before the kernel" in str(part(group, "plan")["degraded"])


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("model", ["deepseek-v3", "step-3.5-flash", "llama4-maverick"])
def test_the_text_fits_the_terminal(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, model: str, columns: int
) -> None:
    """No line is wider than the terminal or padded."""
    monkeypatch.setenv("COLUMNS", str(columns))

    lines = cli("explain", model).out.splitlines()

    assert max(map(len, lines)) <= columns
    assert not [line for line in lines if line != line.rstrip()]
    assert len([line for line in lines if re.match(r"  taken {4}reference", line)]) == 1


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([5], "5"),
        ([3, 4, 5], "3-5"),
        ([1, 3], "1, 3"),
        ([1, 3, 5, 7, 9], "1, 3, ..., 9"),
        ([0, 1, 4, 6, 7], "0-1, 4, 6-7"),
        ([0, 1, 2, 3], "0-3"),
    ],
)
def test_layer_ranges(ids: list[int], text: str) -> None:
    """Runs, even steps, and neither."""
    assert layer_ranges(ids) == text
