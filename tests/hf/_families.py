"""The models that are compared: one tiny config per routing rule of every family.

Sizes are chosen so that routing matters and a forward pass takes milliseconds. `drops` are the
ingredients of the rule, each with the strategy that lacks it: the comparison has to notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, final

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe import (
    BiasedSigmoid,
    BiasRule,
    CheckpointLayout,
    DeepSeekV3,
    Default,
    GroupedSoftmax,
    Llama4,
    MiniMax2,
    Renormalize,
    RenormalizeNaive,
    Routed,
    RoutingShape,
    RoutingStrategy,
    ScaledSoftmax,
    SigmoidRenorm,
    SqrtSoftplus,
    TopKSigmoid,
)

Settings = Mapping[str, object]


@final
@attrs.frozen(kw_only=True)
class Drop:
    """A rule without one of its ingredients. `routing` None: the correction bias is zero."""

    what: str
    routing: RoutingStrategy | None = None


@final
@attrs.frozen(kw_only=True, eq=False)
class Case:
    """One tiny model.

    Attributes:
        name: of the test.
        folder, model_class: of transformers.
        model_type: of the text config.
        settings: over the config class's defaults.
        routing: what `strategy_for` has to give.
        drops: rules that lack an ingredient of it.
        layers: path of the decoder layers in the model.
        block, gate, shared: the MoE block in a layer, and in it the router and the shared
            expert.
        call: how the router is called: it takes the block's bias, or gives its logits second.
        pair: the block returns a pair.
        layout: how the model holds its experts in memory.
        saved_layout: how its checkpoint has them, where `save_pretrained` writes something
            else than what is published.
        hash_layers: MoE layers without a learned choice; they stay the model's.
    """

    name: str
    folder: str
    model_class: str
    model_type: str
    settings: Settings
    routing: RoutingStrategy
    drops: tuple[Drop, ...]
    layers: str = "model.layers"
    block: str = "mlp"
    gate: str = "gate"
    shared: str | None = None
    call: Literal["plain", "takes_bias", "logits_second"] = "plain"
    pair: bool = False
    layout: CheckpointLayout = CheckpointLayout.FUSED
    hash_layers: tuple[int, ...] = ()

    @override
    def __str__(self) -> str:
        return self.name


@final
@attrs.frozen(kw_only=True)
class SqrtSoftplusRaw(RoutingStrategy):
    """DeepSeek-V4's rule without the division: for the tests alone."""

    routed_scaling_factor: float

    @property
    @override
    def name(self) -> str:
        return "SqrtSoftplusRaw"

    @property
    @override
    def bias(self) -> BiasRule:
        return BiasRule.REQUIRED

    @override
    def select_experts(
        self,
        router_logits: Tensor,
        e_score_correction_bias: Tensor | None,
        *,
        shape: RoutingShape,
    ) -> Routed:
        assert e_score_correction_bias is not None
        scores = torch.nn.functional.softplus(router_logits.float()).sqrt()
        ids = (scores + e_score_correction_bias).topk(shape.top_k, dim=-1).indices
        return Routed(topk_ids=ids, topk_weights=scores.gather(1, ids) * self.routed_scaling_factor)


ZERO_BIAS = Drop(what="bias")
NAIVE, DEFAULT = RenormalizeNaive(), Default()
WITHOUT_NORM = Drop(what="renormalisation", routing=DEFAULT)
WITH_NORM = Drop(what="no-renormalisation", routing=NAIVE)


def v3(groups: int, kept: int, scale: float) -> DeepSeekV3:
    """Biased sigmoid, renormalised."""
    return DeepSeekV3(num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale)


def f10(groups: int, kept: int, scale: float) -> BiasedSigmoid:
    """Biased sigmoid, not renormalised."""
    return BiasedSigmoid(num_expert_group=groups, topk_group=kept, routed_scaling_factor=scale)


def f12(scale: float, *, norm: bool = False, score: Literal["max", "top2_sum"] = "max") -> (
    GroupedSoftmax
):
    """Softmax, the 2 best of 4 groups."""
    return GroupedSoftmax(
        num_expert_group=4,
        topk_group=2,
        group_score=score,
        norm_topk_prob=norm,
        routed_scaling_factor=scale,
    )


def f13(scale: float, *, norm: bool = True) -> GroupedSoftmax:
    """Softmax, the 2 best of 4 groups by the sum of their two best."""
    return f12(scale, norm=norm, score="top2_sum")


