"""MoE blocks of SGLang's own models, small, and the same blocks in plain float64 torch."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.oracle import RULES, Act, Experts, Rule, layer

HIDDEN, WIDTH, EXPERTS, TOP_K, FACTOR = 32, 16, 16, 4, 2.5

SHARED = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "intermediate_size": WIDTH,
    "num_experts_per_tok": TOP_K,
    "num_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "hidden_act": "silu",
    "routed_scaling_factor": FACTOR,
    "norm_topk_prob": True,
}


@attrs.frozen(kw_only=True)
class BlockCase:
    """One of SGLang's blocks, and what it means.

    Attributes:
        module, name: of the class below `sglang.srt.models`.
        config: beside `SHARED`.
        rule: how it routes.
        act: of its experts.
        factor: on the routed experts.
        top_k: experts per token.
        gate: the name of its router.
        shared: the name of its shared expert, if any.
    """

    id: str
    module: str
    name: str
    rule: Rule
    config: Mapping[str, object] = attrs.Factory(dict)
    act: Act = attrs.Factory(Act)
    factor: float = 1.0
    top_k: int = TOP_K
    gate: str = "gate"
    shared: str | None = None

    def build(self) -> BuiltBlock:
        """The block, filled so that routing matters, its weights given to the runner."""
        cls = getattr(importlib.import_module(f"sglang.srt.models.{self.module}"), self.name)
        config = SimpleNamespace(**{**SHARED, **self.config})
        block: nn.Module = cls(config=config, layer_id=0, prefix="mlp")
        for name, parameter in block.named_parameters():
            parameter.data.normal_(std=0.5 if name.startswith(self.gate) else 0.2)
        stored = {name: tensor.data.clone() for name, tensor in block.named_parameters()}
        experts = vars(block)["_modules"]["experts"]
        if not isinstance(experts, nn.ModuleList):
            experts.quant_method.process_weights_after_loading(experts)
        return BuiltBlock(case=self, block=block, experts=experts, stored=stored)


Sglang = Any  # type: ignore[explicit-any]  # SGLang's layer, which is not typed here


@attrs.frozen(kw_only=True, eq=False)
class BuiltBlock:
    """A block, and its parameters as they were loaded."""

    case: BlockCase
    block: nn.Module
    experts: Sglang
    stored: dict[str, Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """SGLang's block; some write over their input."""
        more = (SimpleNamespace(forward_mode=None),) if self.case.module == "llama4" else ()
        with torch.no_grad():
            output: Tensor = self.block(x.clone(), *more)
        return output

    def expected(self, x: Tensor) -> Tensor:
        """(T, H) float64."""
        case = self.case
        logits = x.double() @ self.stored[f"{case.gate}.weight"].double().T
        if f"{case.gate}.bias" in self.stored:
            logits = logits + self.stored[f"{case.gate}.bias"].double()
        bias = self.stored[f"{case.gate}.e_score_correction_bias"] if case.rule.biased else None
        routed = layer(case.rule, self._experts(), x, logits, bias, top_k=case.top_k, act=case.act)
        out = case.factor * routed
        return out if case.shared is None else out + self._shared(x, case.shared)

    def _shared(self, x: Tensor, name: str) -> Tensor:
        first = self.stored[f"{name}.gate_up_proj.weight"].double()
        gate, up = (x.double() @ first.T).chunk(2, dim=-1)
        out = (functional.silu(gate) * up) @ self.stored[f"{name}.down_proj.weight"].double().T
        weight = self.stored.get("shared_expert_gate.weight")
        return out if weight is None else out * torch.sigmoid(x.double() @ weight.double().T)

    def _experts(self) -> Experts:
        """The experts' matrices: of one stack, or of DeepSeek V1's modules."""
        if isinstance(self.experts, nn.ModuleList):
            names = [f"experts.{number}" for number in range(EXPERTS)]
            first = torch.stack([self.stored[f"{name}.gate_up_proj.weight"] for name in names])
            down = torch.stack([self.stored[f"{name}.down_proj.weight"] for name in names])
            gate, up = first.chunk(2, dim=1)
            return Experts(gate=gate, up=up, down=down)
        gate, up = self._halves(self.stored["experts.w13_weight"])
        down = self.stored["experts.w2_weight"]
        bias = self.stored.get("experts.w13_weight_bias")
        if bias is None:
            return Experts(gate=gate, up=up, down=down)
        gate_bias, up_bias = self._halves(bias)
        return Experts(
            gate=gate,
            up=up,
            down=down,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=self.stored["experts.w2_weight_bias"],
        )

    def _halves(self, first: Tensor) -> tuple[Tensor, Tensor]:
        """Gate and up: gpt-oss has their rows by turns."""
        if self.case.module == "gpt_oss":
            return first[:, ::2], first[:, 1::2]
        half = first.shape[1] // 2
        return first[:, :half], first[:, half:]


