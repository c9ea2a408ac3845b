"""Every family as a tiny transformers model: its config, and where its MoE parts are.

Sizes are such that routing matters (16 experts, 4 per token, where the family allows it) and a
forward pass takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import final

import attrs

from typed_moe import CheckpointLayout

Settings = Mapping[str, object]


class Call(Enum):
    """How a family's router is called, and what it gives."""

    PLAIN = "logits first"
    WITH_BIAS = "takes the block's correction bias; logits first"
    LOGITS_SECOND = "logits second"


@final
@attrs.frozen(kw_only=True, eq=False)
class Family:
    """One family.

    Attributes:
        folder: of transformers/models.
        model_class, config_class: of its modeling file; `config_class` None: the model takes
            the text config itself.
        model_type: of the text config.
        settings: over the text config's defaults.
        layers, block: path of the decoder layers in the model, and of the MoE block in one.
        gate, shared: the router and the shared expert in the block.
        call: how the router is called.
        pair: the block returns a pair.
        layout: how the model holds its experts in memory. `STACKED` stands for nemotron_h's
            `up_proj` and `down_proj`, which it has without the ending `.weight`.
        hash_layers: MoE layers that take their experts from a table; they stay the model's.
        saved_layout: how transformers saves the experts, where not as they were published.
        saved_root: what transformers writes before the published tensor names.
    """

    folder: str
    model_class: str
    model_type: str
    settings: Settings
    config_class: str | None = None
    layers: str = "model.layers"
    block: str = "mlp"
    gate: str = "gate"
    shared: str | None = None
    call: Call = Call.PLAIN
    pair: bool = False
    layout: CheckpointLayout = CheckpointLayout.FUSED
    hash_layers: tuple[int, ...] = ()
    saved_layout: CheckpointLayout | None = None
    saved_root: str = ""


VOCABULARY = 64
"""Tokens of the tiny models: 0 pads, 1 begins."""

BASE: Settings = {
    "vocab_size": VOCABULARY,
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
VISION: Settings = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "head_dim": 8,
    "image_size": 28,
    "patch_size": 14,
}
"""The vision part that two models cannot do without; no test shows it an image."""

_EXPERTS: Settings = {"num_experts": 16, "num_experts_per_tok": 4}
_LOCAL: Settings = {"num_local_experts": 16, "num_experts_per_tok": 4, "intermediate_size": 16}
_ROUTED: Settings = {
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 16,
    "intermediate_size": 24,
}
_DEEPSEEK: Settings = {**_ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 0}
_LATENT_ATTENTION: Settings = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
_INDEXER: Settings = {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}
_QWEN: Settings = {**_EXPERTS, "moe_intermediate_size": 16, "intermediate_size": 24}
_QWEN_SHARED: Settings = {**_QWEN, "shared_expert_intermediate_size": 24}
_LINEAR_ATTENTION: Settings = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}

