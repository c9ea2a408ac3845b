"""MoE blocks of SGLang's own model classes on our runners, beside float64 in plain torch.

`--moe-runner-backend typed_moe`, float32, on a CPU. Gates and biases are filled so that routing
matters; factors are 2.5. The oracle has the weights and the model's rule, and imports nothing of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import cast
from unittest import mock

import attrs
import pytest
import torch
from torch import Tensor, nn

from tests import oracle
from tests.oracle import RULES, Act, Rule
from tests.sglang import stand_ins
from typed_moe.sglang import Plugin
from typed_moe.sglang._backend import plans_of
from typed_moe.sglang._protocols import LayerLike

pytestmark = pytest.mark.sglang

TOKENS, HIDDEN, WIDTH, EXPERTS, TOP_K = 7, 32, 16, 16, 4
FACTOR = 2.5
# float32 matrices of width 32 and 16, four experts summed, against float64.
TOLERANCE = 1e-5
SHARED = ("shared_expert", "shared_experts")


@pytest.fixture
def ours(trtllm: Plugin) -> None:
    from tests.sglang import host

    host.publish("typed_moe")


@attrs.frozen(kw_only=True)
class Case:
    """One block: how it is made, its rule, and what the model adds to the routed experts."""

    id: str
    make: Callable[[SimpleNamespace], nn.Module]
    config: SimpleNamespace
    rule: Rule
    top_k: int = TOP_K
    act: Act = attrs.field(factory=Act)
    shared: bool = False
    gated_shared: bool = False
    interleaved: bool = False


def _config(**fields: object) -> SimpleNamespace:
    common: dict[str, object] = {
        "hidden_size": HIDDEN,
        "moe_intermediate_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "hidden_act": "silu",
        "dtype": torch.float32,
        "model_type": "tiny",
        "routed_scaling_factor": FACTOR,
        "n_shared_experts": None,
        "n_group": 4,
        "topk_group": 2,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "shared_expert_intermediate_size": 0,
        "architectures": ["TinyForCausalLM"],
    }
    return SimpleNamespace(**{**common, **fields})


def _qwen3(config: SimpleNamespace) -> nn.Module:
    from sglang.srt.models.qwen3_moe import Qwen3MoeSparseMoeBlock

    block: nn.Module = Qwen3MoeSparseMoeBlock(0, config)
    return block


def _qwen2(config: SimpleNamespace) -> nn.Module:
    from sglang.srt.models.qwen2_moe import Qwen2MoeSparseMoeBlock

    block: nn.Module = Qwen2MoeSparseMoeBlock(0, config)
    return block


def _deepseek_v2(config: SimpleNamespace) -> nn.Module:
    from sglang.srt.models.deepseek_v2 import DeepseekV2MoE

    block: nn.Module = DeepseekV2MoE(config, 0)
    return block


def _glm4(config: SimpleNamespace) -> nn.Module:
    from sglang.srt.models.glm4_moe import Glm4MoeSparseMoeBlock

    block: nn.Module = Glm4MoeSparseMoeBlock(config, 0)
    return block


def _llama4(config: SimpleNamespace) -> nn.Module:
    from sglang.srt.models.llama4 import Llama4MoE

    block: nn.Module = Llama4MoE(config, 0)
    return block


def _gpt_oss(config: SimpleNamespace) -> nn.Module:
    from sglang.srt.models.gpt_oss import GptOssSparseMoeBlock

    block: nn.Module = GptOssSparseMoeBlock(0, config)
    return block


V3 = replace(RULES["DeepSeekV3"], scale=FACTOR)
CASES = [
    Case(id="qwen3_moe", make=_qwen3, config=_config(), rule=RULES["RenormalizeNaive"]),
    Case(
        id="qwen3_moe-unnormalised",
        make=_qwen3,
        config=_config(norm_topk_prob=False),
        rule=RULES["Default"],
    ),
    Case(
        id="qwen2_moe",
        make=_qwen2,
        config=_config(norm_topk_prob=False, shared_expert_intermediate_size=WIDTH),
        rule=RULES["Default"],
        shared=True,
        gated_shared=True,
    ),
    Case(
        id="qwen3_next",
        make=_qwen2,
        config=_config(shared_expert_intermediate_size=WIDTH),
        rule=RULES["RenormalizeNaive"],
        shared=True,
        gated_shared=True,
    ),
    Case(
        id="deepseek_v3",
        make=_deepseek_v2,
        config=_config(n_shared_experts=1),
        rule=replace(V3, num_expert_group=4, topk_group=2),
        shared=True,
    ),
    Case(
        id="deepseek_v2",
        make=_deepseek_v2,
        config=_config(
            topk_method="group_limited_greedy",
            scoring_func="softmax",
            norm_topk_prob=False,
            n_shared_experts=1,
        ),
        rule=replace(
            RULES["GroupedSoftmax"],
            num_expert_group=4,
            topk_group=2,
            group_score="max",
            scale=FACTOR,
        ),
        shared=True,
    ),
    Case(
        id="glm4_moe",
        make=_glm4,
        config=_config(n_shared_experts=1, n_group=1, topk_group=1),
        rule=V3,
        shared=True,
    ),
    Case(
        id="llama4",
        make=_llama4,
        config=_config(num_experts_per_tok=1),
        rule=RULES["Llama4"],
        top_k=1,
        shared=True,
    ),
    Case(
        id="gpt_oss",
        make=_gpt_oss,
        config=_config(swiglu_limit=7.0),
        rule=RULES["Renormalize"],
        act=Act(alpha=1.702, beta=1.0, limit=7.0),
        interleaved=True,
    ),
]


def _fill(block: nn.Module) -> None:
    """Gates of standard deviation 1, so that the experts' scores differ; biases that change choices."""
    for name, parameter in block.named_parameters():
        if "correction_bias" in name:
            parameter.data.normal_(std=0.3)
        elif "gate.weight" in name or "router" in name:
            parameter.data.normal_(std=0.4)
        else:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)


