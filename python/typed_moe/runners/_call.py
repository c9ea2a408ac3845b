"""The kernel's call, also from inside a compiled graph.

torch.compile cannot look into a kernel, and need not: under it the call is one custom operator per
kernel family, `typed_moe::<family>_moe`, with every tensor of the record as an operand, and
`typed_moe::<family>_moe_unfinalized` without the sum. What is not a tensor stays behind a handle,
since no call changes it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Literal, Protocol, assert_never, cast, final
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels import (
    Bf16MoeArgs,
    ExpertArgs,
    Family,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerChannelMoeArgs,
    Fp8PerTensorMoeArgs,
    FromLogits,
    MoeArgs,
    MxInt4MoeArgs,
    Precomputed,
    ToFormat,
    Unfinalized,
    UnfinalizedKernel,
)
from typed_moe.kernels.flashinfer_facts import family_of
from typed_moe.routing import InKernel, Refused, as_global_ids
from typed_moe.runners._base import in_dtype
from typed_moe.runners._planning import Decision

_TENSORS: Mapping[Family, tuple[str, ...]] = MappingProxyType(
    {
        "bf16": ("hidden_states", "gemm1_weights", "gemm2_weights"),
        "fp8_per_tensor_scale": (
            "hidden_states",
            "gemm1_weights",
            "output1_scales_scalar",
            "output1_scales_gate_scalar",
            "gemm2_weights",
            "output2_scales_scalar",
        ),
        "fp8_per_channel_scale": (
            "hidden_states",
            "hidden_states_scale",
            "gemm1_weights",
            "gemm1_per_channel_weight_scale",
            "output1_scale_scalar",
            "output1_scale_gate_scalar",
            "gemm2_weights",
            "gemm2_per_channel_weight_scale",
            "output2_scale_scalar",
        ),
        "fp8_block_scale": (
            "hidden_states",
            "hidden_states_scale",
            "gemm1_weights",
            "gemm1_weights_scale",
            "gemm2_weights",
            "gemm2_weights_scale",
        ),
        "fp4_block_scale": (
            "hidden_states",
            "hidden_states_scale",
            "gemm1_weights",
            "gemm1_weights_scale",
            "gemm2_weights",
            "gemm2_weights_scale",
            "output1_scale_scalar",
            "output1_scale_gate_scalar",
            "output2_scale_scalar",
        ),
        "mxint4_block_scale": (
            "hidden_states",
            "gemm1_weights",
            "gemm1_weights_scale",
            "gemm2_weights",
            "gemm2_weights_scale",
        ),
    }
)
"""The tensor fields of each record, in the order that the operator takes them."""

_handles = itertools.count(1)
_calls: WeakValueDictionary[int, KernelCall] = WeakValueDictionary()


@final
class KernelCall:
    """What a runner calls: the decision's kernel, on records of one shape."""

    def __init__(
        self, decision: Decision, experts: ExpertArgs, to_format: ToFormat | None = None
    ) -> None:
        self._kernel = decision.kernel
        self._in_kernel = decision.plan.in_kernel
        self._hidden_size = decision.plan.request.hidden_size
        self._deepseek = decision.plan.request.quant.name == "fp8_block"
        self._experts, self._to_format = experts, to_format
        self._rules = decision.plan.unfinalized
        kernel = decision.kernel
        self._unfinalized = kernel if isinstance(kernel, UnfinalizedKernel) else None
        self._handle = next(_handles)
        _calls[self._handle] = self
        family = family_of(decision.plan.request.quant) or "bf16"
        if family not in _operators:
            _operators[family] = _operator(family)
            _unfinalized_operators[family] = _unfinalized_operator(family)

    def __call__(self, args: MoeArgs, copies: int, dtype: torch.dtype) -> Tensor:
        """(T, H) in `dtype`, the `copies` rows of one token added up."""
        if torch.compiler.is_compiling():
            return self._traced(args, copies, dtype)
        if copies > 1 and args.output is not None:
            # The kernel's rows are not the caller's: they are added up first.
            return args.output.copy_(self._summed(replace(args, output=None), copies, dtype))
        output = self._summed(args, copies, dtype)
        if args.output is None or output is args.output:
            return output
        return args.output.copy_(output)

    def unfinalized(self, args: MoeArgs, copies: int) -> Unfinalized:
        """What the kernel gives before the sum; the `copies` rows of one token are its slots."""
        if args.output is not None:
            raise ValueError(
                "output is where the sum goes, and unfinalized rows are not added up; leave it out"
            )
        if torch.compiler.is_compiling():
            return self._traced_unfinalized(args, copies)
        if isinstance(self._rules, Refused):
            raise UnsupportedRouting(self._rules.reason)
        assert self._unfinalized is not None, "the plan has its rules"
        made = self._unfinalized.unfinalized(args)
        given = made.gemm2_output.dtype, made.expert_weights.dtype
        if given != (self._rules.rows_dtype, self._rules.weights_dtype):
            # flashinfer#3595: a wrong label is the one thing that nobody downstream can notice.
            raise UnsupportedRouting(
                f"{self._kernel.name} gave {given[0]} rows with {given[1]} weights, and says that it "
                f"gives {self._rules}; report it, and call the layer itself"
            )
        if copies == 1:
            return made
        return replace(
            made,
            expert_weights=made.expert_weights.view(-1, copies),
            expanded_idx_to_permuted_idx=made.expanded_idx_to_permuted_idx.view(-1, copies),
        )

    def _summed(self, args: MoeArgs, copies: int, dtype: torch.dtype) -> Tensor:
        output = self._kernel(args)
        if copies > 1:
            output = output.reshape(-1, copies, output.shape[1]).sum(dim=1)
        return in_dtype(output, dtype)

    def _traced(self, args: MoeArgs, copies: int, dtype: torch.dtype) -> Tensor:
        return _operators[args.family](
            *_operands(args), self._handle, self._hidden_size, copies, dtype
        )

    def _traced_unfinalized(self, args: MoeArgs, copies: int) -> Unfinalized:
        rules, experts = self._rules, self._experts
        if isinstance(rules, Refused):
            raise UnsupportedRouting(rules.reason)
        rows, weights, index = _unfinalized_operators[args.family](
            *_operands(args),
            self._handle,
            self._hidden_size,
            copies,
            experts.top_k + experts.num_fused_shared_experts,
            rules.rows_dtype,
            rules.weights_dtype,
        )
        return Unfinalized(
            gemm2_output=rows, expert_weights=weights, expanded_idx_to_permuted_idx=index
        )

    def record(
        self, family: Family, first: Tensor, second: Tensor | None, tensors: Sequence[Tensor | None]
    ) -> MoeArgs:
        """The record again, from its tensors."""
        routing = self._routing(first, second)
        fields = dict(zip(_TENSORS[family], tensors, strict=True))
        experts, to = self._experts, self._to_format
        return _make(family, routing, experts, fields, deepseek=self._deepseek, to_format=to)

    def _routing(self, first: Tensor, second: Tensor | None) -> FromLogits | Precomputed:
        told = self._in_kernel
        if not isinstance(told, InKernel):
            assert second is not None, "precomputed routing has weights"
            return Precomputed(topk_ids=as_global_ids(first), topk_weights=second)
        return FromLogits(
            routing_logits=first,
            routing_bias=second,
            n_group=told.n_group,
            topk_group=told.topk_group,
            routed_scaling_factor=told.routed_scaling_factor,
            routing_method_type=told.routing_method_type,
            norm_topk_prob=told.norm_topk_prob,
            use_routing_scales_on_input=told.use_routing_scales_on_input,
            group_score=told.group_score,
        )


