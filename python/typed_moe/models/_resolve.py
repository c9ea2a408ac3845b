"""From a config to its family, and from there to one layer."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import final

import attrs

from typed_moe.errors import UnsupportedRouting
from typed_moe.models._family import Experts, Family, Layers
from typed_moe.models._fields import OWN_STRATEGY, ConfigLike, Fields, plain
from typed_moe.models._registry import FAMILIES, MOE_FIELDS, WRAPPERS
from typed_moe.models._spec import MoeSpec
from typed_moe.routing import RoutingShape, RoutingStrategy


@final
@attrs.frozen(kw_only=True)
class _Model:
    """A config whose family is known. `root` None: the wrapper's tensor names are not known."""

    family: Family
    values: Mapping[str, object]
    model_type: str
    root: str | None
    wrapper: str

    def fields(self) -> Fields:
        fields = Fields(values=self.values, model_type=self.model_type)
        fields.note("model_type", f"model_type = {self.model_type}")
        return fields


def strategy_for(config: ConfigLike, layer_id: int = 0) -> RoutingStrategy:
    """The routing rule of a model's MoE layers, with every setting.

    `layer_id` matters only where a model's MoE layers differ (DeepSeek-V4's first layers route
    by token id); a dense layer gets the rule of the MoE layers.

    Args:
        config: a parsed config.json, or a config object with `to_dict()`.
        layer_id: decoder layer, counted from 0.

    Returns:
        The strategy, equal to what the model's own code computes.

    Raises:
        UnsupportedRouting: a routing field that no strategy honours, or an unknown model_type
            with experts.
        ValueError: not an MoE config, a missing or malformed field, or `layer_id` outside the
            model.
        TypeError: `config` is neither a mapping nor an object with `to_dict()`.
    """
    model = _model(config)
    fields = model.fields()
    _check_layer(_moe_layers(model, fields), layer_id)
    return _routing(model, fields, layer_id)


def moe_layer_ids(config: ConfigLike) -> tuple[int, ...]:
    """The decoder layers that are MoE layers, in order.

    Args:
        config: as for `strategy_for`.

    Returns:
        Layer numbers, counted from 0; multi-token-prediction layers are not counted.

    Raises:
        UnsupportedRouting: an unknown model_type with experts.
        ValueError: not an MoE config, or a missing or malformed field.
        TypeError: as for `strategy_for`.
    """
    model = _model(config)
    return _moe_layers(model, model.fields()).moe


def num_hidden_layers(config: ConfigLike) -> int:
    """How many decoder layers the model has, from its own field or its layer pattern.

    Args:
        config: as for `strategy_for`.

    Raises:
        UnsupportedRouting, ValueError, TypeError: as for `moe_layer_ids`.
    """
    model = _model(config)
    return _moe_layers(model, model.fields()).num_hidden_layers


def moe_spec(config: ConfigLike, layer_id: int | None = None) -> MoeSpec:
    """What one MoE layer of a model is: routing, sizes, activation, tensor names, sources.

    Args:
        config: as for `strategy_for`.
        layer_id: decoder layer, counted from 0; None: the first MoE layer whose routing rule
            a strategy honours.

    Returns:
        The layer, with the field that each thing came from.

    Raises:
        UnsupportedRouting: as for `strategy_for`.
        ValueError: as for `strategy_for`; or the layer is dense; or sizes that do not fit
            (top_k above num_experts, groups that do not divide the experts).
        TypeError: as for `strategy_for`.
    """
    model = _model(config)
    layers = _moe_layers(model, model.fields())
    if layer_id is None:
        return _first_spec(model, layers)
    _check_layer(layers, layer_id)
    if layer_id not in layers.moe:
        raise ValueError(
            f"layer {layer_id} of this {model.model_type} config is dense ({layers.dense}); "
            f"allowed: an MoE layer, the first of which is {layers.moe[0]}"
        )
    return _spec(model, layer_id)


def _first_spec(model: _Model, layers: Layers) -> MoeSpec:
    for layer_id in layers.moe:
        try:
            _routing(model, model.fields(), layer_id)
        except UnsupportedRouting:
            continue
        return _spec(model, layer_id)
    return _spec(model, layers.moe[0])  # none: raise what the first one says


def _spec(model: _Model, layer_id: int) -> MoeSpec:
    fields = model.fields()
    _moe_layers(model, fields)
    routing = _routing(model, fields, layer_id)
    experts = model.family.experts(fields, layer_id)
    routing.check(RoutingShape(num_experts=experts.num_experts, top_k=experts.top_k))
    return _assemble(model, fields, layer_id, routing, experts)


