"""What runs in the place of one of SGLang's layers: a plan for each way of routing it."""

from __future__ import annotations

from typing import final

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe.config import Format
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import ExpertWeights, KernelRequest
from typed_moe.routing import BiasRule, Routed, RoutingForm, RoutingShape, RoutingStrategy
from typed_moe.runners import Decision, MoeRunner, Plan, decide, make_runner
from typed_moe.sglang._activation import activation_of
from typed_moe.sglang._agree import contradiction
from typed_moe.sglang._layers import placement_of
from typed_moe.sglang._methods import Agreement, compare_method
from typed_moe.sglang._ours import RoutedBySglang, ids_of, is_bypassed
from typed_moe.sglang._protocols import DispatchLike, TopKLike
from typed_moe.sglang._scale import Owned, ScaleAtSeam
from typed_moe.sglang._seam import ConfigLike, SeamLayerLike
from typed_moe.sglang._serves import ids_are_wanted
from typed_moe.sglang._topk import TopKConfigLike, read_topk_config
from typed_moe.sglang._translate import RoutedOutside, strategy_of


@final
@attrs.define(kw_only=True, eq=False)
class _Way:
    """One way of routing a layer.

    Attributes:
        decision: the plan.
        owned: who multiplies by the factor.
        topk: the config of the TopK in front; None: there is none.
        runner: None until the weights are there.
        told: the log has a line about it.
    """

    decision: Decision
    owned: Owned
    topk: TopKConfigLike | None
    runner: MoeRunner | None = None
    told: bool = False

    def __call__(
        self, hidden_states: Tensor, routing: Tensor | Routed, bias: Tensor | None
    ) -> Tensor:
        if self.runner is None:
            raise RuntimeError("a layer was called before SGLang loaded its weights")
        output = self.runner(hidden_states, routing, bias)
        return output if self.owned.after == 1.0 else output * self.owned.after

    @override
    def __str__(self) -> str:
        plan = self.decision.plan
        return (
            f"{plan.strategy!r} on the {plan.kernel} kernel, {plan.form.value} routing, "
            f"{plan.request.quant!r}; {self.owned}"
        )


