"""What one mixture-of-experts layer of a model is."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import final

import attrs

from typed_moe.config import Activation
from typed_moe.routing import RoutingStrategy


class CheckpointLayout(Enum):
    """How a published checkpoint stores the experts of one layer, below `experts_prefix`.

    E experts, H hidden size, I intermediate size; i is an expert's number.
    """

    SEPARATE = "separate"
    """`{i}.gate_proj.weight`, `{i}.up_proj.weight` (I, H) and `{i}.down_proj.weight` (H, I)."""
    MIXTRAL = "mixtral"
    """`{i}.w1.weight` (gate), `{i}.w3.weight` (up) (I, H) and `{i}.w2.weight` (down) (H, I)."""
    SEPARATE_UNGATED = "separate_ungated"
    """`{i}.up_proj.weight` (I, H) and `{i}.down_proj.weight` (H, I); no gate."""
    STACKED = "stacked"
    """`gate_proj.weight`, `up_proj.weight` (E, I, H) and `down_proj.weight` (E, H, I): Step."""
    FUSED = "fused"
    """`gate_up_proj` (E, 2I, H), the gate's rows first, and `down_proj` (E, H, I)."""
    FUSED_TRANSPOSED = "fused_transposed"
    """`gate_up_proj` (E, H, 2I), the gate's columns first, and `down_proj` (E, I, H): Llama4."""
    FUSED_TRANSPOSED_INTERLEAVED = "fused_transposed_interleaved"
    """gpt-oss: `gate_up_proj` (E, H, 2I), gate and up in alternate columns, `down_proj`
    (E, I, H), `gate_up_proj_bias` (E, 2I) and `down_proj_bias` (E, H). As published the two
    matrices are MXFP4: `*_blocks` and `*_scales`, with the rows of (E, 2I, H) and (E, H, I)."""


class SharedCombination(Enum):
    """How the model adds its shared expert to the routed experts' output."""

    NONE = "none"
    """There is no shared expert."""
    SUM = "sum"
    """routed + shared."""
    AVERAGE = "average"
    """(routed + shared) / 2: Cohere2 MoE."""
    SIGMOID_GATED = "sigmoid_gated"
    """routed + sigmoid(shared_expert_gate(x)) * shared: Qwen2, Qwen3-Next, Qwen3.5."""


@final
@attrs.frozen(kw_only=True)
class MoeSpec:
    """One MoE layer, read from a model's config.

    Attributes:
        model_type: the text model's.
        layer_id: the decoder layer, counted from 0.
        routing: the routing rule with every setting.
        num_experts: routed experts, E.
        top_k: experts per token, k.
        hidden_size: width of the experts' input and output, H (nemotron_h: the latent width).
        router_hidden_size: width of the router's input; differs from `hidden_size` only where
            the experts work in a latent space.
        intermediate_size: width between an expert's two matrices, I.
        num_shared_experts: shared experts that every token passes; 0 if none.
        shared_expert_intermediate_size: their width together; 0 if none.
        shared_expert_combination: how their output is added.
        activation: what lies between an expert's two matrices.
        has_bias: the experts' matrices have biases.
        has_correction_bias: the router has an `e_score_correction_bias`.
        router_weight_fp32: the model's own code computes the router logits in float32.
        layout: how the published checkpoint stores the experts.
        experts_prefix: where, e.g. `model.layers.3.mlp.experts`.
        gate_name: the router's weight, (E, router_hidden_size).
        gate_bias_name: the router's bias on the logits, (E,); None if it has none.
        correction_bias_name: the bias on the scores, (E,), for selection; None if none.
        sources: for each decided thing, the field and value that it came from, or whose
            documented default it is.
    """

    model_type: str
    layer_id: int
    routing: RoutingStrategy
    num_experts: int
    top_k: int
    hidden_size: int
    router_hidden_size: int
    intermediate_size: int
    num_shared_experts: int
    shared_expert_intermediate_size: int
    shared_expert_combination: SharedCombination
    activation: Activation
    has_bias: bool
    has_correction_bias: bool
    router_weight_fp32: bool
    layout: CheckpointLayout
    experts_prefix: str
    gate_name: str
    gate_bias_name: str | None
    correction_bias_name: str | None
    sources: Mapping[str, str] = attrs.field(eq=False, repr=False)
