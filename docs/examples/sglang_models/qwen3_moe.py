"""Qwen3-MoE in SGLang with its routing said once: `FusedMoE(..., routing=RenormalizeNaive())`.

    SGLANG_EXTERNAL_MODEL_PACKAGE=sglang_models PYTHONPATH=docs/examples \
        python -m sglang.launch_server --model-path Qwen/Qwen3-30B-A3B

Attention, embeddings and the loading of weights are SGLang's; the MoE block is this one. It gives the
layer the router logits: there is no TopK, so no second description of the routing to disagree.
"""

from __future__ import annotations

from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.models import qwen3_moe
from sglang.srt.utils import add_prefix
from torch import Tensor, nn
from transformers import PretrainedConfig

from typed_moe import RenormalizeNaive


class TypedMoeBlock(nn.Module):
    """Gate, strategy, experts."""

    def __init__(
        self,
        layer_id: int,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        if not config.norm_topk_prob:
            raise ValueError("this block is for norm_topk_prob = true; use routing=Default()")
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            quant_config=None,
            prefix=add_prefix("gate", prefix),
        )
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            top_k=config.num_experts_per_tok,
            hidden_size=config.hidden_size,
            intermediate_size=config.moe_intermediate_size,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
            routing=RenormalizeNaive(),
        )

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        """(T, H) to (T, H), this rank's part; SGLang's decoder layer adds up the ranks'."""
        router_logits, _ = self.gate(hidden_states)
        output: Tensor = self.experts(hidden_states, router_logits)
        return output


class Qwen3MoeForCausalLM(qwen3_moe.Qwen3MoeForCausalLM):
    """SGLang's, with the block above in every MoE layer."""

    def __init__(
        self,
        config: PretrainedConfig,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(config, quant_config, prefix)
        for layer_id, layer in enumerate(self.model.layers):
            if isinstance(layer.mlp, qwen3_moe.Qwen3MoeSparseMoeBlock):
                name = add_prefix(f"model.layers.{layer_id}.mlp", prefix)
                layer.mlp = TypedMoeBlock(layer_id, config, quant_config, name)


EntryClass = Qwen3MoeForCausalLM