def _operands(args: MoeArgs) -> tuple[Tensor, Tensor | None, list[Tensor | None]]:
    """A record's tensors, in the order that the operators take them."""
    routing = args.routing
    if args.output is not None or (
        isinstance(routing, FromLogits) and routing.routing_replay_out is not None
    ):
        raise ValueError(
            "output and routing_replay_out are not written to under torch.compile; leave them "
            "out there"
        )
    tensors: list[Tensor | None] = [getattr(args, name) for name in _TENSORS[args.family]]
    if isinstance(routing, FromLogits):
        return routing.routing_logits, routing.routing_bias, tensors
    return routing.topk_ids, routing.topk_weights, tensors


def _make(
    family: Family,
    routing: FromLogits | Precomputed,
    experts: ExpertArgs,
    fields: Mapping[str, Tensor | None],
    *,
    deepseek: bool,
    to_format: ToFormat | None,
) -> MoeArgs:
    """One record of the family. A field that may not be None was none of them when it was sent."""
    tensors = cast("Mapping[str, Tensor]", fields)
    match family:
        case "bf16":
            return Bf16MoeArgs(routing=routing, experts=experts, **tensors)
        case "fp8_per_tensor_scale":
            return Fp8PerTensorMoeArgs(
                routing=routing, experts=experts, to_format=to_format, **tensors
            )
        case "fp8_per_channel_scale":
            return Fp8PerChannelMoeArgs(routing=routing, experts=experts, **tensors)
        case "mxint4_block_scale":
            return MxInt4MoeArgs(routing=routing, experts=experts, **tensors)
        case "fp8_block_scale":
            kind: Literal["DeepSeekFp8", "MxFp8"] = "DeepSeekFp8" if deepseek else "MxFp8"
            return Fp8BlockMoeArgs(
                routing=routing,
                experts=experts,
                fp8_quantization_type=kind,
                to_format=to_format,
                **tensors,
            )
        case "fp4_block_scale":
            return Fp4MoeArgs(routing=routing, experts=experts, to_format=to_format, **tensors)
        case _:
            assert_never(family)


