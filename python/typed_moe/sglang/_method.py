"""Our runners as a quantisation method of SGLang's: what its layer, its loader and its TopK see."""

from __future__ import annotations

import importlib
import logging
import os
from typing import cast
from weakref import ref

from torch import Tensor

from typed_moe.errors import UnsupportedRouting
from typed_moe.routing import RoutingForm, RoutingStrategy
from typed_moe.sglang._activation import is_interleaved
from typed_moe.sglang._experts import LayerExperts
from typed_moe.sglang._protocols import DispatchLike, TopKLike
from typed_moe.sglang._scale import Block, ScaleAtSeam
from typed_moe.sglang._seam import (
    BackendLike,
    ConfigLike,
    QuantConfigLike,
    QuantMethodLike,
    SeamLayerLike,
)
from typed_moe.sglang._serves import refuse_server
from typed_moe.sglang._stored import (
    checkpoint_method,
    release_unused,
    stored_format,
    stored_weights,
)
from typed_moe.sglang._updates import guarded, reads_the_parameters, refuse_updates

logger = logging.getLogger("typed_moe.sglang")

_MOE = "sglang.srt.layers.moe"
# An attribute of the name's object.
_LINK = "_typed_moe_method"
_GLOBAL_IDS = "skip_local_expert_mapping"
_said: set[str] = set()
"""The kinds of layers that have run in this process: one line for the first of each."""


