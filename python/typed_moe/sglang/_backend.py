"""`--moe-runner-backend typed_moe`, and `FusedMoE(..., routing=...)`: SGLang's layer on our runners.

A quantisation method of SGLang's keeps making and loading the weights; a subclass of it, made here,
runs them. The backend's name stands for itself with SGLang: no built-in layout or kernel is meant by it.
"""

from __future__ import annotations

import importlib
import logging
from typing import Protocol, cast, final
from weakref import WeakKeyDictionary

import attrs
import torch
from torch import Tensor

from typed_moe.config import Activation, Fp8BlockScale, MxFp8, Placement, Swiglu, Unquantized
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import ExpertWeights, KernelRequest
from typed_moe.routing import Routed, RoutingForm, RoutingShape, RoutingStrategy
from typed_moe.runners import CallBuffers, Decision, MoeRunner, Plan, decide, make_runner
from typed_moe.sglang._layers import activation_of
from typed_moe.sglang._ours import RoutedBySglang, ids_of, is_bypassed, top_k_of
from typed_moe.sglang._protocols import DispatchLike, LayerLike, RunnerConfigLike, TopKLike
from typed_moe.sglang._topk import TopKSettings, read_topk_config
from typed_moe.sglang._translate import RoutedOutside, strategy_of

logger = logging.getLogger("typed_moe.sglang")

NAME = "typed_moe"
"""Of the backend, on SGLang's command line."""


class MethodLike(Protocol):
    """**Protocol:** one of SGLang's MoE quantisation methods."""

    moe_runner_config: RunnerConfigLike


@final
@attrs.define(kw_only=True, eq=False)
class LayerState:
    """What is known of a layer on our backend.

    Attributes:
        injected: `routing=` of its constructor.
        topk: of the TopK that was bound to it.
        decisions: by form, once something is called.
    """

    injected: RoutingStrategy | None
    topk: TopKLike | None = None
    made: dict[RoutingForm, tuple[Decision, MoeRunner]] = attrs.field(factory=dict)


_states: WeakKeyDictionary[LayerLike, LayerState] = WeakKeyDictionary()


def is_ours(layer: LayerLike) -> bool:
    """Whether a layer is on our runners."""
    return layer in _states


def plans_of(layer: LayerLike) -> tuple[Plan, ...]:
    """What was decided for a layer of ours, in each form that it was called in."""
    return tuple(decision.plan for decision, _ in _states[layer].made.values())


def register_backend() -> None:
    """Tell SGLang's command line and runners of the backend."""
    choices = importlib.import_module("sglang.srt.arg_groups.choices")
    utils = importlib.import_module("sglang.srt.layers.moe.utils")
    choices.add_moe_runner_backend_choices([NAME])
    utils.register_moe_runner_backend_name(NAME)


def wanted(routing: RoutingStrategy | None) -> bool:
    """Whether a layer that is being made is ours: by `routing=`, or by the server's backend."""
    utils = importlib.import_module("sglang.srt.layers.moe.utils")
    return routing is not None or utils.get_moe_runner_backend().value == NAME


def take(layer: LayerLike, routing: RoutingStrategy | None, arguments: dict[str, object]) -> None:
    """Give a layer that is being made a quantisation method of ours.

    Args:
        layer: before its `__init__`.
        routing: of its constructor.
        arguments: of its constructor, by name; `quant_method` is added.

    Raises:
        UnsupportedRouting: the checkpoint's format, or a setting of the layer, is not run here.
    """
    config, prefix = arguments.get("quant_config"), arguments.get("prefix", "")
    given = cast("MethodLike | None", arguments.get("quant_method"))
    if given is None and config is not None:
        given = cast("_QuantConfig", config).get_quant_method(layer, str(prefix))
    if given is None:
        unquant = importlib.import_module("sglang.srt.layers.quantization.unquant")
        given = cast("MethodLike", unquant.UnquantizedFusedMoEMethod())
    _check(layer, given, arguments)
    given.__class__ = _subclass(type(given))
    arguments["quant_method"] = given
    _states[layer] = LayerState(injected=routing)


class _QuantConfig(Protocol):
    def get_quant_method(self, layer: LayerLike, prefix: str) -> MethodLike | None: ...


