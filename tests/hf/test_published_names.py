"""Loading by the names and in the layout of the published checkpoints.

transformers writes those names: `save_pretrained` turns its merged experts back into them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.hf._cases import CASES, Case
from tests.hf._families import DEEPSEEK_V4, QWEN3_5_MOE
from tests.hf._models import Model, model_of
from tests.hf._swap import SwappedMoe, block_output, correction_bias, empty_experts
from typed_moe import moe_spec
from typed_moe.checkpoint import Checkpoint, open_checkpoint
from typed_moe.models import SharedCombination

FAMILIES = list({case.family: case for case in reversed(CASES)}.values())[::-1]
"""One case of every family."""


@pytest.fixture
def saved(case: Case, tmp_path: Path) -> Checkpoint:
    """The case's model as transformers saves it."""
    model_of(case).module.save_pretrained(str(tmp_path))
    return open_checkpoint(tmp_path)


def _at(case: Case, name: str) -> str:
    return case.family.saved_root + name


def _loaded(model: Model, layer: int, saved: Checkpoint) -> SwappedMoe:
    """A layer whose experts come from the checkpoint, by nothing but what the spec says."""
    case = model.case
    spec = moe_spec(model.config, layer)
    experts = empty_experts(spec, spec.routing)
    layout = case.family.saved_layout or spec.layout
    experts.load_weights(saved.under(_at(case, spec.experts_prefix)), layout=layout)
    if spec.correction_bias_name is not None:
        bias = saved.tensor(_at(case, spec.correction_bias_name))
        experts.load_weights([("e_score_correction_bias", bias)])
    block = model.module.get_submodule(model.path(layer))
    return SwappedMoe(block, case.family, spec, experts)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_experts_from_a_saved_checkpoint(case: Case, saved: Checkpoint) -> None:
    model = model_of(case)
    x = torch.randn(16, 32)
    for layer in model.layers:
        ours = _loaded(model, layer, saved)
        assert (ours.combined(x) - block_output(ours.block, case.family, x)).abs().max() <= 1e-5


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_router_tensors_of_a_saved_checkpoint(case: Case, saved: Checkpoint) -> None:
    model = model_of(case)
    for layer in model.layers:
        spec = moe_spec(model.config, layer)
        block = model.module.get_submodule(model.path(layer))
        gate = block.get_submodule(case.family.gate)
        assert torch.equal(saved.tensor(_at(case, spec.gate_name)), gate.get_parameter("weight"))
        if spec.gate_bias_name is not None:
            bias = saved.tensor(_at(case, spec.gate_bias_name))
            assert torch.equal(bias, gate.get_parameter("bias"))
        own = correction_bias(block)
        assert (own is None) == (spec.correction_bias_name is None)
        if own is not None and spec.correction_bias_name is not None:
            assert torch.equal(saved.tensor(_at(case, spec.correction_bias_name)), own)


@pytest.mark.parametrize("case", FAMILIES, ids=str)
def test_the_spec_has_the_shared_expert(case: Case) -> None:
    model = model_of(case)
    spec = moe_spec(model.config, model.layers[0])
    block = model.module.get_submodule(model.path(model.layers[0]))
    if case.family.shared is None:
        assert spec.shared_expert_combination is SharedCombination.NONE
        assert (spec.num_shared_experts, spec.shared_expert_intermediate_size) == (0, 0)
        return
    assert spec.shared_expert_combination is not SharedCombination.NONE
    down = block.get_parameter(f"{case.family.shared}.down_proj.weight")
    assert spec.shared_expert_intermediate_size == down.shape[1]


def test_where_transformers_saves_other_names_than_the_published() -> None:
    """Qwen3.5 is published with fused experts, DeepSeek-V4 without `model.` before its layers."""
    differ = {case.family for case in CASES if case.family.saved_layout or case.family.saved_root}
    assert differ == {QWEN3_5_MOE, DEEPSEEK_V4}
