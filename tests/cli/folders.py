"""Model folders written by the tests: a config.json cut down, and safetensors in each layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import attrs
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import oracle
from typed_moe import CheckpointLayout, MoeSpec, load_config, moe_spec
from typed_moe.config import is_gated

Tensors = dict[str, Tensor]

HIDDEN, WIDTH, EXPERTS, TOP_K = 64, 32, 8, 2

_SIZES: Mapping[str, int] = {
    "hidden_size": HIDDEN,
    "intermediate_size": WIDTH,
    "moe_intermediate_size": WIDTH,
    "moe_shared_expert_intermediate_size": WIDTH,
    "shared_expert_intermediate_size": WIDTH,
    "share_expert_dim": WIDTH,
    "num_experts": EXPERTS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "experts_per_token": TOP_K,
    "moe_top_k": TOP_K,
    "n_group": 4,
    "topk_group": 2,
}

MODELS: Mapping[str, CheckpointLayout] = {
    "qwen3-30b-a3b": CheckpointLayout.SEPARATE,
    "deepseek-v3": CheckpointLayout.SEPARATE,
    "mixtral-8x7b": CheckpointLayout.MIXTRAL,
    "deepseek-v4-flash": CheckpointLayout.MIXTRAL,
    "nemotron-3-nano-30b-a3b": CheckpointLayout.SEPARATE_UNGATED,
    "step-3.5-flash": CheckpointLayout.STACKED,
    "qwen3.5-35b-a3b": CheckpointLayout.FUSED,
    "llama4-scout": CheckpointLayout.FUSED_TRANSPOSED,
    "gpt-oss-20b": CheckpointLayout.FUSED_TRANSPOSED_INTERLEAVED,
}
"""A model of each layout that checkpoints have."""


def small_config(model: str, **settings: object) -> dict[str, object]:
    """A shipped config with its sizes cut down, and settings of the test's own."""
    config = load_config(model)
    nested = config.get("text_config")
    fields = {str(k): v for k, v in nested.items()} if isinstance(nested, dict) else dict(config)
    sizes: dict[str, object] = {name: size for name, size in _SIZES.items() if name in fields}
    if fields.get("n_group") == 1:
        sizes |= {"n_group": 1, "topk_group": 1}
    if fields.get("num_experts_per_tok") == 1:
        sizes |= {"num_experts_per_tok": 1}
    fields |= sizes | settings
    return {**config, "text_config": fields} if isinstance(nested, dict) else fields


@attrs.frozen(kw_only=True, eq=False)
class Folder:
    """A model's folder, and what was written into it.

    Attributes:
        path: with config.json and model.safetensors.
        spec: of its first MoE layer.
        experts: that layer's, as the oracle takes them.
        gate: (E, H) the router's weight.
        gate_bias: (E,) its bias, where the model has one.
        bias: (E,) the correction bias, where the model has one.
        tensors: everything that model.safetensors has.
    """

    path: Path
    spec: MoeSpec
    experts: oracle.Experts
    gate: Tensor
    gate_bias: Tensor | None
    bias: Tensor | None
    tensors: Tensors

    def write(self, tensors: Tensors) -> None:
        """Replace the checkpoint's tensors."""
        save_file({n: t.contiguous() for n, t in tensors.items()}, self.path / "model.safetensors")