def _weight(block: nn.Module, *names: str) -> Tensor | None:
    """The first of these parameters that the block has, in float64."""
    found = dict(block.named_parameters())
    return next((found[name].double() for name in names if name in found), None)


def _there(block: nn.Module, *names: str) -> Tensor:
    found = _weight(block, *names)
    assert found is not None, f"the block has none of {names}"
    return found


def _logits(block: nn.Module, x: Tensor) -> Tensor:
    """By the gate's own weight, in float64."""
    logits = x.double() @ _there(block, "gate.weight", "router.weight").T
    bias = _weight(block, "gate.bias", "router.bias")
    return logits if bias is None else logits + bias


def _experts(block: nn.Module, *, interleaved: bool) -> oracle.Experts:
    w13, down = _there(block, "experts.w13_weight"), _there(block, "experts.w2_weight")
    if interleaved:
        bias = _there(block, "experts.w13_weight_bias")
        return oracle.Experts(
            gate=w13[:, 0::2],
            up=w13[:, 1::2],
            down=down,
            gate_bias=bias[:, 0::2],
            up_bias=bias[:, 1::2],
            down_bias=_there(block, "experts.w2_weight_bias"),
        )
    half = w13.shape[1] // 2
    return oracle.Experts(gate=w13[:, :half], up=w13[:, half:], down=down)


def _shared(block: nn.Module, x: Tensor, *, gated: bool) -> Tensor:
    """The model's shared expert, in float64 from its weights."""
    first = _there(block, *(f"{name}.gate_up_proj.weight" for name in SHARED))
    second = _there(block, *(f"{name}.down_proj.weight" for name in SHARED))
    gate, up = (x.double() @ first.T).chunk(2, dim=-1)
    out = (gate * torch.sigmoid(gate) * up) @ second.T
    if gated:
        out = out * torch.sigmoid(x.double() @ _there(block, "shared_expert_gate.weight").T)
    return out


def expected(case: Case, block: nn.Module, x: Tensor) -> Tensor:
    logits = _logits(block, x)
    bias = _there(block, "gate.e_score_correction_bias") if case.rule.biased else None
    experts = _experts(block, interleaved=case.interleaved)
    out = oracle.layer(case.rule, experts, x, logits, bias, top_k=case.top_k, act=case.act)
    return out + _shared(block, x, gated=case.gated_shared) if case.shared else out


def _stand_ins(stack: ExitStack) -> None:
    """A Triton function of qwen2_moe's and its own definition, in torch."""
    import sglang.srt.models.qwen2_moe as qwen2

    stack.enter_context(
        mock.patch.object(qwen2, "fused_gate_sigmoid_mul_add", stand_ins.gate_sigmoid_mul_add)
    )


def _check(case: Case, block: nn.Module) -> None:
    _fill(block)
    x = torch.randn(TOKENS, HIDDEN)
    want = expected(case, block, x)
    # Llama4's block looks at the batch, for the mode of its forward pass.
    batch = [SimpleNamespace(forward_mode=None)] if case.id == "llama4" else []
    with torch.no_grad():
        got = block(x.clone(), *batch)
    torch.testing.assert_close(got.double(), want, rtol=TOLERANCE, atol=TOLERANCE)
    (plan,) = plans_of(cast("LayerLike", block.get_submodule("experts")))
    assert plan.kernel == "reference"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
@pytest.mark.usefixtures("ours")
def test_equal_to_plain_torch(case: Case) -> None:
    with ExitStack() as stack:
        _stand_ins(stack)
        _check(case, case.make(case.config))


@pytest.mark.parametrize(
    "case", [one for one in CASES if one.rule.scale != 1.0], ids=lambda case: case.id
)
@pytest.mark.usefixtures("ours")
def test_one_owner_of_the_scale_on_cuda_too(case: Case) -> None:
    """Off CUDA these models multiply by the factor themselves; on it they leave it to the layer.

    SGLang is told that it is on CUDA; its gate, which has CUDA kernels, is a plain matrix product.
    """
    import sglang.srt.models.deepseek_v2 as deepseek
    import sglang.srt.models.glm4_moe as glm4
    import sglang.srt.utils as utils

    def gate(self: nn.Module, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        return hidden_states @ self.get_parameter("weight").T

    with ExitStack() as stack:
        for module in (deepseek, glm4):
            stack.enter_context(mock.patch.object(module, "_is_cuda", True))
        stack.enter_context(mock.patch.object(utils, "is_cuda", return_value=True))
        stack.enter_context(mock.patch.object(deepseek.MoEGate, "forward", gate))
        stack.enter_context(mock.patch.object(glm4.Glm4MoeGate, "forward", gate))
        _check(case, case.make(case.config))
