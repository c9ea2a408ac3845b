"""model_type -> what the package knows about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import final

import attrs

from typed_moe.models import (
    _biased,
    _deepseek,
    _deepseek_v4,
    _llama4,
    _minimax,
    _mistral,
    _qwen,
    _softmax,
)
from typed_moe.models._family import Family

FAMILIES: Mapping[str, Family] = {
    "cohere2_moe": _softmax.COHERE2_MOE,
    "deepseek": _deepseek.DEEPSEEK,
    "deepseek_v2": _deepseek.DEEPSEEK_V2,
    "deepseek_v3": _biased.DEEPSEEK_V3,
    "deepseek_v32": _biased.DEEPSEEK_V32,
    "deepseek_v4": _deepseek_v4.DEEPSEEK_V4,
    "glm4_moe": _biased.GLM4_MOE,
    "glm4_moe_lite": _biased.GLM4_MOE_LITE,
    "glm_moe_dsa": _biased.GLM_MOE_DSA,
    "gpt_oss": _softmax.GPT_OSS,
    "kimi_k2": _biased.DEEPSEEK_V3,
    "llama4_text": _llama4.LLAMA4,
    "minimax_m2": _minimax.MINIMAX_M2,
    "mistral4": _mistral.MISTRAL4,
    "mistral_large4_text": _mistral.MISTRAL_LARGE4,
    "mixtral": _softmax.MIXTRAL,
    "nemotron_h": _biased.NEMOTRON_H,
    "olmoe": _softmax.OLMOE,
    "qwen2_moe": _qwen.QWEN2_MOE,
    "qwen3_5_moe_text": _qwen.QWEN3_5_MOE,
    "qwen3_moe": _qwen.QWEN3_MOE,
    "qwen3_next": _qwen.QWEN3_NEXT,
    "step3p5": _minimax.STEP3P5,
}
"""Text models."""


@final
@attrs.frozen(kw_only=True)
class Wrapper:
    """A model around a text model.

    Attributes:
        text_type: the text model's model_type where its own config does not say.
        root: where the text model's layers are in the wrapper's published checkpoint.
    """

    text_type: str
    root: str


WRAPPERS: Mapping[str, Wrapper] = {
    "cohere2_vision": Wrapper(text_type="cohere2", root="model.language_model.layers"),
    "kimi_k25": Wrapper(text_type="deepseek_v3", root="language_model.model.layers"),
    "llama4": Wrapper(text_type="llama4_text", root="language_model.model.layers"),
    "mistral3": Wrapper(text_type="mistral", root="language_model.model.layers"),
    "mistral_large4": Wrapper(text_type="mistral_large4_text", root="layers"),
    "qwen3_5_moe": Wrapper(text_type="qwen3_5_moe_text", root="model.language_model.layers"),
    "step3p7": Wrapper(text_type="step3p5", root="model.layers"),
}
"""Models whose text model is nested under `text_config`."""

MOE_FIELDS: tuple[str, ...] = (
    "moe_num_experts",
    "moe_top_k",
    "n_routed_experts",
    "num_experts",
    "num_experts_per_tok",
    "num_local_experts",
)
"""Fields by which a config of an unknown model_type is seen to be an MoE's."""