@final
class LayerExperts:
    """One layer's experts.

    Args:
        name: of the layer, for messages.
        layer: SGLang's.
        config: its runner config.
        quant: the format of its parameters.
        scale: what SGLang's question is answered with.
        routing: the strategy that the model injects; None: what its TopK computes.
        e_score_correction_bias: (E,), for `routing` with router logits.

    Raises:
        UnsupportedRouting: no kernel of ours serves the layer.
        ValueError: numbers that do not fit together.
    """

    def __init__(
        self,
        *,
        name: str,
        layer: SeamLayerLike,
        config: ConfigLike,
        quant: Format,
        scale: ScaleAtSeam,
        routing: RoutingStrategy | None,
        e_score_correction_bias: Tensor | None,
    ) -> None:
        self.name, self.config = name, config
        self._scale, self._routing, self._bias = scale, routing, e_score_correction_bias
        self._request = _request(layer, config, quant)
        self._bound: list[_Way] = []
        # With any top_k, to refuse a format or an activation before a TopK says how many.
        decide(self._request, self._by_topk("not known yet"), form=RoutingForm.PRECOMPUTED)
        self._alone: _Way | None = None
        if routing is not None:
            if routing.bias is BiasRule.NONE and e_score_correction_bias is not None:
                raise ValueError(
                    f"{name}: {routing.name} reads no e_score_correction_bias and was given one"
                )
            self._refuse_side(routing)
            self._alone = self._way(self._request, routing, None)

    def _by_topk(self, why: str) -> RoutedBySglang:
        return RoutedBySglang(weight_on_input=self.config.apply_router_weight_on_input, why=why)

    def _refuse_side(self, strategy: RoutingStrategy) -> None:
        asked = self.config.apply_router_weight_on_input
        if strategy.apply_router_weight_on_input != asked:
            raise UnsupportedRouting(
                f"{self.name}: {strategy.name} weights the experts' "
                f"{'input' if strategy.apply_router_weight_on_input else 'output'}, and the layer "
                f"says apply_router_weight_on_input={asked}; allowed: one of the two"
            )

    def _way(
        self, request: KernelRequest, strategy: RoutingStrategy, topk: TopKConfigLike | None
    ) -> _Way:
        form = RoutingForm.PRECOMPUTED if isinstance(strategy, RoutedBySglang) else None
        decision = decide(request, strategy, form=form)
        owned = self._scale.owned(strategy, decision.plan.form, topk)
        return _Way(decision=decision, owned=owned, topk=topk)

    def bind(self, topk: TopKLike, method: str | None) -> bool:
        """A TopK in front of the layer; whether it should leave the routing to us.

        It should where SGLang itself would leave it to a kernel: the model's number and its TopK say
        the same, and nothing else wants the ids.

        Raises:
            ValueError: the TopK computes another rule than `routing`.
            UnsupportedRouting: no kernel of ours serves what it computes.
        """
        config = topk.topk_config
        if any(way.topk is config for way in self._bound):
            return self._bypasses(config)
        settings = read_topk_config(config)
        rule = strategy_of(settings, method)
        if self._routing is not None:
            said = contradiction(self._routing, rule)
            if said is not None:
                raise ValueError(f"{self.name}: {said}")
            rule = self._routing
        strategy = self._left_to_us(rule, method, config)
        if isinstance(strategy, str):
            if self._routing is not None:
                raise ValueError(
                    f"{self.name}: routing={self._routing!r} was given, and its TopK routes by "
                    f"itself ({strategy}); leave one of them out"
                )
            strategy = self._by_topk(strategy)
        else:
            self._refuse_side(strategy)
        # Slots for fused shared experts, which a block may add by itself, are in the layer's top_k.
        slots = self.config.top_k if isinstance(strategy, RoutedBySglang) else None
        shape = RoutingShape(
            num_experts=self._request.shape.num_experts, top_k=slots or config.top_k
        )
        request = attrs.evolve(self._request, shape=shape)
        self._bound.append(self._way(request, strategy, config))
        return self._bypasses(config)

    def _bypasses(self, config: TopKConfigLike) -> bool:
        way = self._of(config)
        return way is not None and not isinstance(way.decision.plan.strategy, RoutedBySglang)

    def _left_to_us(
        self, rule: RoutingStrategy | RoutedOutside, method: str | None, config: TopKConfigLike
    ) -> RoutingStrategy | str:
        """The strategy, or why the TopK routes by itself."""
        if isinstance(rule, RoutedOutside):
            return rule.name
        if config.num_shared_topk_slots or self.config.num_fused_shared_experts:
            return "shared experts are fused into the layer"
        wanted = ids_are_wanted()
        if wanted is not None:
            return f"its ids are wanted by {wanted}"
        if self._routing is not None:
            return rule
        agreement = compare_method(method, rule).agreement
        if agreement in (Agreement.SAME, Agreement.EQUAL):
            return rule
        return f"{rule!r}, and the model's number is {method}"

    def _of(self, config: TopKConfigLike) -> _Way | None:
        return next((way for way in self._bound if way.topk is config), None)

    def prepare(self, weights: ExpertWeights) -> ExpertWeights:
        """The runners, for weights that are loaded.

        Returns:
            The weights as the kernel wants them, to be kept in the place of those.

        Raises:
            UnsupportedRouting: no TopK is known and the layer has a factor, so that it is not known
                who multiplies.
        """
        ways = self._ways()
        if not ways:
            if self._scale.factor != 1.0:
                raise UnsupportedRouting(
                    f"{self.name}: routed_scaling_factor is {self._scale.factor}, and the model binds "
                    "no TopK to the layer (TopK.bind_runner_backend), so that it is not known who "
                    "multiplies; choose another --moe-runner-backend"
                )
            self._alone = self._way(
                self._request, self._by_topk("the model binds no TopK to the layer"), None
            )
            ways = [self._alone]
        kernel = ways[0].decision.kernel
        prepared = kernel.prepare(weights, self._request)
        for way in ways:
            assert way.decision.plan.kernel == kernel.name, "one layer, one kernel"
            way.runner = make_runner(way.decision, prepared)
        return prepared

    @property
    def quant(self) -> Format:
        """The format of its weights."""
        return self._request.quant

    @property
    def kernel(self) -> str:
        """The name of the kernel that runs it."""
        return self._ways()[0].decision.plan.kernel

    @property
    def plans(self) -> tuple[Plan, ...]:
        """What was decided, for each way of routing."""
        return tuple(way.decision.plan for way in self._ways())

    @property
    def owners(self) -> tuple[Owned, ...]:
        """Who multiplies by the factor, for each way of routing."""
        return tuple(way.owned for way in self._ways())

    def _ways(self) -> list[_Way]:
        return [*self._bound, *([] if self._alone is None else [self._alone])]

    def __call__(self, dispatch: DispatchLike) -> tuple[Tensor, _Way | None]:
        """This rank's experts, on what SGLang's dispatcher gives.

        Returns:
            (T, H), and what it ran; None without tokens.

        Raises:
            ValueError: a layer with `routing` is given another's ids, or activations that a
                dispatcher has quantised.
        """
        hidden_states = dispatch.hidden_states
        if dispatch.hidden_states_scale is not None:
            raise ValueError(f"{self.name}: the dispatcher has quantised the activations already")
        if hidden_states.shape[0] == 0:
            return torch.empty_like(hidden_states), None
        way, routing, bias = self._routing_of(dispatch)
        return way(hidden_states, routing, bias), way

    def _routing_of(self, dispatch: DispatchLike) -> tuple[_Way, Tensor | Routed, Tensor | None]:
        given: object = dispatch.topk_output
        if isinstance(given, Tensor):
            return self._with_routing(), given, self._bias
        topk = dispatch.topk_output
        if is_bypassed(topk):
            config = topk.topk_config
            return self._leaving_it(config), topk.router_logits, config.correction_bias
        ids, weights = ids_of(topk)
        routed = Routed(topk_ids=ids, topk_weights=weights)
        return self._given(routed), routed, None

    def _with_routing(self) -> _Way:
        if self._alone is None or self._routing is None:
            raise ValueError(
                f"{self.name} was given router logits; allowed: a TopK's output, or a layer made "
                "with routing="
            )
        return self._alone

    def _leaving_it(self, config: TopKConfigLike) -> _Way:
        """Of a TopK that left the routing to us.

        A piecewise CUDA graph makes a new config of a few of its fields: with one TopK there is only
        one that it can be.
        """
        way = self._of(config)
        if way is not None:
            return way
        open_ways = [
            way for way in self._bound if not isinstance(way.decision.plan.strategy, RoutedBySglang)
        ]
        # A config that is bound is another layer's; one that was made anew is not bound.
        if len(open_ways) != 1 or config.runner_backend is not None:
            raise ValueError(
                f"{self.name} is given logits by a TopK that was not bound to it; {len(open_ways)} "
                "that leave the routing to it were"
            )
        return open_ways[0]

    def _given(self, routed: Routed) -> _Way:
        """Of a TopK that has routed: a SGLang TopK without tokens, or one that is known to."""
        done = [
            way for way in self._bound if isinstance(way.decision.plan.strategy, RoutedBySglang)
        ]
        if self._alone is not None and self._routing is None:
            done.append(self._alone)
        width = routed.topk_ids.shape[1]
        fitting = [way for way in done if way.decision.plan.request.shape.top_k == width]
        if not fitting:
            raise ValueError(
                f"{self.name} is given ids and weights by a TopK that was to leave the routing to "
                f"{self._routing or [str(way) for way in self._bound]}"
            )
        return fitting[0]


def _request(layer: SeamLayerLike, config: ConfigLike, quant: Format) -> KernelRequest:
    try:
        placement = placement_of(layer)
    except UnsupportedRouting as refused:
        raise UnsupportedRouting(f"{layer.layer_name}: {refused}") from refused
    return KernelRequest(
        # A model whose TopK alone knows it, such as Llama 4, says it when it binds that.
        shape=RoutingShape(num_experts=layer.num_experts, top_k=config.top_k or 1),
        quant=quant,
        activation=activation_of(config),
        placement=placement,
        hidden_size=layer.hidden_size,
        intermediate_size=layer.intermediate_size_per_partition * placement.tp_size,
        num_fused_shared_experts=0,
        has_bias=layer.with_bias,
        device=layer.w13_weight.device,
        dtype=config.params_dtype or torch.get_default_dtype(),
    )