_FORMATS = ("UnquantizedFusedMoEMethod", "Fp8MoEMethod")


def _check(layer: LayerLike, method: MethodLike, arguments: dict[str, object]) -> None:
    name = type(method).__name__
    if name.removeprefix("TypedMoe") not in _FORMATS:
        raise UnsupportedRouting(
            f"{NAME} runs unquantised layers and FP8 ones with block scales; {arguments.get('prefix')} "
            f"has SGLang's {name}"
        )
    if name == "Fp8MoEMethod" and not getattr(method, "block_quant", False):
        raise UnsupportedRouting(
            f"{NAME} runs FP8 with block scales; {arguments.get('prefix')} has one scale per tensor"
        )
    moved = importlib.import_module("sglang.srt.layers.moe.utils").get_moe_a2a_backend()
    if not moved.is_none():
        raise UnsupportedRouting(
            f"{NAME} takes what SGLang's standard dispatcher gives; --moe-a2a-backend is {moved.value}"
        )
    for setting in ("no_combine", "num_fused_shared_experts"):
        if arguments.get(setting):
            raise UnsupportedRouting(
                f"{NAME} does not run a layer with {setting}={arguments[setting]}; leave it out "
                "(--disable-shared-experts-fusion)"
            )


_subclasses: dict[type, type] = {}


def _subclass(kind: type) -> type:
    """A method that loads as `kind` does, and runs our runners.

    SGLang's loaders look for words in the class's name, so the name keeps them.
    """
    if kind not in _subclasses:
        _subclasses[kind] = type(
            f"TypedMoe{kind.__name__}",
            (kind,),
            {
                "create_moe_runner": _create_moe_runner,
                "get_moe_runner_backend": _backend_of,
                "process_weights_after_loading": _keep_weights,
                "apply": _apply,
                # SGLang asks who multiplies by the factor. On CUDA it is the layer, and TopK if it
                # says so here; elsewhere the models do it themselves, whatever is said.
                "fuse_routed_scaling_factor_in_topk": property(_on_cuda),
            },
        )
    return _subclasses[kind]


def _on_cuda(method: object = None) -> bool:
    del method
    return bool(importlib.import_module("sglang.srt.utils").is_cuda())


def _create_moe_runner(method: MethodLike, layer: LayerLike, config: RunnerConfigLike) -> None:
    del layer
    method.moe_runner_config = config


def _keep_weights(method: MethodLike, layer: LayerLike) -> None:
    """As the checkpoint has them: our kernels lay them out themselves. And one to run them is there.

    Raises:
        UnsupportedRouting: no kernel serves the layer.
    """
    state, config = _states[layer], method.moe_runner_config
    state.made.clear()
    if state.topk is None:
        return
    topk = state.topk.topk_config
    left_to_us = topk.output_format == _formats().BYPASSED
    strategy = _strategy(config, layer, given=not left_to_us)
    request = _request(config, layer, layer.w13_weight.new_empty(0, layer.hidden_size), topk.top_k)
    request = attrs.evolve(request, dtype=layer.params_dtype)
    decide(request, strategy, form=None if left_to_us else RoutingForm.PRECOMPUTED)


def _backend_of(method: MethodLike, layer: LayerLike) -> object:
    """The backend, with the layer on it: what a TopK is bound to leads back to the experts."""
    del method
    utils = importlib.import_module("sglang.srt.layers.moe.utils")
    backend = utils.RegisteredMoeRunnerBackend(NAME)
    object.__setattr__(backend, "typed_moe_layer", layer)
    return backend


def bind(topk: TopKLike, backend: object) -> None:
    """A TopK is bound to a layer of ours: logits come through it, unrouted, if we can route them.

    Raises:
        ValueError: the layer's `routing=` and the TopK's settings are different rules.
    """
    layer = cast("LayerLike | None", getattr(backend, "typed_moe_layer", None))
    if layer is None:
        return
    state = _states[layer]
    state.topk = topk
    settings = read_topk_config(topk.topk_config)
    translated = strategy_of(settings)
    if _contradict(state.injected, settings):
        raise ValueError(
            f"{layer.layer_name}: routing= is {state.injected!r}, and its TopK computes "
            f"{translated!r}; give the TopK no routing settings, or those of the strategy"
        )
    if isinstance(translated, RoutedOutside) and state.injected is None:
        return
    formats = _formats()
    config = topk.topk_config
    # A backend without a name of SGLang's is given routed ids; ours routes by itself.
    if config.output_format == formats.STANDARD or config.output_format is None:
        config.output_format = formats.BYPASSED
        # Off CUDA a TopK routes whatever its format says; this is the one that reads it.
        topk._forward_method = topk.forward_cuda  # noqa: SLF001


