"""Which cases and sizes are run: both sides of every compiled tier of 0.7.2.post1.

Tiers: `RoutingCustomPolicy.cuh`, `PolicyTraits`; groups: `trtllm_fused_moe_routing_deepseek.cu`.
"""

from __future__ import annotations

from dataclasses import replace

import attrs
import torch

from tests.acceptance.cases import PLAIN, Case, find, loosened, sized
from typed_moe import DeepSeekV3, InKernel, KernelRules, Refused, RoutingShape
from typed_moe.kernels import flashinfer_facts as facts
from typed_moe.routing import ANY_SIZE, GroupLimits, MethodRules

Size = tuple[int, int]
"""(E, top_k)."""
MANY = 2**31 - 1

RULES = KernelRules(
    kernel="FlashInfer's routing kernel",
    methods=facts.methods((0, 7, 2), "fp8_per_tensor_scale")[0],
    weight_on_input=True,
    source=facts.NEWEST,
)
"""Per-tensor FP8 is the entry point that routes every method."""

_UNLIMITED = attrs.evolve(
    RULES,
    methods={
        name: attrs.evolve(
            rules,
            tiers=ANY_SIZE,
            grouped_tiers=ANY_SIZE,
            groups=GroupLimits(max_groups=MANY, max_experts_per_group=MANY, max_topk_group=MANY),
        )
        for name, rules in RULES.methods.items()
    },
)

TOKENS = (1, 4, 5, 8, 16, 17, 64, 256, 257, 300, 1024, 1025, 2048, 8192)
FEW_TOKENS = (5, 300, 2048)

_SMALL: tuple[Size, ...] = (
    *((8, 2), (8, 8), (128, 1), (128, 4), (128, 8), (129, 8), (160, 8), (256, 8)),
    *((128, 9), (256, 9), (257, 8), (400, 9), (512, 10)),
)
_SOFTMAX: tuple[Size, ...] = (
    *((8, 8), (128, 4), (128, 5), (128, 8), (129, 8), (160, 8), (161, 8), (160, 9)),
    *((256, 8), (256, 9), (256, 16), (256, 17), (257, 8), (384, 8), (400, 9)),
    *((512, 8), (512, 9), (512, 10), (512, 16), (512, 17), (512, 22), (512, 23), (512, 32)),
    *((513, 8), (576, 8), (576, 9), (577, 8), (768, 32), (769, 16), (896, 16), (896, 17)),
    *((897, 32), (1024, 32), (1025, 8), (2048, 32), (2049, 8), (2048, 33)),
)
_BIASED: tuple[Size, ...] = (
    *((8, 4), (8, 8), (128, 8), (128, 9), (129, 8), (256, 8), (256, 9), (257, 8)),
    *((384, 8), (384, 9), (385, 8), (385, 9), (400, 9), (512, 8), (512, 9), (512, 22)),
    *((512, 23), (513, 16), (576, 8), (896, 16), (896, 17), (1024, 22), (1024, 23)),
    *((1024, 32), (1025, 8), (1024, 33)),
)
_LLAMA4: tuple[Size, ...] = ((8, 1), (16, 1), (128, 1), (129, 1), (256, 1))
_GROUPS: tuple[tuple[int, int, int, int], ...] = (
    *((256, 8, 8, 4), (160, 6, 8, 3), (128, 8, 4, 2), (64, 8, 2, 1), (64, 4, 8, 4)),
    *((256, 1, 8, 4), (248, 8, 8, 4), (256, 8, 8, 1)),
    *((64, 32, 8, 4), (256, 8, 16, 4), (256, 8, 8, 5), (128, 8, 2, 1), (256, 9, 8, 4)),
)
"""(E, top_k, num_expert_group, topk_group)."""


@attrs.frozen(kw_only=True)
class Planned:
    """A case and what the strategy says for FlashInfer's kernel."""

    case: Case
    told: InKernel | Refused
    anyway: InKernel
    """What would be told if nothing were refused."""

    @property
    def rules(self) -> MethodRules:
        """What the capability table says of the method."""
        return RULES.methods[self.case.strategy.name]

    @property
    def no_bias(self) -> str | None:
        """What it says of a null bias, for these groups."""
        grouped = self.case.rule.num_expert_group > 1
        return self.rules.grouped_no_bias if grouped else self.rules.no_bias


def planned() -> tuple[Planned, ...]:
    """Every method at every size."""
    cases = [sized(case, *size) for case in PLAIN for size in _sizes(case.id)]
    cases += [sized(find("Llama4"), *size) for size in _LLAMA4]
    cases += [
        sized(find(name), *size) for name in ("MiniMax2", "DeepSeekV3-Kimi") for size in _BIASED
    ]
    cases += [grouped(*size) for size in _GROUPS]
    return tuple(plan(loosened(case)) for case in cases)


def _sizes(name: str) -> tuple[Size, ...]:
    return _SOFTMAX if name.startswith("Renormalize") else _SMALL


def grouped(num_experts: int, top_k: int, groups: int, kept: int) -> Case:
    """DeepSeek-V3 with groups, and the leave to round its bias as the grouped kernel does."""
    base = find("DeepSeekV3-8of4")
    strategy = DeepSeekV3(
        num_expert_group=groups,
        topk_group=kept,
        routed_scaling_factor=base.rule.scale,
        correction_bias_dtype=torch.bfloat16,
    )
    return Case(
        id=f"DeepSeekV3-{groups}of{kept}",
        strategy=strategy,
        rule=replace(base.rule, num_expert_group=groups, topk_group=kept),
        num_experts=num_experts,
        top_k=top_k,
    )


def plan(case: Case) -> Planned:
    """What the strategy says for FlashInfer's kernel, and would say to one without limits."""
    shape = RoutingShape(num_experts=case.num_experts, top_k=case.top_k)
    anyway = case.strategy.in_kernel(shape, _UNLIMITED)
    assert isinstance(anyway, InKernel), anyway
    return Planned(case=case, told=case.strategy.in_kernel(shape, RULES), anyway=anyway)
