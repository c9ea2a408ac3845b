"""SGLang: its words are translated here, and nowhere else.

Importing this package imports nothing of SGLang's.
"""

from typed_moe.sglang._backend import plans_of
from typed_moe.sglang._doctor import (
    FORMATS,
    BlockReport,
    Route,
    Verdict,
    examine,
    kernel_path,
    models_folder,
    shape_of,
)
from typed_moe.sglang._methods import Agreement, Comparison, compare_method
from typed_moe.sglang._mode import Mode
from typed_moe.sglang._plugin import Plugin, active_plugin, plugin
from typed_moe.sglang._topk import TopKConfigLike, TopKSettings, read_topk_config
from typed_moe.sglang._translate import RoutedOutside, Translation, strategy_of

__all__ = [
    "FORMATS",
    "Agreement",
    "BlockReport",
    "Comparison",
    "Mode",
    "Plugin",
    "Route",
    "RoutedOutside",
    "TopKConfigLike",
    "TopKSettings",
    "Translation",
    "Verdict",
    "active_plugin",
    "compare_method",
    "examine",
    "kernel_path",
    "models_folder",
    "plans_of",
    "plugin",
    "read_topk_config",
    "shape_of",
    "strategy_of",
]