class _Formats(Protocol):
    STANDARD: object
    BYPASSED: object


def _formats() -> _Formats:
    return cast("_Formats", importlib.import_module("sglang.srt.layers.moe.topk").TopKOutputFormat)


def _contradict(injected: RoutingStrategy | None, settings: TopKSettings) -> bool:
    """Whether a TopK says something, and something else than the layer's `routing=`."""
    if injected is None or settings == TopKSettings(top_k=settings.top_k):
        return False
    return _plain(strategy_of(settings, injected.name)) != _plain(injected)


def _plain(strategy: object) -> object:
    """Without what a translation leaves open: dtypes."""
    kind: type = type(strategy)
    if not attrs.has(kind):
        return strategy
    fields = [one.name for one in attrs.fields(kind) if not one.name.endswith("_dtype")]
    return kind, tuple(getattr(strategy, name) for name in fields)


def _apply(method: MethodLike, layer: LayerLike, dispatch_output: DispatchLike) -> object:
    """SGLang's `apply`: this rank's experts on what the dispatcher gives."""
    hidden = dispatch_output.hidden_states
    output = hidden
    if hidden.shape[0]:
        config = method.moe_runner_config
        output = _run(config, layer, dispatch_output)
        factor = _factor_of_layer(config, layer)
        if factor != 1.0:
            output = output * factor
    standard = importlib.import_module("sglang.srt.layers.moe.token_dispatcher.standard")
    result: object = standard.StandardCombineInput(hidden_states=output)
    return result


def _factor_of_layer(config: RunnerConfigLike, layer: LayerLike) -> float:
    """The factor that SGLang leaves to the layer: on CUDA, what TopK does not put into the weights.

    Raises:
        UnsupportedRouting: no TopK was bound, so that it is not known whether it does.
    """
    factor = config.routed_scaling_factor
    if factor in (None, 1.0) or not _on_cuda():
        return 1.0
    topk = _states[layer].topk
    if topk is None:
        raise UnsupportedRouting(
            f"{layer.layer_name}: routed_scaling_factor is {factor}, and no TopK is bound to the "
            "layer, so that nothing says who multiplies by it"
        )
    return 1.0 if topk.topk_config.apply_routed_scaling_factor_on_output else factor


def _run(config: RunnerConfigLike, layer: LayerLike, dispatch: DispatchLike) -> Tensor:
    state, topk = _states[layer], dispatch.topk_output
    if is_bypassed(topk) and topk.expert_location_dispatch_info is not None:
        topk = topk.to_standard()
    bypassed = is_bypassed(topk)
    form = RoutingForm.IN_KERNEL if bypassed else RoutingForm.PRECOMPUTED
    if form not in state.made:
        state.made[form] = _make(
            config, layer, dispatch.hidden_states, top_k_of(topk), given=not bypassed
        )
        _tell(layer, state.made[form][0].plan)
    _, runner = state.made[form]
    if is_bypassed(topk):
        bias = topk.topk_config.correction_bias
        return runner(dispatch.hidden_states, topk.router_logits, bias, CallBuffers())
    ids, weights = ids_of(topk)
    if getattr(layer.dispatcher, "local_expert_mapping", None) is not None:
        # SGLang's dispatcher has made them local, with -1 for the other ranks' experts.
        ids = torch.where(ids >= 0, ids + layer.moe_ep_rank * layer.num_local_experts, ids)
    routed = Routed(topk_ids=ids, topk_weights=weights)
    return runner(dispatch.hidden_states, routed, None, CallBuffers())


_told: set[tuple[str, str]] = set()


