"""Tensor names of the published checkpoints, written down by hand."""

from __future__ import annotations

import pytest

from typed_moe.models import CheckpointLayout, SharedCombination, load_config, moe_spec

BIAS = "e_score_correction_bias"

# name: layout, experts, router weight, router bias, correction bias
NAMES = {
    "mixtral-8x7b": (
        CheckpointLayout.MIXTRAL,
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.0.block_sparse_moe.gate.weight",
        None,
        None,
    ),
    "qwen3-30b-a3b": (
        CheckpointLayout.SEPARATE,
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.gate.weight",
        None,
        None,
    ),
    "qwen3.5-35b-a3b": (
        CheckpointLayout.FUSED,
        "model.language_model.layers.0.mlp.experts",
        "model.language_model.layers.0.mlp.gate.weight",
        None,
        None,
    ),
    "deepseek-v3": (
        CheckpointLayout.SEPARATE,
        "model.layers.3.mlp.experts",
        "model.layers.3.mlp.gate.weight",
        None,
        f"model.layers.3.mlp.gate.{BIAS}",
    ),
    "deepseek-v4-flash": (
        CheckpointLayout.MIXTRAL,
        "layers.3.ffn.experts",
        "layers.3.ffn.gate.weight",
        None,
        "layers.3.ffn.gate.bias",
    ),
    "kimi-k2.5": (
        CheckpointLayout.SEPARATE,
        "language_model.model.layers.1.mlp.experts",
        "language_model.model.layers.1.mlp.gate.weight",
        None,
        f"language_model.model.layers.1.mlp.gate.{BIAS}",
    ),
    "minimax-m2": (
        CheckpointLayout.MIXTRAL,
        "model.layers.0.block_sparse_moe.experts",
        "model.layers.0.block_sparse_moe.gate.weight",
        None,
        f"model.layers.0.block_sparse_moe.{BIAS}",
    ),
    "llama4-maverick": (
        CheckpointLayout.FUSED_TRANSPOSED,
        "language_model.model.layers.1.feed_forward.experts",
        "language_model.model.layers.1.feed_forward.router.weight",
        None,
        None,
    ),
    "gpt-oss-20b": (
        CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED,
        "model.layers.0.mlp.experts",
        "model.layers.0.mlp.router.weight",
        "model.layers.0.mlp.router.bias",
        None,
    ),
    "nemotron-3-nano-30b-a3b": (
        CheckpointLayout.SEPARATE_UNGATED,
        "backbone.layers.1.mixer.experts",
        "backbone.layers.1.mixer.gate.weight",
        None,
        f"backbone.layers.1.mixer.gate.{BIAS}",
    ),
    "step-3.5-flash": (
        CheckpointLayout.STACKED,
        "model.layers.3.moe",
        "model.layers.3.moe.gate.weight",
        None,
        "model.layers.3.moe.router_bias",
    ),
}


@pytest.mark.parametrize("name", NAMES)
def test_tensor_names(name: str) -> None:
    """Layout and tensor names are those of the published checkpoint."""
    spec = moe_spec(load_config(name))
    names = (spec.experts_prefix, spec.gate_name, spec.gate_bias_name, spec.correction_bias_name)
    assert (spec.layout, *names) == NAMES[name]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v3", True),  # hidden_states and weight cast to float32
        ("nemotron-3-nano-30b-a3b", True),
        ("step-3.5-flash", True),  # need_fp32_gate
        ("deepseek-moe-16b", False),
        ("deepseek-v4-flash", False),
        ("minimax-m2", False),
        ("qwen3-30b-a3b", False),
    ],
)
def test_router_weight_fp32(name: str, expected: bool) -> None:
    """Whose gate runs in float32 whatever the weights' dtype is."""
    assert moe_spec(load_config(name)).router_weight_fp32 is expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v3", SharedCombination.SUM),
        ("qwen3-next-80b-a3b", SharedCombination.SIGMOID_GATED),
        ("qwen3-30b-a3b", SharedCombination.NONE),
    ],
)
def test_shared_expert_combination(name: str, expected: SharedCombination) -> None:
    """How the shared experts' output meets the routed one."""
    assert moe_spec(load_config(name)).shared_expert_combination is expected


def test_only_gpt_oss_has_expert_biases() -> None:
    """No other family has biases in its experts."""
    assert moe_spec(load_config("gpt-oss-20b")).has_bias
    assert not moe_spec(load_config("mixtral-8x7b")).has_bias