def _rule(name: str, **settings: object) -> Rule:
    return replace(RULES[name], **settings)  # type: ignore[arg-type]  # by name


_SHARED = {"n_shared_experts": 1}
_QWEN2 = {"shared_expert_intermediate_size": WIDTH, "model_type": "qwen2_moe"}
_GROUPS = {"n_group": 4, "topk_group": 2}
_DEEPSEEK = {**_SHARED, **_GROUPS, "scoring_func": "sigmoid", "topk_method": "noaux_tc"}
_SOFTMAX = {"scoring_func": "softmax", "topk_method": "group_limited_greedy"}
_GROUPED = {"num_expert_group": 4, "topk_group": 2}


def _deepseek_v2(name: str, rule: Rule, **config: object) -> BlockCase:
    return BlockCase(
        id=name,
        module="deepseek_v2",
        name="DeepseekV2MoE",
        rule=rule,
        config={**_DEEPSEEK, **config},
        shared="shared_experts",
        factor=FACTOR,
    )


def _glm4(name: str, rule: Rule, **config: object) -> BlockCase:
    return BlockCase(
        id=name,
        module="glm4_moe",
        name="Glm4MoeSparseMoeBlock",
        rule=rule,
        config={**_SHARED, "n_group": 1, "topk_group": 1, **config},
        shared="shared_experts",
        factor=FACTOR,
    )


def _qwen(name: str, module: str, rule: Rule, **config: object) -> BlockCase:
    second = module == "qwen2_moe"
    return BlockCase(
        id=name,
        module=module,
        name="Qwen2MoeSparseMoeBlock" if second else "Qwen3MoeSparseMoeBlock",
        rule=rule,
        config={**(_QWEN2 if second else {}), **config},
        shared="shared_expert" if second else None,
    )


SCALED = (
    _deepseek_v2("deepseek_v3_groups", _rule("DeepSeekV3", **_GROUPED)),
    _deepseek_v2(
        "deepseek_v2_softmax_groups",
        _rule("GroupedSoftmax", group_score="max", **_GROUPED),
        **_SOFTMAX,
        norm_topk_prob=False,
    ),
    _deepseek_v2(
        "deepseek_v3_not_renormalised", _rule("BiasedSigmoid", **_GROUPED), norm_topk_prob=False
    ),
    _glm4("glm4_moe", _rule("DeepSeekV3")),
    _glm4("glm4_moe_groups", _rule("DeepSeekV3", **_GROUPED), **_GROUPS),
)
"""Blocks whose routed experts are multiplied by 2.5, by one of several."""

CASES = (
    _qwen("qwen3_moe", "qwen3_moe", _rule("Renormalize")),
    _qwen("qwen3_moe_not_renormalised", "qwen3_moe", _rule("Default"), norm_topk_prob=False),
    _qwen("qwen2_moe", "qwen2_moe", _rule("Default"), norm_topk_prob=False),
    _qwen("qwen3_next", "qwen2_moe", _rule("Renormalize")),
    BlockCase(
        id="deepseek_v1",
        module="deepseek",
        name="DeepseekMoE",
        rule=_rule("Renormalize"),
        config=_SHARED,
        shared="shared_experts",
    ),
    BlockCase(
        id="llama4",
        module="llama4",
        name="Llama4MoE",
        rule=_rule("Llama4"),
        config={"num_experts_per_tok": 1},
        top_k=1,
        gate="router",
        shared="shared_expert",
    ),
    BlockCase(
        id="gpt_oss",
        module="gpt_oss",
        name="GptOssSparseMoeBlock",
        rule=_rule("Renormalize"),
        config={"swiglu_limit": 7.0, "dtype": torch.float32},
        act=Act(alpha=1.702, beta=1.0, limit=7.0),
        gate="router",
    ),
)
