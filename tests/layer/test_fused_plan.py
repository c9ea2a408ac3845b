"""What routes before the kernel on a CUDA device, and what the plan says of it. No GPU, no Triton."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.recorded_flashinfer import RecordedLibrary
from typed_moe import Bf16, DeepSeekV3, FlashInferKernel, Refused, RoutingForm, RoutingShape
from typed_moe.config import Placement, Swiglu
from typed_moe.kernels import FUSED_RULES, FusedRouting, KernelRequest
from typed_moe.kernels._fused_rules import route_settings
from typed_moe.routing import BiasRule, InKernel
from typed_moe.runners import _planning
from typed_moe.runners._planning import Decision, decide

SHAPE = RoutingShape(num_experts=16, top_k=4)
STRATEGY = DeepSeekV3(num_expert_group=4, topk_group=2)


def _decide(device: str) -> Decision:
    request = KernelRequest(
        shape=SHAPE,
        quant=Bf16(),
        activation=Swiglu(),
        placement=Placement(),
        hidden_size=256,
        intermediate_size=256,
        num_fused_shared_experts=0,
        has_bias=False,
        device=torch.device(device),
        dtype=torch.bfloat16,
    )
    kernel = FlashInferKernel(RecordedLibrary("0.7.2.post1"))
    return decide(request, STRATEGY, kernel=kernel, form=RoutingForm.PRECOMPUTED)


def _fused() -> FusedRouting:
    told = STRATEGY.in_kernel(SHAPE, FUSED_RULES)
    assert isinstance(told, InKernel)
    settings = route_settings(told, SHAPE)
    assert not isinstance(settings, Refused)
    return FusedRouting(
        name=STRATEGY.name,
        shape=SHAPE,
        settings=settings,
        bias=BiasRule.REQUIRED,
        router_logits_dtype=torch.float32,
    )


def test_the_fused_kernel_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it serves the strategy, the runner is given it, and the plan and its flaw say so."""
    fused = _fused()
    monkeypatch.setattr(_planning, "fused_routing", lambda *_args, **_kwargs: fused)
    decision = _decide("cuda")
    assert decision.routing is fused
    assert decision.plan.fused_routing is True
    text = str(decision.plan)
    assert "DeepSeekV3 by the fused routing kernel, in one launch before the kernel" in text
    assert "routing runs before the kernel, in one launch of its own: " in text
    assert "1.0 by the strategy" in text


def test_the_strategy_routes_and_the_plan_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not, the reason is beside the fallback."""
    refused = Refused("needs Triton")
    monkeypatch.setattr(_planning, "fused_routing", lambda *_args, **_kwargs: refused)
    decision = _decide("cuda")
    assert decision.routing is None
    text = str(decision.plan)
    assert "DeepSeekV3.select_experts, in PyTorch, before the kernel (needs Triton)" in text
    assert "routing runs before the kernel, in PyTorch" in text


def test_a_cpu_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """There `select_experts` is the road, and the plan gives no excuse."""

    def asked(*_args: object, **_kwargs: object) -> FusedRouting:
        raise AssertionError

    monkeypatch.setattr(_planning, "fused_routing", asked)
    decision = _decide("cpu")
    assert decision.routing is None
    assert decision.plan.fused_routing is None