MIXTRAL = Family(
    folder="mixtral",
    model_class="MixtralForCausalLM",
    model_type="mixtral",
    settings={**_LOCAL, "num_local_experts": 8, "num_experts_per_tok": 2},
)
OLMOE = Family(
    folder="olmoe",
    model_class="OlmoeForCausalLM",
    model_type="olmoe",
    settings={**_EXPERTS, "intermediate_size": 16},
)
QWEN2_MOE = Family(
    folder="qwen2_moe",
    model_class="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    settings={**_QWEN_SHARED, "decoder_sparse_step": 1},
    shared="shared_expert",
)
QWEN3_MOE = Family(
    folder="qwen3_moe",
    model_class="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    settings=_QWEN,
)
QWEN3_NEXT = Family(
    folder="qwen3_next",
    model_class="Qwen3NextForCausalLM",
    model_type="qwen3_next",
    settings={**_QWEN_SHARED, **_LINEAR_ATTENTION},
    shared="shared_expert",
)
QWEN3_5_MOE = Family(
    folder="qwen3_5_moe",
    model_class="Qwen3_5MoeForCausalLM",
    model_type="qwen3_5_moe_text",
    settings={**_QWEN_SHARED, **_LINEAR_ATTENTION},
    shared="shared_expert",
    saved_layout=CheckpointLayout.SEPARATE,
)
DEEPSEEK_V2 = Family(
    folder="deepseek_v2",
    model_class="DeepseekV2ForCausalLM",
    model_type="deepseek_v2",
    settings={**_DEEPSEEK, **_LATENT_ATTENTION, "head_dim": 8},
    shared="shared_experts",
)
DEEPSEEK_V3 = Family(
    folder="deepseek_v3",
    model_class="DeepseekV3ForCausalLM",
    model_type="deepseek_v3",
    settings={**_DEEPSEEK, **_LATENT_ATTENTION, "head_dim": 8},
    shared="shared_experts",
)
DEEPSEEK_V32 = Family(
    folder="deepseek_v32",
    model_class="DeepseekV32ForCausalLM",
    model_type="deepseek_v32",
    settings={**_DEEPSEEK, **_LATENT_ATTENTION, **_INDEXER},
    shared="shared_experts",
)
DEEPSEEK_V4 = Family(
    folder="deepseek_v4",
    model_class="DeepseekV4ForCausalLM",
    model_type="deepseek_v4",
    settings={
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
        "swiglu_limit": 1.0,  # of 10 in the released model, which nothing here would reach
    },
    shared="shared_experts",
    hash_layers=(0,),
    saved_root="model.",
)
GLM4_MOE = Family(
    folder="glm4_moe",
    model_class="Glm4MoeForCausalLM",
    model_type="glm4_moe",
    settings=_DEEPSEEK,
    shared="shared_experts",
)
GLM4_MOE_LITE = Family(
    folder="glm4_moe_lite",
    model_class="Glm4MoeLiteForCausalLM",
    model_type="glm4_moe_lite",
    settings={
        **_ROUTED,
        **_LATENT_ATTENTION,
        "n_shared_experts": 1,
        "mlp_layer_types": ["sparse", "sparse"],
    },
    shared="shared_experts",
)
GLM_MOE_DSA = Family(
    folder="glm_moe_dsa",
    model_class="GlmMoeDsaForCausalLM",
    model_type="glm_moe_dsa",
    settings={**_DEEPSEEK, **_LATENT_ATTENTION, **_INDEXER},
    shared="shared_experts",
)
MINIMAX_M2 = Family(
    folder="minimax_m2",
    model_class="MiniMaxM2ForCausalLM",
    model_type="minimax_m2",
    settings=_LOCAL,
    call=Call.WITH_BIAS,
)
LLAMA4 = Family(
    folder="llama4",
    model_class="Llama4ForCausalLM",
    model_type="llama4_text",
    settings={
        "num_local_experts": 8,
        "num_experts_per_tok": 1,
        "intermediate_size": 16,
        "intermediate_size_mlp": 24,
        "moe_layers": [0, 1],
    },
    block="feed_forward",
    gate="router",
    shared="shared_expert",
    call=Call.LOGITS_SECOND,
    pair=True,
    layout=CheckpointLayout.FUSED_TRANSPOSED,
)
GPT_OSS = Family(
    folder="gpt_oss",
    model_class="GptOssForCausalLM",
    model_type="gpt_oss",
    settings={**_LOCAL, "swiglu_limit": 1.0},  # of 7, which nothing here would reach
    gate="router",
    pair=True,
    layout=CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED,
)
NEMOTRON_H = Family(
    folder="nemotron_h",
    model_class="NemotronHForCausalLM",
    model_type="nemotron_h",
    settings={
        **_ROUTED,
        "n_shared_experts": 1,
        "hybrid_override_pattern": "*E*E",
        "num_hidden_layers": 4,
        "moe_shared_expert_intermediate_size": 24,
    },
    block="mixer",
    shared="shared_experts",
    layout=CheckpointLayout.STACKED,
)
COHERE2_MOE = Family(
    folder="cohere2_moe",
    model_class="Cohere2MoeForCausalLM",
    model_type="cohere2_moe",
    settings={
        **_EXPERTS,
        "intermediate_size": 16,
        "num_shared_experts": 1,
        "logit_scale": 1.0,  # of 1/16, for logits of order 1
    },
    shared="shared_experts",
)
STEP3P7 = Family(
    folder="step3p7",
    model_class="Step3p7ForConditionalGeneration",
    config_class="Step3p7Config",
    model_type="step3p5",
    settings={
        **_ROUTED,
        "share_expert_dim": 24,
        "mlp_layer_types": ["sparse", "sparse"],
        "layer_types": ["full_attention", "sliding_attention"],
        "sliding_window": 8,
        "swiglu_limits": [None, 0.5],
    },
    layers="model.language_model.layers",
    shared="shared_experts",
)
MISTRAL4 = Family(
    folder="mistral4",
    model_class="Mistral4ForCausalLM",
    model_type="mistral4",
    settings={**_DEEPSEEK, **_LATENT_ATTENTION},
    shared="shared_experts",
)
MISTRAL_LARGE4 = Family(
    folder="mistral_large4",
    model_class="MistralLarge4ForConditionalGeneration",
    config_class="MistralLarge4Config",
    model_type="mistral_large4_text",
    settings={**_DEEPSEEK, **_LATENT_ATTENTION, **_INDEXER},
    layers="model.language_model.layers",
    shared="shared_experts",
)
