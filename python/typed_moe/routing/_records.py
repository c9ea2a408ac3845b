"""The records that a strategy takes and gives.

Shapes in this room: T tokens, E routed experts of the whole layer, k = top_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Literal, NewType, cast, final

import attrs
import torch
from torch import Tensor
from typing_extensions import override

from typed_moe.config import check_count

GlobalExpertIds = NewType("GlobalExpertIds", Tensor)
"""Expert ids of the whole layer, 0 to E - 1; -1 marks a slot to skip. int32, any shape."""


def as_global_ids(ids: Tensor) -> GlobalExpertIds:
    """Say that a tensor holds global expert ids. torch.compile traces this, not `NewType`."""
    return cast("GlobalExpertIds", ids)


@final
@dataclass(frozen=True, kw_only=True, eq=False)
class LocalExpertIds:
    """Expert ids of one rank, 0 to num_local_experts - 1; -1 marks a slot of another rank.

    Not a tensor: code that wants global ids cannot take these by mistake, and code that
    wants the numbers says `.ids`.
    """

    ids: Tensor
    num_local_experts: int


@final
@dataclass(frozen=True, eq=False, init=False)
class Routed:
    """Which experts each token goes to, and with which weight.

    Args:
        topk_ids: (T, k) int32, global expert ids, distinct within a row; -1 marks a slot
            that is skipped. A strategy counts over all experts, so a plain tensor is taken.
        topk_weights: (T, k) float32, one weight per id, everything applied that the strategy
            owns (normalisation, scale).

    Raises:
        ValueError: the two are not 2-D of one shape, or the ids are not integers.
    """

    topk_ids: GlobalExpertIds
    topk_weights: Tensor

    # Not attrs's: torch.compile (2.13) cannot trace the frozen `__init__` that attrs makes, and
    # this record is built inside the compiled graph.
    def __init__(self, *, topk_ids: Tensor, topk_weights: Tensor) -> None:
        if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape:
            raise ValueError(
                f"topk_ids has shape {tuple(topk_ids.shape)} and topk_weights "
                f"{tuple(topk_weights.shape)}; allowed: two tensors of one shape (num_tokens, top_k)"
            )
        if topk_ids.is_floating_point() or not topk_weights.is_floating_point():
            raise ValueError(
                f"topk_ids is {topk_ids.dtype} and topk_weights {topk_weights.dtype}; allowed: "
                "integer ids and floating-point weights. Are the two swapped?"
            )
        object.__setattr__(self, "topk_ids", topk_ids)
        object.__setattr__(self, "topk_weights", topk_weights)


@final
@attrs.frozen(kw_only=True)
class RoutingShape:
    """What the layer tells a strategy: how many routed experts there are, how many are chosen.

    Raises:
        TypeError: one of them is no int.
        ValueError: num_experts is below 1, or top_k is not in [1, num_experts].
    """

    num_experts: int
    top_k: int

    def __attrs_post_init__(self) -> None:
        check_count("num_experts", self.num_experts, least=1)
        check_count("top_k", self.top_k, least=1)
        if self.top_k > self.num_experts:
            raise ValueError(
                f"top_k is {self.top_k}; allowed: 1 to num_experts = {self.num_experts}"
            )


class BiasRule(Enum):
    """What a strategy does with `e_score_correction_bias`."""

    NONE = "none"
    """The maths has no bias; being given one is an error."""
    REQUIRED = "required"
    """The maths adds one before selection; a model without one passes zeros, knowingly."""


class RoutingForm(Enum):
    """Who routes: the kernel from logits, or the strategy before the kernel is called."""

    IN_KERNEL = "in-kernel"
    PRECOMPUTED = "precomputed"


class ScaleOwner(Enum):
    """Who multiplies by `routed_scaling_factor`. Exactly one of them does."""

    STRATEGY = "strategy"
    """It is in `topk_weights`."""
    KERNEL = "kernel"
    """The kernel is told the factor and applies it."""
    HOST = "host"
    """The strategy has no factor; if the model has one, the model multiplies the output."""


@final
@attrs.frozen(kw_only=True)
class Scale:
    """A factor on the routed experts' output and who applies it."""

    factor: float
    owner: ScaleOwner


@final
@attrs.frozen(kw_only=True)
class Tier:
    """One range of sizes that a routing kernel serves: E in [min, max] with k <= max_top_k."""

    max_experts: int
    max_top_k: int
    min_experts: int = 1

    def holds(self, shape: RoutingShape) -> bool:
        """Whether the kernel serves this layer in this range."""
        experts = shape.num_experts
        return self.min_experts <= experts <= self.max_experts and shape.top_k <= self.max_top_k

    @override
    def __str__(self) -> str:
        least = f"{self.min_experts} to " if self.min_experts > 1 else "up to "
        return f"{least}{self.max_experts} experts with top_k up to {self.max_top_k}"


