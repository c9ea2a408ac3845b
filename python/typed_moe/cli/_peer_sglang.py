"""A peer: SGLang's fused MoE, as its `FusedMoE` runs it under `--moe-runner-backend triton`."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, cast, final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.cli._bench_weights import StoredLayer
from typed_moe.cli._machine import version_of
from typed_moe.cli._peer import Built, Runnable
from typed_moe.config import Bf16, Fp8BlockScale, Swiglu
from typed_moe.routing import DeepSeekV3, Refused, Renormalize, RenormalizeNaive

_ROUNDINGS = 4
"""Gate, up, their product before FP8 stores it, and each slot's weighted output are bfloat16 tensors."""
_BLOCK = [128, 128]


class _TopK(Protocol):
    """`sglang.srt.layers.moe.topk.TopK`, bound to no runner: ids and weights come out."""

    def __call__(self, hidden_states: Tensor, router_logits: Tensor, /) -> object: ...


class _FusedExperts(Protocol):
    """`fused_experts` of SGLang's Triton runner."""

    def __call__(
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_output: object,
        moe_runner_config: object,
        /,
        **quantised: object,
    ) -> Tensor: ...


class _Enter(Protocol):
    """SGLang's configuration of this process, for the time of a call."""

    def __call__(self) -> AbstractContextManager[object]: ...


@final
@attrs.frozen(kw_only=True)
class Sglang:
    """SGLang's `TopK` and the `fused_experts` that its layer calls: its gate, its tiles, its kernels."""

    name: str = "sglang"

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        """Over the stored tensors themselves: SGLang keeps them in the same order."""
        first = stored[0]
        if not isinstance(first.quant, Bf16 | Fp8BlockScale):
            return Refused("SGLang's Triton runner is timed in bf16 and in fp8_block")
        plain = first.shape.activation == Swiglu() and not first.shape.has_bias
        if not plain or first.shape.routing.apply_router_weight_on_input:
            return Refused(
                "is timed with plain SwiGLU experts, without biases, weighted at their output"
            )
        if routing_options(first) is None:
            return Refused(f"is timed with softmax and DeepSeek gates, not {first.shape.routing}")
        version = version_of("sglang")
        if version is None:
            return Refused("sglang is not installed; pip install sglang")
        try:
            layers = _layers(stored)
        except torch.OutOfMemoryError:
            raise
        # An installation in parts fails in many ways, each with its own sentence.
        except Exception as error:  # noqa: BLE001
            return Refused(f"sglang {version}: {' '.join(str(error).split())[:300]}")
        return Built(
            layers=layers,
            about=f"sglang {version}, TopK and its Triton runner's fused_experts",
            roundings=_ROUNDINGS,
        )


def routing_options(stored: StoredLayer) -> Mapping[str, object] | None:
    """What SGLang's `TopK` is made with for the layer's strategy; None: the two do not meet here."""
    match stored.shape.routing:
        case Renormalize() | RenormalizeNaive():
            return {"renormalize": True}
        case DeepSeekV3(num_expert_group=1, routed_scaling_factor=factor):
            return {
                "renormalize": True,
                "scoring_func": "sigmoid",
                "correction_bias": stored.correction_bias,
                "routed_scaling_factor": factor,
                "apply_routed_scaling_factor_on_output": True,
            }
        case _:
            return None


def expert_options(stored: StoredLayer) -> Mapping[str, object]:
    """What `fused_experts` is told of how the weights are stored, beyond the weights."""
    if isinstance(stored.quant, Bf16):
        return {}
    return {
        "use_fp8_w8a8": True,
        "w1_scale": stored.state["w13_weight_scale_inv"],
        "w2_scale": stored.state["w2_weight_scale_inv"],
        "block_shape": _BLOCK,
    }


def _layers(stored: Sequence[StoredLayer]) -> tuple[Runnable, ...]:
    enter = _configuration(stored[0].state["w13_weight"].device)
    # In this order: SGLang's configuration is read while its modules are imported and made.
    with enter():
        triton = importlib.import_module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
        return tuple(_layer(one, enter, triton.fused_experts) for one in stored)


def _configuration(device: torch.device) -> _Enter:
    """Of a world of one, beside whatever this process has published and not in its place."""
    runtime = importlib.import_module("sglang.srt.runtime_context")
    arguments = importlib.import_module("sglang.srt.server_args").ServerArgs(
        model_path="dummy", device=device.type, moe_runner_backend="triton"
    )
    context = runtime.create_context(arguments, role="test", ranks=runtime.SpawnRanks(world_rank=0))
    # Read for its symmetric memory, which one process does not use.
    context.parallel.override_permanently(tp_group=None)

    def enter() -> AbstractContextManager[object]:
        return cast("AbstractContextManager[object]", runtime.use_context(context))

    return enter


def _layer(stored: StoredLayer, enter: _Enter, fused_experts: _FusedExperts) -> Runnable:
    w13, w2 = stored.state["w13_weight"], stored.state["w2_weight"]
    options = expert_options(stored)
    topk, config = _topk(stored), _runner_config(stored.shape)

    def run(hidden_states: Tensor, router_logits: Tensor) -> Tensor:
        with enter():
            routed = topk(hidden_states, router_logits)
            return fused_experts(hidden_states, w13, w2, routed, config, **options)

    return run


def _topk(stored: StoredLayer) -> _TopK:
    made = importlib.import_module("sglang.srt.layers.moe.topk").TopK(
        stored.shape.top_k, layer_id=0, **(routing_options(stored) or {})
    )
    made.bind_runner_backend(None)
    return cast("_TopK", made)


def _runner_config(shape: LayerShape) -> object:
    made: object = importlib.import_module("sglang.srt.layers.moe.moe_runner").MoeRunnerConfig(
        num_experts=shape.num_experts,
        num_local_experts=shape.num_experts,
        hidden_size=shape.hidden_size,
        intermediate_size_per_partition=shape.intermediate_size,
        layer_id=0,
        top_k=shape.top_k,
        params_dtype=torch.bfloat16,
        # The input is used again.
        inplace=False,
    )
    return made
