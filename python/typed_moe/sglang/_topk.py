"""What SGLang's `TopKConfig` says about routing, as plain values."""

from __future__ import annotations

from typing import Protocol, final

import attrs
from torch import Tensor


class TopKConfigLike(Protocol):
    """**Protocol:** the fields of `sglang.srt.layers.moe.topk.TopKConfig` that routing depends on."""

    top_k: int
    use_grouped_topk: bool
    topk_group: int | None
    num_expert_group: int | None
    renormalize: bool
    custom_routing_function: object
    correction_bias: Tensor | None
    routed_scaling_factor: float | None
    apply_routed_scaling_factor_on_output: bool
    scoring_func: str
    output_format: object
    layer_id: int | None
    runner_backend: object

    @property
    def num_shared_topk_slots(self) -> int:
        """Slots of `top_k` that are shared experts'."""
        ...


READ = frozenset(
    {
        "top_k",
        "use_grouped_topk",
        "topk_group",
        "num_expert_group",
        "renormalize",
        "custom_routing_function",
        "correction_bias",
        "routed_scaling_factor",
        "apply_routed_scaling_factor_on_output",
        "scoring_func",
        "output_format",
        "layer_id",
        "runner_backend",
    }
)
"""The fields of `TopKConfig` that are read."""

ASIDE = frozenset(
    {
        "shared_experts",
        "torch_native",
        "fused_shared_experts_scaling_factor",
        "routing_method_type",
        "fused_gate_packed_ids",
        "allow_routed_experts_capture",
        # A sqrtsoftplus through log1p: the same function.
        "sqrtsoftplus_log1p",
        "_correction_bias_dtype_cache",
        "_correction_bias_cache_key",
    }
)
"""Those that say nothing about which experts are chosen with which weights."""


@final
@attrs.frozen(kw_only=True)
class TopKSettings:
    """The routing half of a `TopKConfig`, without tensors and functions.

    Attributes:
        top_k: routed experts per token, without slots for shared ones.
        scoring_func: "softmax", "sigmoid" or "sqrtsoftplus". SGLang does not read it for a grouped
            router with a bias, which is a sigmoid whatever this says.
        renormalize: the weights are divided by their sum.
        use_grouped_topk: experts are chosen within the best groups.
        num_expert_group, topk_group: the groups, and how many are kept; None without groups.
        has_correction_bias: a bias is added for the choice.
        routed_scaling_factor: the factor that TopK puts into the weights; None where it puts none,
            because there is none or because somebody else multiplies.
        custom_routing_function: module and name of the function that routes; None: TopK does.
        num_shared_topk_slots: slots behind the routed ones that TopK fills with shared experts.
    """

    top_k: int
    scoring_func: str = "softmax"
    renormalize: bool = True
    use_grouped_topk: bool = False
    num_expert_group: int | None = None
    topk_group: int | None = None
    has_correction_bias: bool = False
    routed_scaling_factor: float | None = None
    custom_routing_function: str | None = None
    num_shared_topk_slots: int = 0


def read_topk_config(config: TopKConfigLike) -> TopKSettings:
    """The settings of a config, as `select_experts` of SGLang reads them.

    Args:
        config: of a `TopK`, after its model has finished with it: some models write to it between
            the constructor and `bind_runner_backend`.
    """
    function = config.custom_routing_function
    shared = config.num_shared_topk_slots
    return TopKSettings(
        top_k=config.top_k - shared,
        scoring_func=config.scoring_func,
        renormalize=config.renormalize,
        use_grouped_topk=config.use_grouped_topk,
        num_expert_group=config.num_expert_group,
        topk_group=config.topk_group,
        has_correction_bias=config.correction_bias is not None,
        routed_scaling_factor=(
            config.routed_scaling_factor if config.apply_routed_scaling_factor_on_output else None
        ),
        custom_routing_function=None if function is None else function_name(function),
        num_shared_topk_slots=shared,
    )


def function_name(function: object) -> str:
    """Module and qualified name, or the class's where a callable object has none."""
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{getattr(named, '__qualname__', named)}"