def _tell(layer: LayerLike, plan: Plan) -> None:
    """One line for the first layer of each kind; the plans of all are in `plans_of`."""
    kind = (repr(plan.strategy), plan.kernel)
    level = logging.DEBUG if kind in _told else logging.INFO
    _told.add(kind)
    logger.log(
        level,
        "typed-moe: %s runs %r on the %s kernel, %s routing, %r",
        layer.layer_name,
        plan.strategy,
        plan.kernel,
        plan.form.value,
        plan.request.quant,
    )


def _make(
    config: RunnerConfigLike, layer: LayerLike, hidden_states: Tensor, top_k: int, *, given: bool
) -> tuple[Decision, MoeRunner]:
    strategy = _strategy(config, layer, given=given)
    request = _request(config, layer, hidden_states, top_k)
    decision = decide(request, strategy, form=RoutingForm.PRECOMPUTED if given else None)
    weights = _weights(layer, interleaved=_interleaved(config))
    return decision, make_runner(decision, decision.kernel.prepare(weights, request))


def _request(
    config: RunnerConfigLike, layer: LayerLike, hidden_states: Tensor, top_k: int
) -> KernelRequest:
    placement = Placement(
        tp_size=layer.moe_tp_size,
        tp_rank=layer.moe_tp_rank,
        ep_size=layer.moe_ep_size,
        ep_rank=layer.moe_ep_rank,
    )
    scale = cast("Tensor | None", getattr(layer, "w13_weight_scale_inv", None))
    return KernelRequest(
        shape=RoutingShape(num_experts=layer.num_experts, top_k=top_k),
        quant=Unquantized() if scale is None else _fp8(scale),
        activation=_activation(config),
        placement=placement,
        hidden_size=hidden_states.shape[1],
        intermediate_size=layer.intermediate_size_per_partition * placement.tp_size,
        num_fused_shared_experts=0,
        has_bias=getattr(layer, "w13_weight_bias", None) is not None,
        device=hidden_states.device,
        dtype=hidden_states.dtype,
    )


def _fp8(scale: Tensor) -> Fp8BlockScale | MxFp8:
    return MxFp8() if scale.dtype == torch.uint8 else Fp8BlockScale()


def _strategy(config: RunnerConfigLike, layer: LayerLike, *, given: bool) -> RoutingStrategy:
    """The injected one, or the TopK's. Kept with the layer: a rebuilt TopKConfig loses settings."""
    state = _states[layer]
    if given and state.injected is None:
        return RoutedBySglang(weight_on_input=config.apply_router_weight_on_input)
    if state.injected is not None:
        return state.injected
    assert state.topk is not None, "a TopK that leaves the routing to us was bound"
    strategy = strategy_of(read_topk_config(state.topk.topk_config))
    if isinstance(strategy, RoutedOutside):
        raise UnsupportedRouting(f"{layer.layer_name}: {strategy.reason}")
    return strategy


def _interleaved(config: RunnerConfigLike) -> bool:
    """gpt-oss's experts: gate and up rows in turns, which SGLang's native path reads so."""
    return config.gemm1_alpha is not None and config.gate_up_interleaved


def _activation(config: RunnerConfigLike) -> Activation:
    """A layer with an alpha adds 1 to the up half (`swiglu_gpt_oss_sigmoid_alpha`)."""
    found = activation_of(config)
    if isinstance(found, Swiglu) and config.gemm1_alpha is not None and config.gemm1_beta is None:
        return attrs.evolve(found, beta=1.0)
    return found


def _weights(layer: LayerLike, *, interleaved: bool) -> ExpertWeights:
    def tensor(name: str) -> Tensor | None:
        return cast("Tensor | None", getattr(layer, name, None))

    w13, bias = layer.w13_weight, tensor("w13_weight_bias")
    if interleaved:
        w13 = _gate_first(w13)
        bias = None if bias is None else _gate_first(bias)
    return ExpertWeights(
        w13_weight=w13,
        w2_weight=layer.w2_weight,
        w13_scale=tensor("w13_weight_scale_inv"),
        w2_scale=tensor("w2_weight_scale_inv"),
        w13_bias=bias,
        w2_bias=tensor("w2_weight_bias"),
    )


def _gate_first(rows: Tensor) -> Tensor:
    return torch.cat((rows[:, 0::2], rows[:, 1::2]), dim=1)
