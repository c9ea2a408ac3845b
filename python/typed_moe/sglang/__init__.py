"""SGLang: its words are translated here, and nowhere else.

Importing this package imports nothing of SGLang's.
"""

from typed_moe.sglang._methods import Agreement, Comparison, compare_method
from typed_moe.sglang._mode import Mode
from typed_moe.sglang._plugin import Plugin, active_plugin, plugin
from typed_moe.sglang._topk import TopKConfigLike, TopKSettings, read_topk_config
from typed_moe.sglang._translate import RoutedOutside, Translation, strategy_of

__all__ = [
    "Agreement",
    "Comparison",
    "Mode",
    "Plugin",
    "RoutedOutside",
    "TopKConfigLike",
    "TopKSettings",
    "Translation",
    "active_plugin",
    "compare_method",
    "plugin",
    "read_topk_config",
    "strategy_of",
]
