"""bfloat16 models, loaded as users load them, and the dtype of the router's logits."""

from __future__ import annotations

import copy
from pathlib import Path

import attrs
import pytest
import torch
from torch import Tensor

from tests.hf._cases import CASES
from tests.hf._models import Model, loaded_as, model_of, prompt_of
from tests.hf._swap import correction_bias, expert_tensors, experts_of, swapped
from typed_moe import DeepSeekV3, RoutingForm, moe_spec

CASE = {case.name: case for case in CASES}
# Router logits in bfloat16 (Qwen3, gpt-oss, MiniMax-M2), or in float32 from a float32 gate.
BF16 = ("qwen3_moe", "gpt_oss", "minimax_m2", "deepseek_v3-groups", "glm4_moe", "llama4")


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


@pytest.fixture
def model(name: str, tmp_path: Path) -> Model:
    """The case's model, saved and loaded again in bfloat16."""
    return loaded_as(model_of(CASE[name]), torch.bfloat16, tmp_path)


@pytest.mark.parametrize("form", RoutingForm, ids=lambda form: form.value)
@pytest.mark.parametrize("name", BF16)
def test_bf16_block_is_as_near_to_float32_as_transformers(model: Model, form: RoutingForm) -> None:
    """Ours against the same bfloat16 weights and logits computed in float32.

    transformers rounds each expert's products, weights and partial sums to bfloat16, ours only
    the sum, so ours may not be further away than transformers is. Rows whose last chosen expert
    has the bfloat16 logit of the next one are left out: torch.topk takes either.
    """
    family, layer = model.case.family, model.layers[0]
    block = model.module.get_submodule(model.path(layer))
    assert next(iter(expert_tensors(block, family).values())).dtype is torch.bfloat16
    x = torch.randn(64, 32).bfloat16()
    with swapped(model, form=form) as blocks, torch.no_grad():
        ours = blocks[0]
        logits = blocks[0].router_logits(x)
    best = logits.float().topk(blocks[0].spec.top_k + 1, dim=1).values
    untied = best[:, -2] > best[:, -1]
    assert untied.float().mean() > 0.9
    wide = copy.deepcopy(block).float()
    spec = moe_spec(model.config, layer)
    exact = experts_of(wide, family, spec, spec.routing)(x.float(), logits)
    got = ours.combined(x)
    assert got.dtype is torch.bfloat16
    outputs = block(x.unsqueeze(0))
    theirs = (outputs[0] if family.pair else outputs).reshape(x.shape)
    if family.shared is not None:
        exact = exact + wide.get_submodule(family.shared)(x.float())
    ours_off, theirs_off = (got - exact)[untied], (theirs - exact)[untied]
    assert _rms(ours_off) <= _rms(theirs_off)
    assert _rms(theirs_off) < 0.02 * _rms(exact), "the oracle itself is near"


@pytest.mark.parametrize("name", BF16)
def test_bf16_logits_agree_within_bf16(model: Model) -> None:
    """The whole model: two bfloat16 computations, each as far from float32 as transformers'."""
    tokens = prompt_of()
    theirs = model.logits(tokens).float()
    rounding = _rms(theirs - model_of(model.case).logits(tokens))
    with swapped(model):
        got = model.logits(tokens).float()
    assert _rms(got - theirs) <= 2 * rounding


@pytest.mark.parametrize("form", RoutingForm, ids=lambda form: form.value)
@pytest.mark.parametrize("name", ["deepseek_v3-groups"])
def test_rounded_logits_need_leave(model: Model, form: RoutingForm) -> None:
    """DeepSeek-V3's gate gives float32 even in a bfloat16 model; a rounded one is refused."""
    x = torch.randn(8, 32).bfloat16()
    with swapped(model, form=form) as blocks:
        logits = blocks[0].router_logits(x)
        assert logits.dtype is torch.float32
        with pytest.raises(TypeError, match=r"router_logits of torch\.float32"):
            blocks[0].experts(x, logits.bfloat16())
    assert isinstance(model.case.routing, DeepSeekV3)
    leave = attrs.evolve(model.case.routing, router_logits_dtype=torch.bfloat16)
    with swapped(model, form=form, routing=leave) as blocks:
        assert blocks[0].experts(x, logits.bfloat16()).isfinite().all()


@pytest.mark.parametrize("name", ["deepseek_v3-groups", "glm4_moe", "deepseek_v4"])
def test_the_correction_bias_stays_float32(model: Model) -> None:
    block = model.module.get_submodule(model.path(model.layers[0]))
    bias = correction_bias(block)
    assert bias is not None
    assert bias.dtype is torch.float32


@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_a_bf16_model_runs(model: Model) -> None:
    """The gate gives what the spec says, and no strategy refuses its own model's logits."""
    with swapped(model) as blocks:
        for one in blocks:
            dtype = torch.float32 if one.spec.router_weight_fp32 else torch.bfloat16
            assert one.router_logits(torch.randn(2, 32).bfloat16()).dtype is dtype
        assert model.logits(prompt_of()).isfinite().all()


def test_step_asks_for_the_float32_gate_that_transformers_ignores(tmp_path: Path) -> None:
    """The released config says need_fp32_gate; transformers 5.23 runs the gate in bfloat16."""
    case = CASE["step3p7"]
    case = attrs.evolve(case, settings={**case.settings, "need_fp32_gate": True})
    model = loaded_as(model_of(case), torch.bfloat16, tmp_path)
    with swapped(model) as blocks:
        assert blocks[0].spec.router_weight_fp32
        assert blocks[0].router_logits(torch.randn(2, 32).bfloat16()).dtype is torch.bfloat16
        with pytest.raises(TypeError, match=r"router_logits of torch\.float32"):
            model.logits(prompt_of())