def f11(scale: float, *, norm: bool) -> ScaledSoftmax:
    """Softmax times a factor."""
    return ScaledSoftmax(norm_topk_prob=norm, routed_scaling_factor=scale)


def v3_drops(groups: int, kept: int, scale: float) -> tuple[Drop, ...]:
    """What `v3(groups, kept, scale)` consists of."""
    drops = [ZERO_BIAS, Drop(what="renormalisation", routing=f10(groups, kept, scale))]
    if scale != 1.0:
        drops.append(Drop(what="scale", routing=v3(groups, kept, 1.0)))
    if groups > 1:
        drops.append(Drop(what="groups", routing=v3(1, 1, scale)))
    return tuple(drops)


V = 64
"""Tokens of the tiny vocabularies; 0 pads, 1 begins."""

BASE: Settings = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.2,  # the default of 0.02 hides the experts behind the residual
}
EXPERTS: Settings = {"num_experts": 16, "num_experts_per_tok": 4}
LOCAL: Settings = {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 16}
ROUTED: Settings = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 0,
}
MLA: Settings = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 8,
}
NO_GROUPS: Settings = {"n_group": 1, "topk_group": 1}
GROUPS: Settings = {"n_group": 4, "topk_group": 2}
NORM: Settings = {"norm_topk_prob": True}
NO_NORM: Settings = {"norm_topk_prob": False}
SCALE: Settings = {"routed_scaling_factor": 2.5}
QWEN: Settings = {**EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 24}
LINEAR: Settings = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
QWEN_SHARED: Settings = {**QWEN, "shared_expert_intermediate_size": 24}


def _softmax_cases() -> list[Case]:
    mixtral = {**LOCAL, "num_local_experts": 8, "num_experts_per_tok": 2}
    olmoe = {**EXPERTS, "intermediate_size": 16}
    return [
        _case("mixtral", "Mixtral", mixtral, NAIVE, (WITHOUT_NORM,)),
        _case("olmoe", "Olmoe", {**olmoe, **NO_NORM}, DEFAULT, (WITH_NORM,)),
        _case("olmoe", "Olmoe", {**olmoe, **NORM}, NAIVE, (WITHOUT_NORM,), "norm"),
        _case(
            "gpt_oss",
            "GptOss",
            LOCAL,
            Renormalize(),
            (WITHOUT_NORM,),
            gate="router",
            pair=True,
            layout=CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED,
        ),
        _case(
            "llama4",
            "Llama4",
            {
                **LOCAL,
                "num_local_experts": 8,
                "num_experts_per_tok": 1,
                "intermediate_size_mlp": 24,
                "moe_layers": [0, 1],
            },
            Llama4(),
            (Drop(what="weight-on-input", routing=TopKSigmoid()),),
            model_type="llama4_text",
            block="feed_forward",
            gate="router",
            shared="shared_expert",
            call="logits_second",
            pair=True,
            layout=CheckpointLayout.FUSED_TRANSPOSED,
        ),
    ]


def _qwen_cases() -> list[Case]:
    shared = "shared_expert"
    qwen2 = {**QWEN_SHARED, "decoder_sparse_step": 1}
    nxt = {**QWEN_SHARED, **LINEAR}
    text = "qwen3_5_moe_text"
    without, added = (WITHOUT_NORM,), (WITH_NORM,)
    return [
        _case("qwen2_moe", "Qwen2Moe", {**qwen2, **NO_NORM}, DEFAULT, added, shared=shared),
        _case("qwen2_moe", "Qwen2Moe", {**qwen2, **NORM}, NAIVE, without, "norm", shared=shared),
        _case("qwen3_moe", "Qwen3Moe", {**QWEN, **NORM}, NAIVE, without),
        _case("qwen3_moe", "Qwen3Moe", {**QWEN, **NO_NORM}, DEFAULT, added, "no_norm"),
        _case("qwen3_next", "Qwen3Next", {**nxt, **NORM}, NAIVE, without, shared=shared),
        _case("qwen3_next", "Qwen3Next", {**nxt, **NO_NORM}, DEFAULT, added, "no_norm", shared=shared),
        _case("qwen3_5_moe", "Qwen3_5Moe", nxt, NAIVE, without, model_type=text, shared=shared),
    ]


