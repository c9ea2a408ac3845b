"""Hugging Face configs: what one mixture-of-experts layer of a released model is."""

from typed_moe.models._fields import ConfigLike, HasToDict
from typed_moe.models._resolve import moe_layer_ids, moe_spec, num_hidden_layers, strategy_for
from typed_moe.models._shipped import load_config, shipped_configs
from typed_moe.models._spec import CheckpointLayout, MoeSpec, SharedCombination

__all__ = [
    "CheckpointLayout",
    "ConfigLike",
    "HasToDict",
    "MoeSpec",
    "SharedCombination",
    "load_config",
    "moe_layer_ids",
    "moe_spec",
    "num_hidden_layers",
    "shipped_configs",
    "strategy_for",
]