def model_folder(path: Path, model: str, *, shared: int = 0, **settings: object) -> Folder:
    """Write a small model with random float32 weights.

    Args:
        path: an empty folder.
        model: out of `MODELS`; its published layout is written.
        shared: shared experts to write in one, as DeepSeek stores them.
        settings: of the config.
    """
    config = small_config(model, **settings)
    (path / "config.json").write_text(json.dumps(config))
    spec = moe_spec(config)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    count, width = spec.num_experts + shared, spec.intermediate_size
    in_scale, out_scale = spec.hidden_size**-0.5, width**-0.5
    has_bias, gated = spec.has_bias, is_gated(spec.activation)
    experts = oracle.Experts(
        up=draw(count, width, spec.hidden_size, scale=in_scale),
        down=draw(count, spec.hidden_size, width, scale=out_scale),
        gate=draw(count, width, spec.hidden_size, scale=in_scale) if gated else None,
        up_bias=draw(count, width, scale=0.3) if has_bias else None,
        gate_bias=draw(count, width, scale=0.3) if has_bias else None,
        down_bias=draw(count, spec.hidden_size, scale=0.3) if has_bias else None,
    )
    gate = draw(spec.num_experts, spec.router_hidden_size, scale=1.5 * in_scale)
    gate_bias = draw(spec.num_experts, scale=0.3) if spec.gate_bias_name else None
    bias = draw(spec.num_experts, scale=0.2) if spec.correction_bias_name else None
    tensors = _expert_tensors(spec, experts)
    for name, tensor in (
        (spec.gate_name, gate),
        (spec.gate_bias_name, gate_bias),
        (spec.correction_bias_name, bias),
    ):
        if name is not None and tensor is not None:
            tensors[name] = tensor
    if shared:
        tensors |= _shared_tensors(spec, experts)
    folder = Folder(
        path=path,
        spec=spec,
        experts=experts,
        gate=gate,
        gate_bias=gate_bias,
        bias=bias,
        tensors=tensors,
    )
    folder.write(tensors)
    return folder


def _expert_tensors(spec: MoeSpec, experts: oracle.Experts) -> Tensors:
    """The routed experts under the names of the spec's layout."""
    at, count = spec.experts_prefix, spec.num_experts
    up, down = experts.up[:count], experts.down[:count]
    gate = None if experts.gate is None else experts.gate[:count]
    parts = {"up_proj": up, "down_proj": down} | ({} if gate is None else {"gate_proj": gate})
    match spec.layout:
        case CheckpointLayout.SEPARATE | CheckpointLayout.SEPARATE_UNGATED:
            return {
                f"{at}.{number}.{name}.weight": stack[number]
                for name, stack in parts.items()
                for number in range(count)
            }
        case CheckpointLayout.MIXTRAL:
            letters = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
            return {
                f"{at}.{number}.{letters[name]}.weight": stack[number]
                for name, stack in parts.items()
                for number in range(count)
            }
        case CheckpointLayout.STACKED:
            return {f"{at}.{name}.weight": stack for name, stack in parts.items()}
        case _:
            assert gate is not None
            return _fused_tensors(spec, experts, gate, up, down)


def _fused_tensors(
    spec: MoeSpec, experts: oracle.Experts, gate: Tensor, up: Tensor, down: Tensor
) -> Tensors:
    at = spec.experts_prefix
    if spec.layout is CheckpointLayout.FUSED:
        return {f"{at}.gate_up_proj": torch.cat((gate, up), dim=1), f"{at}.down_proj": down}
    if spec.layout is CheckpointLayout.FUSED_TRANSPOSED:
        both = torch.cat((gate, up), dim=1).transpose(1, 2)
        return {f"{at}.gate_up_proj": both, f"{at}.down_proj": down.transpose(1, 2)}
    assert experts.gate_bias is not None
    assert experts.up_bias is not None
    assert experts.down_bias is not None
    return {
        f"{at}.gate_up_proj": torch.stack((gate, up), dim=2).flatten(1, 2).transpose(1, 2),
        f"{at}.down_proj": down.transpose(1, 2),
        f"{at}.gate_up_proj_bias": torch.stack((experts.gate_bias, experts.up_bias), 2).flatten(1),
        f"{at}.down_proj_bias": experts.down_bias,
    }


def _shared_tensors(spec: MoeSpec, experts: oracle.Experts) -> Tensors:
    """The experts behind the routed ones as one wide expert."""
    at = spec.experts_prefix.removesuffix("experts") + "shared_experts"
    first = spec.num_experts
    assert experts.gate is not None
    return {
        f"{at}.gate_proj.weight": experts.gate[first:].flatten(0, 1),
        f"{at}.up_proj.weight": experts.up[first:].flatten(0, 1),
        f"{at}.down_proj.weight": torch.cat(list(experts.down[first:]), dim=1),
    }