def _assemble(
    model: _Model, fields: Fields, layer_id: int, routing: RoutingStrategy, experts: Experts
) -> MoeSpec:
    names = model.family.names
    at = f"{_root(model)}.{layer_id}.{names.block}"
    bias, gate_bias = names.correction_bias, names.gate_bias
    hidden = fields.integer("router_hidden_size", "hidden_size")
    fields.sources.setdefault("hidden_size", f"hidden_size = {hidden}")
    fields.sources.setdefault("router_weight_fp32", f"{model.model_type}'s own code")
    fields.sources.setdefault("names", f"the published checkpoints of {model.wrapper}")
    return MoeSpec(
        model_type=model.model_type,
        layer_id=layer_id,
        routing=routing,
        num_experts=experts.num_experts,
        top_k=experts.top_k,
        hidden_size=experts.hidden_size or hidden,
        router_hidden_size=hidden,
        intermediate_size=experts.intermediate_size,
        num_shared_experts=experts.shared.num_experts,
        shared_expert_intermediate_size=experts.shared.intermediate_size,
        shared_expert_combination=experts.shared.combination,
        activation=experts.activation,
        has_bias=experts.has_bias,
        has_correction_bias=bias is not None,
        router_weight_fp32=experts.router_weight_fp32,
        layout=names.layout,
        experts_prefix=(at + names.experts).removesuffix("."),
        gate_name=at + names.gate,
        gate_bias_name=None if gate_bias is None else at + gate_bias,
        correction_bias_name=None if bias is None else at + bias,
        sources=MappingProxyType(dict(fields.sources)),
    )


def _root(model: _Model) -> str:
    if model.root is None:
        raise ValueError(
            f"model_type {model.wrapper!r} wraps a {model.model_type} text model, and where its "
            "checkpoint keeps the text layers is not known; allowed wrappers: "
            f"{', '.join(WRAPPERS)}. Pass the config's text_config itself, and read the tensor "
            "names as those of a checkpoint of the text model alone"
        )
    return model.root


def _routing(model: _Model, fields: Fields, layer_id: int) -> RoutingStrategy:
    routing = model.family.routing(fields, layer_id)
    fields.refuse_unread()
    return routing


def _moe_layers(model: _Model, fields: Fields) -> Layers:
    layers = model.family.layers(fields)
    for name in MOE_FIELDS:
        if model.values.get(name) == 0:
            raise ValueError(
                f"{name} is 0, so this {model.model_type} config is not a mixture-of-experts config"
            )
    if not layers.moe:
        raise ValueError(
            f"no layer of this {model.model_type} config is an MoE layer ({layers.dense}), so it "
            "is not a mixture-of-experts config"
        )
    return layers


def _check_layer(layers: Layers, layer_id: int) -> None:
    if not 0 <= layer_id < layers.num_hidden_layers:
        raise ValueError(
            f"layer_id is {layer_id}; allowed: 0 to num_hidden_layers - 1 = "
            f"{layers.num_hidden_layers - 1}"
        )


def _model(config: ConfigLike) -> _Model:
    values = plain(config)
    outer = _model_type(values, None)
    nested = values.get("text_config")
    if nested is None:
        family = _family(outer, values)
        return _Model(
            family=family,
            values=values,
            model_type=outer,
            root=family.names.root,
            wrapper=outer,
        )
    inner = _nested_values(nested)
    wrapper = WRAPPERS.get(outer)
    inner_type = _model_type(inner, None if wrapper is None else wrapper.text_type)
    return _Model(
        family=_family(inner_type, inner),
        values=inner,
        model_type=inner_type,
        root=None if wrapper is None else wrapper.root,
        wrapper=outer,
    )


def _nested_values(nested: object) -> Mapping[str, object]:
    if isinstance(nested, Mapping):
        return {str(name): value for name, value in nested.items()}
    raise ValueError(
        f"text_config is a {type(nested).__name__}; allowed: a mapping with the text model's fields"
    )


def _model_type(values: Mapping[str, object], default: str | None) -> str:
    value = values.get("model_type", default)
    if isinstance(value, str) and value:
        return value
    raise ValueError(
        f"model_type is {value!r}; allowed: the model_type string of a config.json, without which "
        "the routing rule cannot be known"
    )


def _family(model_type: str, values: Mapping[str, object]) -> Family:
    family = FAMILIES.get(model_type)
    if family is not None:
        return family
    if model_type in WRAPPERS:
        raise ValueError(
            f"text_config is missing in a {model_type} config; add it, as the released "
            "config.json has it"
        )
    found = [f"{name} = {values[name]}" for name in MOE_FIELDS if values.get(name)]
    if found:
        raise UnsupportedRouting(
            f"model_type is {model_type!r}, a mixture-of-experts model ({', '.join(found)}) whose "
            f"routing rule is not known; allowed: {', '.join(FAMILIES)}. For another, {OWN_STRATEGY}"
        )
    raise ValueError(
        f"a {model_type} config is not a mixture-of-experts config: it has none of the fields "
        + ", ".join(MOE_FIELDS)
    )
