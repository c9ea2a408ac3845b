"""SGLang's `fused_moe` function, which a few of its models call with weights of their own.

DeepSeek (V1), DBRX, XVERSE-MoE and AFMoE pack their experts' matrices by themselves and make no
`FusedMoE`. Their TopK routes; with `--moe-runner-backend typed_moe` our runners compute.
"""

from __future__ import annotations

from typing import final
from weakref import ref

import attrs
import torch
from torch import Tensor

from typed_moe.config import Bf16, Placement, Unquantized
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import ExpertWeights, KernelRequest
from typed_moe.routing import Routed, RoutingForm, RoutingShape
from typed_moe.runners import MoeRunner, decide, make_runner
from typed_moe.sglang._activation import activation_of, is_interleaved
from typed_moe.sglang._ours import RoutedBySglang
from typed_moe.sglang._protocols import StandardLike
from typed_moe.sglang._seam import ConfigLike


@final
@attrs.frozen(kw_only=True, eq=False)
class _Known:
    w1: ref[Tensor]
    w2: ref[Tensor]
    runner: MoeRunner


@final
class PackedExperts:
    """The runners of this process for weights that come with each call."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int, int], _Known] = {}

    def __call__(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_output: StandardLike,
        moe_runner_config: ConfigLike,
        b1: Tensor | None = None,
        b2: Tensor | None = None,
        **quantised: object,
    ) -> Tensor:
        """(T, H), as SGLang's function gives it.

        Args:
            hidden_states: (T, H).
            w1: (E, 2I, H) with a gate, else (E, I, H).
            w2: (E, H, I).
            topk_output: of a TopK that has routed.
            moe_runner_config: SGLang's.
            b1: (E, 2I) or (E, I), or None.
            b2: (E, H), or None.
            quantised: SGLang's arguments for quantised weights, none of which may be set.

        Raises:
            UnsupportedRouting: quantised weights, or no kernel of ours serves the call.
        """
        asked = sorted(name for name, value in quantised.items() if value not in (None, False))
        if asked or moe_runner_config.no_combine or is_interleaved(moe_runner_config):
            raise UnsupportedRouting(
                f"SGLang's fused_moe was called with {', '.join(asked) or 'no_combine or rows by turns'}"
                "; typed-moe serves it for unquantised weights. Choose another --moe-runner-backend"
            )
        if hidden_states.shape[0] == 0:
            return torch.empty_like(hidden_states)
        routed = Routed(topk_ids=topk_output.topk_ids, topk_weights=topk_output.topk_weights)
        top_k = routed.topk_ids.shape[1]
        weights = ExpertWeights(w13_weight=w1, w2_weight=w2, w13_bias=b1, w2_bias=b2)
        runner = self._runner(weights, moe_runner_config, top_k)
        output = runner(hidden_states, routed, None)
        factor = moe_runner_config.routed_scaling_factor
        return output if factor in (None, 1.0) else output * factor

    def _runner(self, weights: ExpertWeights, config: ConfigLike, top_k: int) -> MoeRunner:
        w1, w2 = weights.w13_weight, weights.w2_weight
        key = (id(w1), id(w2), top_k)
        known = self._known.get(key)
        if known is None or known.w1() is not w1 or known.w2() is not w2:
            known = _Known(w1=ref(w1), w2=ref(w2), runner=_make(weights, config, top_k))
            self._known[key] = known
        return known.runner


def _make(weights: ExpertWeights, config: ConfigLike, top_k: int) -> MoeRunner:
    w1, w2 = weights.w13_weight, weights.w2_weight
    request = KernelRequest(
        shape=RoutingShape(num_experts=w1.shape[0], top_k=top_k),
        quant=Bf16() if w1.dtype is torch.bfloat16 else Unquantized(),
        activation=activation_of(config),
        placement=Placement(),
        hidden_size=w2.shape[1],
        intermediate_size=w2.shape[2],
        num_fused_shared_experts=0,
        has_bias=weights.w13_bias is not None,
        device=w1.device,
        dtype=w1.dtype,
    )
    strategy = RoutedBySglang(
        weight_on_input=config.apply_router_weight_on_input,
        why="the model packs its experts itself",
    )
    decision = decide(request, strategy, form=RoutingForm.PRECOMPUTED)
    if decision.kernel.prepare(weights, request) is not weights:
        raise UnsupportedRouting(
            f"kernel {decision.plan.kernel} wants the weights in a layout of its own, and SGLang's "
            "fused_moe gives the model's at each call; choose another --moe-runner-backend"
        )
    return make_runner(decision, weights)