class TypedMoeMethod:
    """One layer's method.

    SGLang's own method of the checkpoint's format makes the parameters, with the names and loaders
    that SGLang's models load into (`layer.weight_load_method`); what runs is ours.

    Args:
        quant_config: the model's; None: unquantised.
        quant_method: SGLang's method where the model gives one.
        prefix: the layer's name in the model.
        routing: the strategy that the model injects; None: what its TopK computes.
        e_score_correction_bias: (E,), for `routing` with router logits.
        block: the model's block around the layer.
    """

    runner: None = None
    load_up_proj_weight_first = False
    quant_config: QuantConfigLike | None

    def __init__(
        self,
        *,
        quant_config: QuantConfigLike | None,
        quant_method: QuantMethodLike | None,
        prefix: str,
        routing: RoutingStrategy | None,
        e_score_correction_bias: Tensor | None,
        block: Block,
    ) -> None:
        self.quant_config = quant_config
        self._given, self._prefix = quant_method, prefix
        self._routing, self._bias, self._block = routing, e_score_correction_bias, block
        self._stored: QuantMethodLike | None = None
        self._experts: LayerExperts | None = None
        self._backend: BackendLike | None = None
        # Why nothing may be written over; None: nothing is loaded yet, or it may.
        self._fixed: str | None = None
        self.fuse_routed_scaling_factor_in_topk = False

    # --- SGLang's FusedMoE.__init__ asks these, in this order ---

    def create_weights(self, layer: SeamLayerLike, **asked: object) -> None:
        """The parameters, by SGLang's own method of the format."""
        if "weight_loader" in asked:
            asked["weight_loader"] = guarded(asked["weight_loader"], self._refuse_if_fixed)
        stored = checkpoint_method(self._given, self.quant_config, layer, self._prefix)
        stored.create_weights(layer=layer, **asked)
        release_unused(layer)
        layer.weight_load_method = stored
        self._stored = stored

    def create_moe_runner(self, layer: SeamLayerLike, config: ConfigLike) -> None:
        """Decide what can be decided without a TopK.

        Raises:
            UnsupportedRouting: no kernel of ours serves the layer, or SGLang is set up in a way
                that is not.
        """
        refuse_server(self._prefix, layer, config)
        assert self._stored is not None, "create_weights comes first"
        # Some of SGLang's methods answer their loaders by it.
        self._stored.moe_runner_config = config
        scale = ScaleAtSeam(
            factor=1.0 if config.routed_scaling_factor is None else config.routed_scaling_factor,
            block=self._block,
        )
        self._experts = LayerExperts(
            name=self._prefix or f"layer {layer.layer_id}",
            layer=layer,
            config=config,
            quant=stored_format(self._stored, layer, config),
            scale=scale,
            routing=self._routing,
            e_score_correction_bias=self._bias,
        )
        own = self._routing
        owns = own is None or own.scale(RoutingForm.PRECOMPUTED).factor != 1.0
        self.fuse_routed_scaling_factor_in_topk = owns and not self._block.multiplies
        utils = importlib.import_module(f"{_MOE}.utils")
        backend = cast("BackendLike", utils.RegisteredMoeRunnerBackend("typed_moe"))
        # A model hands it to the TopK that goes with the layer: so the two find each other.
        object.__setattr__(backend, _LINK, ref(self))
        self._backend = backend

    def get_moe_runner_backend(self, layer: SeamLayerLike) -> BackendLike | None:
        """The name, in an object of this layer's own."""
        del layer
        return self._backend

    def get_moe_routing_method_type(self, layer: SeamLayerLike, requested: object) -> object:
        """As the model says; it is compared, not believed."""
        del layer
        return requested

    def finish(self, layer: SeamLayerLike) -> None:
        """After SGLang's constructor: ids stay global, as for the kernels that take them so.

        Raises:
            UnsupportedRouting: the dispatcher has no such switch.
        """
        dispatcher = layer.dispatcher
        if not hasattr(dispatcher, _GLOBAL_IDS):
            raise UnsupportedRouting(
                f"{self._prefix}: {type(dispatcher).__name__} gives ids in a way that is not known "
                "here; allowed: SGLang's StandardDispatcher (--moe-a2a-backend none)"
            )
        setattr(dispatcher, _GLOBAL_IDS, True)

    # --- the TopK of the layer ---

    def bind(self, topk: TopKLike, method: str | None) -> bool:
        """A TopK of the layer, and the name of the model's routing method.

        Returns:
            Whether the TopK should leave the routing to us.

        Raises:
            ValueError: the TopK computes another rule than `routing`.
            UnsupportedRouting: no kernel of ours serves what it computes.
        """
        return self.experts.bind(topk, method)

    @property
    def experts(self) -> LayerExperts:
        """What runs."""
        assert self._experts is not None, "create_moe_runner comes first"
        return self._experts

    # --- loading ---

    def process_weights_after_loading(self, layer: SeamLayerLike) -> None:
        """The runner, for the weights that SGLang has loaded; again after it has loaded others.

        Raises:
            CheckpointError: a scale is missing or no scale.
            UnsupportedRouting: it is not known who multiplies by the layer's factor; or the kernel's
                weights are made of the loaded ones, and that once.
        """
        self._refuse_if_fixed()
        assert self._stored is not None, "create_weights comes first"
        experts = self.experts
        weights = stored_weights(self._stored, layer, experts.config)
        prepared = experts.prepare(weights)
        # One copy: the kernel's.
        layer.w13_weight.data = prepared.w13_weight.data
        layer.w2_weight.data = prepared.w2_weight.data
        as_loaded = reads_the_parameters(layer, experts.quant, weights, prepared)
        if is_interleaved(experts.config) or not as_loaded:
            self._fixed = (
                f"{layer.layer_name}: typed-moe's {experts.kernel} kernel reads {experts.quant!r} "
                "weights in a form that was made of the loaded ones, so that they are not written "
                "over in place while serving; load the model anew, or choose another "
                "--moe-runner-backend"
            )
            refuse_updates(layer, self._fixed)

    def restore_weights_before_loading(self, layer: SeamLayerLike) -> None:
        """Asked before new weights are written.

        Raises:
            UnsupportedRouting: what was loaded is not what the kernel reads.
        """
        del layer
        self._refuse_if_fixed()

    def _refuse_if_fixed(self) -> None:
        if self._fixed is not None:
            raise UnsupportedRouting(self._fixed)

    # --- the call ---

    def apply(self, layer: SeamLayerLike, dispatch_output: DispatchLike) -> object:
        """This rank's experts on what the dispatcher gives."""
        output, way = self.experts(dispatch_output)
        if way is not None and not way.told:
            way.told = True
            _tell(layer.layer_name, str(way))
        standard = importlib.import_module(f"{_MOE}.token_dispatcher.standard")
        combine: object = standard.StandardCombineInput(hidden_states=output)
        return combine


def _tell(layer: str, kind: str) -> None:
    if kind not in _said:
        _said.add(kind)
        logger.info("typed-moe: %s runs %s; process %s", layer, kind, os.getpid())


def method_of(runner_backend: object) -> TypedMoeMethod | None:
    """The layer's method behind what a model binds to its TopK; None: it is SGLang's own."""
    link = getattr(runner_backend, _LINK, None)
    if not isinstance(link, ref):
        return None
    method = link()
    return method if isinstance(method, TypedMoeMethod) else None
