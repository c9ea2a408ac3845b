"""Families of the DeepSeek-V3 router: sigmoid, correction bias, groups, renormalise, scale."""

from __future__ import annotations

from typed_moe.config import Activation, Gelu, Relu2, Silu
from typed_moe.models._deepseek import deepseek_experts, groups, v2_layers
from typed_moe.models._family import (
    Experts,
    Family,
    Layers,
    Names,
    Shared,
    from_first_k_dense,
    from_layer_types,
)
from typed_moe.models._fields import Fields
from typed_moe.models._spec import CheckpointLayout, SharedCombination
from typed_moe.routing import BiasedSigmoid, DeepSeekV3, RoutingStrategy

_NAMES = Names(layout=CheckpointLayout.SEPARATE, correction_bias="gate.e_score_correction_bias")


def biased_sigmoid(fields: Fields) -> RoutingStrategy:
    """DeepSeekV3, or BiasedSigmoid where norm_topk_prob is false. No field has a default.

    The class defaults differ from released values (Kimi-K2 has one group, DeepseekV3Config
    eight), so a field that is missing would be a silent error.
    """
    why = "the router takes a biased sigmoid"
    fields.expect("scoring_func", "sigmoid", why=why)
    fields.expect("topk_method", "noaux_tc", why=why)
    n_group, topk_group = groups(fields)
    scale = fields.number("routing.routed_scaling_factor", "routed_scaling_factor")
    if fields.flag("routing.norm_topk_prob", "norm_topk_prob"):
        fields.note("routing", "DeepSeekV3: sigmoid plus bias selects, renormalised")
        return DeepSeekV3(
            num_expert_group=n_group, topk_group=topk_group, routed_scaling_factor=scale
        )
    fields.note("routing", "BiasedSigmoid: sigmoid plus bias selects, not renormalised")
    return BiasedSigmoid(
        num_expert_group=n_group, topk_group=topk_group, routed_scaling_factor=scale
    )


def _v3_routing(fields: Fields, _: int) -> RoutingStrategy:
    return biased_sigmoid(fields)


def _v3_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="DeepseekV3Config", router_weight_fp32=True)


DEEPSEEK_V3 = Family(layers=v2_layers, routing=_v3_routing, experts=_v3_experts, names=_NAMES)
"""deepseek_v3 and kimi_k2, which has the same config fields and the same code."""


def _listed_or_first_k(fields: Fields) -> Layers:
    """mlp_layer_types, which transformers reads; first_k_dense_replace where there is none."""
    fields.must_be("moe_layer_freq", 1, why="transformers ignores it")
    listed = from_layer_types(fields, "mlp_layer_types", moe="sparse", others=("dense",))
    return listed or from_first_k_dense(fields)


def _v32_routing(fields: Fields, _: int) -> RoutingStrategy:
    return biased_sigmoid(fields)


def _v32_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="DeepseekV32Config", router_weight_fp32=True)


DEEPSEEK_V32 = Family(
    layers=_listed_or_first_k, routing=_v32_routing, experts=_v32_experts, names=_NAMES
)


def _glm4_moe_routing(fields: Fields, _: int) -> RoutingStrategy:
    return biased_sigmoid(fields)


def _glm4_moe_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="Glm4MoeConfig", router_weight_fp32=True)


GLM4_MOE = Family(
    layers=v2_layers, routing=_glm4_moe_routing, experts=_glm4_moe_experts, names=_NAMES
)


def _glm4_moe_lite_layers(fields: Fields) -> Layers:
    listed = from_layer_types(fields, "mlp_layer_types", moe="sparse", others=("dense",))
    if listed is not None:
        return listed
    fields.must_be(
        "first_k_dense_replace", 1, why="Glm4MoeLiteConfig ignores it and makes one layer dense"
    )
    return from_first_k_dense(fields, default=1, owner="Glm4MoeLiteConfig")


def _glm4_moe_lite_routing(fields: Fields, _: int) -> RoutingStrategy:
    return biased_sigmoid(fields)


def _glm4_moe_lite_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="Glm4MoeLiteConfig", router_weight_fp32=True)


