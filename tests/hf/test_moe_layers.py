"""Which layers are MoE layers: `moe_layer_ids` against the layers that transformers builds."""

from __future__ import annotations

import attrs
import pytest

from tests.hf._cases import CASES
from tests.hf._families import Settings
from tests.hf._models import model_of
from typed_moe import moe_layer_ids

CASE = {case.name: case for case in CASES}

MIXED: tuple[tuple[str, Settings], ...] = (
    ("mixtral", {"num_hidden_layers": 3}),
    ("qwen2_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [1]}),
    ("qwen3_moe", {"num_hidden_layers": 4, "mlp_only_layers": [0, 2]}),
    ("qwen3_next", {"mlp_only_layers": [0]}),
    ("deepseek_v2", {"first_k_dense_replace": 1}),
    ("deepseek_v3", {"num_hidden_layers": 3, "first_k_dense_replace": 2}),
    ("deepseek_v32", {"first_k_dense_replace": 1}),
    ("glm4_moe", {"first_k_dense_replace": 1}),
    ("glm4_moe_lite", {"mlp_layer_types": None}),
    ("glm_moe_dsa", {"mlp_layer_types": ["sparse", "dense"]}),
    ("mistral4", {"first_k_dense_replace": 1}),
    ("mistral_large4", {"first_k_dense_replace": 1}),
    ("step3p7", {"mlp_layer_types": ["dense", "sparse"]}),
    ("step3p7", {"mlp_layer_types": None, "moe_layers_enum": "1"}),
    ("cohere2_moe-softmax", {"num_hidden_layers": 3, "first_k_dense_replace": 2}),
    ("llama4", {"num_hidden_layers": 4, "moe_layers": None, "interleave_moe_layer_step": 2}),
    ("llama4", {"num_hidden_layers": 3, "moe_layers": [1]}),
    ("nemotron_h", {"hybrid_override_pattern": "E*-E", "num_hidden_layers": 4}),
)


@pytest.mark.parametrize(("name", "settings"), MIXED)
def test_moe_layers_are_where_transformers_has_experts(name: str, settings: Settings) -> None:
    case = CASE[name]
    model = model_of(attrs.evolve(case, settings={**case.settings, **settings}))
    layers = model.module.get_submodule(case.family.layers)
    found = tuple(
        number
        for number, layer in enumerate(layers.children())
        if any(path == f"{case.family.block}.experts" for path, _ in layer.named_modules())
    )
    assert moe_layer_ids(model.config) == found
    assert found