def _cohere_cases() -> list[Case]:
    settings = {
        **EXPERTS,
        "intermediate_size": 16,
        "num_shared_experts": 1,
        "logit_scale": 1.0,
        "expert_selection_fn": "sigmoid",
    }
    softmax = {**settings, "expert_selection_fn": "softmax", "num_shared_experts": 2}
    total = {**settings, **NO_NORM, "shared_expert_combination_strategy": "sum"}
    no_norm = (Drop(what="renormalisation", routing=TopKSigmoid()),)
    norm = (Drop(what="no-renormalisation", routing=SigmoidRenorm()),)
    common = ("cohere2_moe", "Cohere2Moe")
    shared = "shared_experts"
    return [
        _case(*common, softmax, Renormalize(), (WITHOUT_NORM,), "softmax", shared=shared),
        _case(*common, {**settings, **NORM}, SigmoidRenorm(), no_norm, "sigmoid", shared=shared),
        _case(*common, total, TopKSigmoid(), norm, "sigmoid_no_norm", shared=shared),
    ]


def _deepseek_v2_cases() -> list[Case]:
    settings = {**ROUTED, **MLA, "topk_method": "greedy", "routed_scaling_factor": 1.0}
    limited = {**settings, **GROUPS, **SCALE, "topk_method": "group_limited_greedy"}
    common = ("deepseek_v2", "DeepseekV2")
    shared = "shared_experts"
    scaled = (
        Drop(what="scale", routing=DEFAULT),
        Drop(what="no-renormalisation", routing=f11(2.5, norm=True)),
    )
    grouped = (
        Drop(what="groups", routing=f11(2.5, norm=False)),
        Drop(what="scale", routing=f12(1.0)),
        Drop(what="groups-by-maximum", routing=f13(2.5, norm=False)),
        Drop(what="no-renormalisation", routing=f12(2.5, norm=True)),
    )
    return [
        _case(*common, settings, DEFAULT, (WITH_NORM,), shared=shared),
        _case(*common, {**settings, **SCALE}, f11(2.5, norm=False), scaled, "F11", shared=shared),
        _case(*common, limited, f12(2.5), grouped, "F12", shared=shared),
    ]


def _mistral_cases() -> list[Case]:
    settings = {**ROUTED, **MLA, **NO_GROUPS, **NORM, "routed_scaling_factor": 1.0}
    del settings["head_dim"]  # Mistral 4 computes its own
    grouped = {**settings, **GROUPS, **SCALE}
    f13_drops = (
        Drop(what="groups", routing=f11(2.5, norm=True)),
        Drop(what="scale", routing=f13(1.0)),
        Drop(what="groups-by-top2-sum", routing=f12(2.5, norm=True)),
        Drop(what="renormalisation", routing=f13(2.5, norm=False)),
    )
    f11_drops = (
        Drop(what="scale", routing=NAIVE),
        Drop(what="renormalisation", routing=f11(2.5, norm=False)),
    )
    unscaled = (Drop(what="scale", routing=DEFAULT),)
    both = {**settings, **SCALE, **NO_NORM}
    common, shared = ("mistral4", "Mistral4"), "shared_experts"
    large = ("mistral_large4", "MistralLarge4")
    dsa = {**settings, "index_topk": 8, "index_head_dim": 8, "index_n_heads": 2}
    large_grouped = {**dsa, **GROUPS, **SCALE}
    return [
        _case(*common, settings, NAIVE, (WITHOUT_NORM,), shared=shared),
        _case(*common, {**settings, **NO_NORM}, DEFAULT, (WITH_NORM,), "no_norm", shared=shared),
        _case(*common, {**settings, **SCALE}, f11(2.5, norm=True), f11_drops, "F11", shared=shared),
        _case(*common, both, f11(2.5, norm=False), unscaled, "F11_no_norm", shared=shared),
        _case(*common, grouped, f13(2.5), f13_drops, "F13", shared=shared),
        _wrapped(*large, dsa, NAIVE, (WITHOUT_NORM,)),
        _wrapped(*large, large_grouped, f13(2.5), f13_drops, "F13"),
    ]


def _deepseek_v3_cases() -> list[Case]:
    settings = {**ROUTED, **MLA, **GROUPS, **SCALE, **NORM}
    kimi = {**settings, **NO_GROUPS, "routed_scaling_factor": 2.827}
    plain = {**settings, **NO_GROUPS, "routed_scaling_factor": 1.0}
    not_normed = (
        ZERO_BIAS,
        Drop(what="no-renormalisation", routing=v3(4, 2, 2.5)),
        Drop(what="scale", routing=f10(4, 2, 1.0)),
        Drop(what="groups", routing=f10(1, 1, 2.5)),
    )
    common, shared = ("deepseek_v3", "DeepseekV3"), "shared_experts"
    no_norm = {**settings, **NO_NORM}
    return [
        _case(*common, settings, v3(4, 2, 2.5), v3_drops(4, 2, 2.5), "groups", shared=shared),
        _case(*common, plain, v3(1, 1, 1.0), v3_drops(1, 1, 1.0), shared=shared),
        _case(*common, kimi, v3(1, 1, 2.827), v3_drops(1, 1, 2.827), "kimi_k2", shared=shared),
        _case(*common, no_norm, f10(4, 2, 2.5), not_normed, "F10", shared=shared),
    ]