GLM4_MOE_LITE = Family(
    layers=_glm4_moe_lite_layers,
    routing=_glm4_moe_lite_routing,
    experts=_glm4_moe_lite_experts,
    names=_NAMES,
)


def _glm_moe_dsa_routing(fields: Fields, _: int) -> RoutingStrategy:
    return biased_sigmoid(fields)


def _glm_moe_dsa_experts(fields: Fields, _: int) -> Experts:
    return deepseek_experts(fields, owner="GlmMoeDsaConfig", router_weight_fp32=True)


GLM_MOE_DSA = Family(
    layers=_listed_or_first_k,
    routing=_glm_moe_dsa_routing,
    experts=_glm_moe_dsa_experts,
    names=_NAMES,
)


def _nemotron_layers(fields: Fields) -> Layers:
    """layers_block_type, or its older form hybrid_override_pattern, one letter per layer."""
    listed = fields.optional_list("layers_block_type")
    pattern = fields.optional_text("hybrid_override_pattern")
    from_list = None if listed is None else [one == "moe" for one in listed]
    from_letters = None if pattern is None else [one == "E" for one in pattern]
    if from_list is not None and from_letters is not None and from_list != from_letters:
        raise ValueError(
            "layers_block_type and hybrid_override_pattern name different MoE layers in a "
            "nemotron_h config; they are two forms of one field and must agree: keep one"
        )
    is_moe = from_letters if from_list is None else from_list
    if is_moe is None:
        raise ValueError(
            "hybrid_override_pattern (also read as layers_block_type) is missing in a nemotron_h "
            "config, and the layers have no safe default: add the field, as the released "
            "config.json has it"
        )
    stated = fields.optional_integer("num_hidden_layers")
    if stated not in (None, len(is_moe)):
        raise ValueError(
            f"num_hidden_layers is {stated} in a nemotron_h config whose layer pattern has "
            f"{len(is_moe)} layers; they must agree"
        )
    source = f"hybrid_override_pattern = {pattern}" if listed is None else "layers_block_type"
    fields.note("layers", f"{source}: MoE where it says {'E' if listed is None else 'moe'}")
    moe = tuple(i for i, one in enumerate(is_moe) if one)
    return Layers(num_hidden_layers=len(is_moe), moe=moe, dense=source)


def _nemotron_routing(fields: Fields, _: int) -> RoutingStrategy:
    return biased_sigmoid(fields)


def _ungated(fields: Fields) -> Activation:
    name = fields.text("activation", "mlp_hidden_act")
    match name:
        case "relu2":
            return Relu2()
        case "silu":
            return Silu()
        case "gelu":
            return Gelu()
        case _:
            raise ValueError(
                f"mlp_hidden_act is {name!r} in a nemotron_h config; allowed: 'relu2', 'silu' or "
                "'gelu'"
            )


def _nemotron_experts(fields: Fields, _: int) -> Experts:
    shared = fields.integer("num_shared_experts", "n_shared_experts", least=0)
    width = fields.integer(
        "shared_expert_intermediate_size", "moe_shared_expert_intermediate_size", least=0
    )
    latent = fields.optional_integer("moe_latent_size")
    if latent is not None:
        fields.note("hidden_size", f"moe_latent_size = {latent}")
    return Experts(
        num_experts=fields.integer("num_experts", "n_routed_experts", "num_local_experts"),
        top_k=fields.integer("top_k", "num_experts_per_tok"),
        hidden_size=latent,
        intermediate_size=fields.integer("intermediate_size", "moe_intermediate_size"),
        activation=_ungated(fields),
        shared=Shared(
            num_experts=shared, intermediate_size=width, combination=SharedCombination.SUM
        )
        if shared
        else Shared(),
        router_weight_fp32=True,
    )


NEMOTRON_H = Family(
    layers=_nemotron_layers,
    routing=_nemotron_routing,
    experts=_nemotron_experts,
    names=Names(
        layout=CheckpointLayout.SEPARATE_UNGATED,
        root="backbone.layers",
        block="mixer.",
        correction_bias="gate.e_score_correction_bias",
    ),
)