@final
@attrs.frozen(kw_only=True)
class GroupLimits:
    """What a kernel's grouped routing takes.

    `top_k_below_kept`: top_k has to be below the number of experts in the kept groups, where
    the maths allows as many.
    """

    max_groups: int
    max_experts_per_group: int
    max_topk_group: int
    top_k_below_kept: bool = False


NoBias = Literal["zeros", "fault"]
RowWeights = Literal["zero", "nan", "other"]
"""Weights of a row whose logits are no numbers: all 0, all NaN, or neither."""


@final
@attrs.frozen(kw_only=True)
class BrokenRows:
    """What a kernel makes of rows that a strategy gives weight 0.

    Attributes:
        nan: of NaN alone.
        minus_infinity: of -inf alone.
        one_nan: with a NaN among numbers.
    """

    nan: RowWeights = "zero"
    minus_infinity: RowWeights = "zero"
    one_nan: RowWeights = "zero"


@final
@attrs.frozen(kw_only=True)
class MethodRules:
    """What a kernel does with one routing method, from logits.

    Attributes:
        tiers: the compiled sizes; a shape is served if one of them holds it.
        logits_dtypes: the dtypes it reads, the preferred one first.
        bias_dtypes: the dtypes it reads for the correction bias; empty if it reads none.
        grouped_tiers: the compiled sizes with num_expert_group > 1; empty if it has no groups.
        groups: the limits of groups, one group of all experts included, where the method has any.
        grouped_bias_dtype: what the grouped kernel rounds the bias to before it adds it.
        no_bias: what a null bias is to it: zeros, or an illegal address. None: it reads none.
        grouped_no_bias: the same of the grouped kernel.
        score_error: how far its scores may be off, in themselves, beyond float32's relative
            rounding.
        broken_rows: what it makes of rows that are no numbers.
    """

    tiers: tuple[Tier, ...]
    logits_dtypes: tuple[torch.dtype, ...]
    bias_dtypes: tuple[torch.dtype, ...] = ()
    grouped_tiers: tuple[Tier, ...] = ()
    groups: GroupLimits | None = None
    grouped_bias_dtype: torch.dtype | None = None
    no_bias: NoBias | None = None
    grouped_no_bias: NoBias | None = None
    score_error: float = 0.0
    broken_rows: BrokenRows = BrokenRows()


@final
@attrs.frozen
class Refused:
    """A kernel does not take this strategy from logits, and why (a sentence)."""

    reason: str = attrs.field(validator=attrs.validators.min_len(1))


@final
@attrs.frozen(kw_only=True)
class PrecomputedRules:
    """What a kernel takes in place of logits.

    Attributes:
        tiers: the compiled sizes.
        packed: id and weight go in one word, which rounds the weight to bfloat16.
    """

    tiers: tuple[Tier, ...]
    packed: bool = False


ANY_SIZE = (Tier(max_experts=2**31 - 1, max_top_k=2**31 - 1),)


@final
@attrs.frozen(kw_only=True)
class KernelRules:
    """Facts about one kernel entry point, from which a strategy decides how it is called.

    Attributes:
        kernel: the entry point's name, for messages.
        methods: the routing methods it computes from logits, by name; empty: none.
        weight_on_input: from logits, it can apply the weight to the expert's input.
        source: where the facts are from.
        refused_methods: methods that it knows by name and does not route, and why.
        precomputed: what it takes in place of logits, or why it takes nothing.
    """

    kernel: str
    methods: Mapping[str, MethodRules]
    weight_on_input: bool
    source: str
    refused_methods: Mapping[str, str] = MappingProxyType({})
    precomputed: PrecomputedRules | Refused = PrecomputedRules(tiers=ANY_SIZE)


@final
@attrs.frozen(kw_only=True)
class InKernel:
    """The routing arguments of a kernel that routes by itself, in the kernel's own names.

    Attributes:
        routing_method_type: the method by name; the number is looked up in the installed
            library by the one file that calls it.
        n_group, topk_group: the one form that every entry point takes: counts of 1 or more
            for a method that knows groups, None for one that does not.
        group_score: what ranks a group: its best expert, or the sum of its two best. Read by
            kernels that know both; FlashInfer's know the second.
        routed_scaling_factor: the factor that the kernel applies, None where it applies none.
        norm_topk_prob: whether the weights are divided by their sum (read by SigmoidRenorm only).
        use_routing_scales_on_input: the weight goes on the expert's input.
        logits_dtypes: what the logits may be, the preferred dtype first.
        bias_dtype: what the stored bias is cast to; None: passed as stored.
        differences: where the kernel's result is not `select_experts`'s, one sentence each.
    """

    routing_method_type: str
    n_group: int | None
    topk_group: int | None
    routed_scaling_factor: float | None
    norm_topk_prob: bool
    use_routing_scales_on_input: bool
    logits_dtypes: tuple[torch.dtype, ...]
    bias_dtype: torch.dtype | None = None
    group_score: Literal["max", "top2_sum"] = "top2_sum"
    differences: tuple[str, ...] = ()