class _Operator(Protocol):
    def __call__(
        self,
        first: Tensor,
        second: Tensor | None,
        tensors: Sequence[Tensor | None],
        handle: int,
        hidden_size: int,
        copies: int,
        dtype: torch.dtype,
    ) -> Tensor: ...


def _operator(family: Family) -> _Operator:
    """`typed_moe::<family>_moe`, with its shape for tracing."""

    def launch(
        first: Tensor,
        second: Tensor | None,
        tensors: Sequence[Tensor | None],
        handle: int,
        hidden_size: int,
        copies: int,
        dtype: torch.dtype,
    ) -> Tensor:
        del hidden_size
        call = _calls[handle]
        # As the shape below says: a kernel with padded widths gives a part of a wider tensor.
        return call(call.record(family, first, second, tensors), copies, dtype).contiguous()

    def shape(
        first: Tensor,
        second: Tensor | None,
        tensors: Sequence[Tensor | None],
        handle: int,
        hidden_size: int,
        copies: int,
        dtype: torch.dtype,
    ) -> Tensor:
        del second, tensors, handle
        return first.new_empty((first.shape[0] // copies, hidden_size), dtype=dtype)

    return cast("_Operator", _define(f"{family}_moe", launch, shape))


class _UnfinalizedOperator(Protocol):
    def __call__(
        self,
        first: Tensor,
        second: Tensor | None,
        tensors: Sequence[Tensor | None],
        handle: int,
        hidden_size: int,
        copies: int,
        slots: int,
        rows_dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def _unfinalized_operator(family: Family) -> _UnfinalizedOperator:
    """`typed_moe::<family>_moe_unfinalized`; how many rows it gives is known when it has run."""

    def launch(
        first: Tensor,
        second: Tensor | None,
        tensors: Sequence[Tensor | None],
        handle: int,
        hidden_size: int,
        copies: int,
        slots: int,
        rows_dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del hidden_size, slots, rows_dtype, weights_dtype
        call = _calls[handle]
        made = call.unfinalized(call.record(family, first, second, tensors), copies)
        # A copy: precomputed weights come back as they were given, and an operator may not do that.
        weights = made.expert_weights.clone()
        return made.gemm2_output, weights, made.expanded_idx_to_permuted_idx

    def shape(
        first: Tensor,
        second: Tensor | None,
        tensors: Sequence[Tensor | None],
        handle: int,
        hidden_size: int,
        copies: int,
        slots: int,
        rows_dtype: torch.dtype,
        weights_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del second, tensors, handle
        # The padding follows the tile, which the autotuner chooses at the call.
        rows, tokens = torch.library.get_ctx().new_dynamic_size(), first.shape[0] // copies
        return (
            first.new_empty((rows, hidden_size), dtype=rows_dtype),
            first.new_empty((tokens, slots), dtype=weights_dtype),
            first.new_empty((tokens, slots), dtype=torch.int32),
        )

    return cast("_UnfinalizedOperator", _define(f"{family}_moe_unfinalized", launch, shape))


def _define(
    name: str,
    launch: _Operator | _UnfinalizedOperator,
    shape: _Operator | _UnfinalizedOperator,
) -> object:
    """`typed_moe::<name>`, with its shape for tracing."""
    qualified = f"typed_moe::{name}"
    torch.library.define(qualified, torch.library.infer_schema(launch, mutates_args=()))
    torch.library.impl(qualified, "CompositeExplicitAutograd", launch)
    torch.library.register_fake(qualified, shape)
    return getattr(torch.ops.typed_moe, name).default


_operators: dict[Family, _Operator] = {}
"""Of the families that a runner was made for: registering one takes 20 ms."""
_unfinalized_operators: dict[Family, _UnfinalizedOperator] = {}
