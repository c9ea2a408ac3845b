"""The reference kernel: every argument record in float32 PyTorch, on any machine.

Slow and plain on purpose. It computes what the fused kernels compute, the rounding of the
format included: stored values are dequantised, products are accumulated in float32, and the
intermediate is rounded to what the second matrix would read.

Shapes: as in `typed_moe.kernels.args`; n is the number of slots that one expert serves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import assert_never, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import is_gated
from typed_moe.kernels._experts_math import activate, is_gated_type, settings_of
from typed_moe.kernels._protocol import KernelRequest
from typed_moe.kernels._reference_formats import Numerics, numerics_of
from typed_moe.kernels._reference_routing import METHODS, route
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import ExpertArgs, FromLogits, MoeArgs, Precomputed, Routing
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.routing import (
    ANY_SIZE,
    GlobalExpertIds,
    GroupLimits,
    KernelRules,
    LocalExpertIds,
    MethodRules,
    Refused,
    as_global_ids,
)

_ANY_GROUPS = GroupLimits(
    max_groups=2**31 - 1, max_experts_per_group=2**31 - 1, max_topk_group=2**31 - 1
)
_ANY_DTYPE = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_METHOD_RULES: Mapping[str, MethodRules] = MappingProxyType(
    {
        method: MethodRules(
            tiers=ANY_SIZE,
            logits_dtypes=_ANY_DTYPE,
            bias_dtypes=_ANY_DTYPE,
            grouped_tiers=ANY_SIZE,
            groups=_ANY_GROUPS,
        )
        for method in METHODS
    }
)

REFERENCE_RULES = KernelRules(
    kernel="reference",
    methods=_METHOD_RULES,
    weight_on_input=True,
    source="typed_moe.kernels.reference",
)
"""What the reference kernel routes by itself: every method at every size."""


@final
@attrs.frozen(kw_only=True)
class ReferenceKernel:
    """Float32 PyTorch over the argument records.

    Attributes:
        gate_first: row order of a gated first matrix: True is gate rows then up rows, as
            layers store them; False is FlashInfer's order, for records made by hand.
        on_intermediate: called with every intermediate (n, I) float32 before it is rounded;
            calibration watches its range.
    """

    gate_first: bool = True
    on_intermediate: Callable[[Tensor], None] | None = None

    @property
    def name(self) -> str:
        """`reference`."""
        return "reference"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """It serves every layer, but for fused shared experts under expert parallelism.

        And, with `gate_first=False`, but for gated ones: layers store the gate's rows first.
        """
        if not self.gate_first and is_gated(request.activation):
            return Refused(
                "gate_first=False reads the up projection's rows first and a layer stores the "
                "gate's rows first; pass kernel=ReferenceKernel()"
            )
        if request.num_fused_shared_experts and request.placement.ep_size > 1:
            return Refused(
                "fused shared experts are held by every rank, so with ep_size = "
                f"{request.placement.ep_size} they would be added once per rank; run them "
                "unfused"
            )
        return REFERENCE_RULES

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As they are."""
        del request
        return weights

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """(T, H) float32: the sum over this rank's experts of weight * expert(x)."""
        slots, numerics = _Slots.of(args), numerics_of(args)
        output = slots.weights.new_zeros((slots.weights.shape[0], numerics.hidden_size))
        for token, slot, y in self._outputs(args.experts, slots, numerics):
            weight = slots.weights[token, slot].unsqueeze(-1)
            output.index_add_(0, token, y if slots.on_input else y * weight)
        return output

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        """float32 throughout, for every layer."""
        del request, routing
        return UnfinalizedRules(rows_dtype=torch.float32, weights_dtype=torch.float32)

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        """T * k rows, this rank's first, expert after expert; the others are NaN."""
        slots, numerics = _Slots.of(args), numerics_of(args)
        weights = slots.weights
        rows = weights.new_full((weights.numel(), numerics.hidden_size), torch.nan)
        index = torch.full_like(slots.local.ids, -1, dtype=torch.int32)
        start = 0
        for token, slot, y in self._outputs(args.experts, slots, numerics):
            stop = start + len(token)
            rows[start:stop] = y
            index[token, slot] = torch.arange(start, stop, dtype=torch.int32, device=index.device)
            start = stop
        return Unfinalized(
            gemm2_output=rows,
            expert_weights=torch.ones_like(weights) if slots.on_input else weights,
            expanded_idx_to_permuted_idx=index,
        )

    def _outputs(
        self, args: ExpertArgs, slots: _Slots, numerics: Numerics
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(token indices, slot indices, (n, H) unweighted outputs) of each expert in use."""
        for expert, token, slot in slots_by_expert(slots.local):
            x = numerics.hidden_states(token)
            if slots.on_input:
                x = x * slots.weights[token, slot].unsqueeze(-1)
            yield token, slot, self._expert(x, expert, args, numerics)

    def _expert(self, x: Tensor, expert: int, args: ExpertArgs, numerics: Numerics) -> Tensor:
        """One expert on its tokens: (n, H) float32 to (n, H) float32."""
        first = numerics.first(x, expert)
        if args.gemm1_bias is not None:
            first = first + args.gemm1_bias[expert].float()
        hidden = activate(
            first, args.activation_type, settings_of(args, expert), gate_first=self.gate_first
        )
        if self.on_intermediate is not None:
            self.on_intermediate(hidden)
        second = numerics.second(hidden, expert, gated=is_gated_type(args.activation_type))
        if args.gemm2_bias is not None:
            second = second + args.gemm2_bias[expert].float()
        return second


@final
@attrs.frozen(kw_only=True, eq=False)
class _Slots:
    """Where each token goes on this rank: weights (T, k) float32, and on which side they go."""

    local: LocalExpertIds
    weights: Tensor
    on_input: bool

    @staticmethod
    def of(args: MoeArgs) -> _Slots:
        """A record's routing, by the reference or as given, with fused shared experts."""
        experts, asked = args.experts, args.routing
        routing = _with_shared(_routing(asked, experts.top_k), asked, experts)
        local = to_local(
            routing.topk_ids,
            local_expert_offset=experts.local_expert_offset,
            local_num_experts=experts.local_num_experts,
            num_experts=experts.num_experts,
            num_fused_shared_experts=experts.num_fused_shared_experts,
        )
        return _Slots(
            local=local,
            weights=routing.topk_weights.float(),
            on_input=isinstance(asked, FromLogits) and asked.use_routing_scales_on_input,
        )


def to_local(
    ids: GlobalExpertIds,
    *,
    local_expert_offset: int,
    local_num_experts: int,
    num_experts: int,
    num_fused_shared_experts: int = 0,
) -> LocalExpertIds:
    """Global ids as this rank's, -1 where the slot is another rank's or skipped.

    Fused shared experts (global ids from num_experts on) follow the routed ones of the rank.
    """
    moved = ids - local_expert_offset
    mine = (moved >= 0) & (moved < local_num_experts)
    local = torch.where(mine, moved, -1)
    if num_fused_shared_experts:
        shared = (ids >= num_experts) & (ids < num_experts + num_fused_shared_experts)
        local = torch.where(shared, ids - num_experts + local_num_experts, local)
    return LocalExpertIds(ids=local, num_local_experts=local_num_experts + num_fused_shared_experts)


def slots_by_expert(local: LocalExpertIds) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, token indices, slot indices) of every local expert that has a slot, in order."""
    flat = local.ids.flatten().long()
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=local.num_local_experts + 1).tolist()
    slots_per_token = local.ids.shape[1]
    start = counts[0]  # the skipped slots (id -1) sort first
    for expert, count in enumerate(counts[1:]):
        if count:
            mine = order[start : start + count]
            yield expert, mine // slots_per_token, mine % slots_per_token
        start += count


def _routing(routing: FromLogits | Precomputed, top_k: int) -> Precomputed:
    match routing:
        case FromLogits():
            return route(routing, top_k)
        case Precomputed():
            return routing
        case _:
            assert_never(routing)


def _with_shared(
    routing: Precomputed, asked: FromLogits | Precomputed, experts: ExpertArgs
) -> Precomputed:
    """A kernel that routes by itself adds the shared slots; precomputed ids hold them already."""
    if isinstance(asked, Precomputed) or not experts.num_fused_shared_experts:
        return routing
    return append_shared(routing, experts.num_experts, experts.num_fused_shared_experts)


def append_shared(routing: Precomputed, num_experts: int, count: int) -> Precomputed:
    """Routing with slots E to E + count - 1 of weight 1 behind every token's own."""
    ids, weights = routing.topk_ids, routing.topk_weights
    shared = torch.arange(num_experts, num_experts + count, device=ids.device, dtype=ids.dtype)
    return Precomputed(
        topk_ids=as_global_ids(torch.cat((ids, shared.expand(ids.shape[0], count)), dim=1)),
        topk_weights=torch.cat((weights, weights.new_ones(weights.shape[0], count)), dim=1),
    )