def _other_biased_cases() -> list[Case]:
    settings = {**ROUTED, **NO_GROUPS, **SCALE, **NORM}
    nemotron = {
        **settings,
        "hybrid_override_pattern": "*E*E",
        "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 24,
    }
    no_norm = {**nemotron, **GROUPS, **NO_NORM}
    latent = {**nemotron, "moe_latent_size": 24}
    minimax = (ZERO_BIAS, Drop(what="renormalisation", routing=BiasedSigmoid()))
    drops = v3_drops(1, 1, 2.5)
    f10_drops = (
        ZERO_BIAS,
        Drop(what="no-renormalisation", routing=v3(4, 2, 2.5)),
        Drop(what="groups", routing=f10(1, 1, 2.5)),
    )
    glm_no_norm = (ZERO_BIAS, Drop(what="no-renormalisation", routing=v3(1, 1, 2.5)))
    glm, shared = ("glm4_moe", "Glm4Moe"), "shared_experts"
    m2, moe = {**LOCAL}, CheckpointLayout.STACKED
    nemo = ("nemotron_h", "NemotronH")
    mixer = "mixer"
    return [
        _case(*glm, settings, v3(1, 1, 2.5), drops, shared=shared),
        _case(*glm, {**settings, **NO_NORM}, f10(1, 1, 2.5), glm_no_norm, "F10", shared=shared),
        _case("minimax_m2", "MiniMaxM2", m2, MiniMax2(), minimax, call="takes_bias"),
        _case(*nemo, nemotron, v3(1, 1, 2.5), drops, block=mixer, shared=shared, layout=moe),
        _case(*nemo, latent, v3(1, 1, 2.5), drops, "latent", block=mixer, shared=shared, layout=moe),
        _case(*nemo, no_norm, f10(4, 2, 2.5), f10_drops, "F10", block=mixer, shared=shared, layout=moe),
    ]


def _step_cases() -> list[Case]:
    settings = {
        **ROUTED,
        "share_expert_dim": 24,
        "mlp_layer_types": ["sparse", "sparse"],
        "swiglu_limits": [None, 0.5],
        "moe_router_scaling_factor": 3.0,
    }
    del settings["n_shared_experts"], settings["first_k_dense_replace"]
    drops = (
        ZERO_BIAS,
        Drop(what="renormalisation", routing=BiasedSigmoid(routed_scaling_factor=3.0)),
        Drop(what="scale", routing=MiniMax2()),
    )
    routing = MiniMax2(routed_scaling_factor=3.0)
    return [_wrapped("step3p7", "Step3p7", settings, routing, drops, model_type="step3p5")]


def _deepseek_v4_cases() -> list[Case]:
    settings = {
        "num_hidden_layers": 3,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 16,
        "num_key_value_heads": 1,
        "q_lora_rank": 8,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 2,
        "index_head_dim": 16,
        "index_topk": 4,
        "sliding_window": 16,
        "hc_mult": 2,
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "layer_types": [
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "swiglu_limit": 1.0,
        "routed_scaling_factor": 1.5,
    }
    drops = (
        ZERO_BIAS,
        Drop(what="renormalisation", routing=SqrtSoftplusRaw(routed_scaling_factor=1.5)),
        Drop(what="scale", routing=SqrtSoftplus()),
        Drop(what="sqrt-softplus", routing=v3(1, 1, 1.5)),
    )
    sigmoid = {**settings, "scoring_func": "sigmoid"}
    common, shared = ("deepseek_v4", "DeepseekV4"), "shared_experts"
    routing = SqrtSoftplus(routed_scaling_factor=1.5)
    v3_like = v3_drops(1, 1, 1.5)
    return [
        _case(*common, settings, routing, drops, shared=shared, hash_layers=(0,)),
        _case(
            *common, sigmoid, v3(1, 1, 1.5), v3_like, "sigmoid", shared=shared, hash_layers=(0,)
        ),
    ]
