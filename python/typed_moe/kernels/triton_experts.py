"""The experts in Triton, for CUDA cards from compute capability 8.0 on.

Four to six launches for a layer from logits (routing and sorting in one to three, the first product with
its activation, the second, the weighted sum), and up to two more for what a format quantises, without a
host synchronisation and without atomics. Triton is imported at the first call, not before.

Shapes: T tokens, H hidden size, I intermediate size of this rank, k slots per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cache
from types import MappingProxyType
from typing import Literal, Protocol, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import Format, Fp8BlockScale, Fp8PerTensor, MxFp4, MxFp8, Nvfp4, Unquantized
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels._expert_operands import Operands, Outputs, Slots
from typed_moe.kernels._expert_tiles import (
    ExpertTile,
    Operand,
    Table,
    table_of,
    tile_of,
    tile_refusal,
)
from typed_moe.kernels._fused_rules import FUSED_RULES, MAX_EXPERTS, RouteSettings, route_settings
from typed_moe.kernels._protocol import KernelRequest
from typed_moe.kernels._quantizing import Quantizing
from typed_moe.kernels._slots import SortedSlots, SortRequest
from typed_moe.kernels._tile_file import own_table, tile_file, tile_file_refusal
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import (
    Bf16MoeArgs,
    ExpertArgs,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerTensorMoeArgs,
    FromLogits,
    MoeArgs,
    Precomputed,
    Routing,
    to_format_of,
)
from typed_moe.kernels.fused_routing import fused_routing_refusal, sort_slots
from typed_moe.kernels.reference import append_shared
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.quantization import Quantized, quantize_activation
from typed_moe.routing import (
    InKernel,
    KernelRules,
    PrecomputedRules,
    Refused,
    RoutingShape,
    Tier,
    as_global_ids,
)

_MULTIPLE_FP8_BLOCK = 128
_MULTIPLES: Mapping[str, int] = MappingProxyType(
    {
        "bf16": 8,
        "unquantized": 8,
        "fp8_per_tensor": 16,
        "fp8_block": _MULTIPLE_FP8_BLOCK,
        "mxfp8": 32,
        "mxfp4": 32,
        "nvfp4": 16,
    }
)
"""Of both widths, by format: 16 bytes in a row, and whole groups that share a scale."""
_NATIVE_FP8 = (8, 9)
_MOST_BESIDE = 128
"""Tokens up to which activations are quantised beside routing, by programs of its few warps."""
_LEAST_STEP: Mapping[str, int] = MappingProxyType({"mxfp8": 32, "mxfp4": 64, "nvfp4": 64})
"""Values of the sum: sixteen elements of two bytes, as a matrix unit takes them."""

TRITON_RULES = KernelRules(
    kernel="triton",
    methods=MappingProxyType(dict(FUSED_RULES.methods)),
    weight_on_input=True,
    source="typed_moe.kernels.triton_experts",
    precomputed=PrecomputedRules(tiers=(Tier(max_experts=MAX_EXPERTS, max_top_k=MAX_EXPERTS),)),
)
"""What the Triton kernels route by themselves: what the fused routing kernel does."""


@final
@attrs.frozen(kw_only=True)
class TritonKernel:
    """Portable expert kernels: every record but `MxInt4MoeArgs` and `Fp8PerChannelMoeArgs`.

    Attributes:
        fp8: how float8_e4m3fn with float32 scales is multiplied: "native" by the card's FP8 matrix
            units (compute capability 8.9 and above), "bits" as bfloat16 after a conversion in
            registers, with the intermediate in bfloat16. None: "native" where the card can. MX and FP4
            weights always become bfloat16 in registers; for them it is refused.
        tile: for every call, whatever its size; None takes the card's from the table, or from the
            file of `typed-moe tune` that TYPED_MOE_TILES names.
    """

    fp8: Literal["native", "bits"] | None = None
    tile: ExpertTile | None = None

    @property
    def name(self) -> str:
        """`triton`."""
        return "triton"

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """Formats, widths and cards that it serves; every activation, bias and routing method."""
        absent = fused_routing_refusal(request.device)
        if absent is not None:
            return absent
        reason = _format_refusal(request) or self._card_refusal(request) or _shared_refusal(request)
        return TRITON_RULES if reason is None else Refused(reason)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As they are: gate rows first, scales row-major.

        Raises:
            ValueError: a tensor's values do not lie row by row, as after a transposition.
        """
        del request
        for field in fields(weights):
            name, value = field.name, getattr(weights, field.name)
            if isinstance(value, Tensor) and not value.is_contiguous():
                raise ValueError(
                    f"{name} {tuple(value.shape)} has strides {value.stride()}; the Triton kernels "
                    f"read it row by row. Pass {name}.contiguous()"
                )
        return weights

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """(T, H) bfloat16: the sum over this rank's experts of weight * expert(x).

        Raises:
            TypeError: a record of another family, or of another dtype.
        """
        operands, tile, slots = self._placed(args)
        launch = _launch()
        return launch.combine(launch.rows(operands, slots, args.experts, tile), slots, args.output)

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        """bfloat16 rows with float32 weights."""
        del request, routing
        return UnfinalizedRules(rows_dtype=torch.bfloat16, weights_dtype=torch.float32)

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        """T * k rows, one per slot; those of no local expert are undefined."""
        operands, tile, slots = self._placed(args)
        moved = slots.ids - slots.sorted.first_local
        is_local = (moved >= 0) & (moved < slots.sorted.counts.shape[0])
        number = torch.arange(slots.ids.numel(), dtype=torch.int32, device=slots.ids.device)
        weights = torch.ones_like(slots.weights) if slots.on_input else slots.weights
        return Unfinalized(
            gemm2_output=_launch().rows(operands, slots, args.experts, tile),
            expert_weights=weights.float(),
            expanded_idx_to_permuted_idx=torch.where(is_local, number.view(slots.ids.shape), -1),
        )

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        """`quantize_activation` in one launch, on cards that convert to float8_e4m3fn; itself on others."""
        made = _quantizing(hidden_states, quant, input_scale)
        if made is None:
            return quantize_activation(hidden_states, quant, input_scale=input_scale)
        _inputs_launch().quantize(made)
        whole = None if made.given is None else made.given.reshape(())
        if isinstance(quant, Fp8PerTensor):
            return Quantized(data=made.out, scale=whole)
        return Quantized(data=made.out, scale=made.scale, global_scale=whole)

    def _fp8(self, hidden_states: Tensor) -> Literal["native", "bits"]:
        return self.fp8 or ("native" if _has_fp8(hidden_states.device) else "bits")

    def _operands(self, args: MoeArgs) -> Operands:
        match args:
            case Bf16MoeArgs(hidden_states=x) if x.dtype is torch.bfloat16:
                return Operands(
                    hidden=_rows(x), first=args.gemm1_weights, second=args.gemm2_weights
                )
            case Fp8BlockMoeArgs(fp8_quantization_type="DeepSeekFp8"):
                return Operands(
                    hidden=_rows(args.hidden_states),
                    hidden_scale=args.hidden_states_scale,
                    first=args.gemm1_weights,
                    first_scale=args.gemm1_weights_scale,
                    second=args.gemm2_weights,
                    second_scale=args.gemm2_weights_scale,
                    fp8=self._fp8(args.hidden_states),
                    scales="block",
                )
            case Fp8PerTensorMoeArgs():
                return Operands(
                    hidden=_rows(args.hidden_states),
                    first=args.gemm1_weights,
                    second=args.gemm2_weights,
                    fp8=self._fp8(args.hidden_states),
                    outputs=Outputs(
                        first=args.output1_scales_gate_scalar,
                        stored=args.output1_scales_scalar,
                        second=args.output2_scales_scalar,
                    ),
                )
            case Fp8BlockMoeArgs():
                return _grouped(args, "mxfp8")
            case Fp4MoeArgs():
                return _grouped(args, "mxfp4" if args.output2_scale_scalar is None else "nvfp4")
            case _:
                raise TypeError(
                    "the Triton kernels take every record but MxInt4MoeArgs and "
                    f"Fp8PerChannelMoeArgs, and Bf16MoeArgs in bfloat16; this is "
                    f"{type(args).__name__} with {args.hidden_states.dtype} hidden_states. "
                    "TritonKernel().rules says so before a call"
                )

    def _placed(self, args: MoeArgs) -> tuple[Operands, ExpertTile, Slots]:
        """The record's matrices in their format, the tile for the call's size, its slots in blocks of it."""
        operands, experts = self._operands(args), args.experts
        tile = self._tile(args, operands)
        request = SortRequest(
            first_local=experts.local_expert_offset,
            num_local=experts.local_num_experts + experts.num_fused_shared_experts,
            block_size=tile.block_m,
        )
        to = to_format_of(args)
        if to is None:
            return operands, tile, routed_slots(args.routing, experts, request)
        pack = operands.pack if operands.group else 0
        made = _quantizing(operands.hidden, to.quant, to.input_scale, pack)
        if made is None:
            x = quantize_activation(operands.hidden, to.quant, input_scale=to.input_scale)
            scale = _as_recorded(x.scale, to.quant)
            operands = attrs.evolve(operands, hidden=x.data, hidden_scale=scale)
            return operands, tile, routed_slots(args.routing, experts, request)
        scale = _as_recorded(made.scale, to.quant)
        operands = attrs.evolve(operands, hidden=made.out, hidden_scale=scale, in_parts=pack > 0)
        if isinstance(args.routing, FromLogits) and made.x.shape[0] <= _MOST_BESIDE:
            return operands, tile, routed_slots(args.routing, experts, request, made)
        _inputs_launch().quantize(made)
        return operands, tile, routed_slots(args.routing, experts, request)

    def _tile(self, args: MoeArgs, operands: Operands) -> ExpertTile:
        """For the call's size."""
        if self.tile is not None:
            return self.tile
        experts, shared = args.experts, args.experts.num_fused_shared_experts
        slots = operands.hidden.shape[0] * (experts.top_k + shared)
        if isinstance(args.routing, Precomputed):
            slots = args.routing.topk_ids.numel()
        table = _table(operands.hidden.device, _operand(operands), operands.second.shape[1])
        return tile_of(table, slots / (experts.num_experts + shared))

    def _card_refusal(self, request: KernelRequest) -> str | None:
        if self.tile is not None:
            wrong = tile_refusal(
                self.tile,
                blocks=isinstance(request.quant, Fp8BlockScale),
                grouped=isinstance(request.quant, MxFp8 | MxFp4 | Nvfp4),
            )
            if wrong is not None:
                return wrong
        if isinstance(request.quant, MxFp8 | MxFp4 | Nvfp4):
            wrong = self._grouped_refusal(request.quant.name)
            if wrong is not None:
                return wrong
        if self.tile is None and tile_file() is not None:
            wrong = tile_file_refusal(_card(request.device))
            if wrong is not None:
                return wrong
        if self.fp8 == "native" and not _has_fp8(request.device):
            return (
                "fp8='native' asks for FP8 matrix units, which start at compute capability "
                f"{_NATIVE_FP8[0]}.{_NATIVE_FP8[1]}; leave it out"
            )
        return None

    def _grouped_refusal(self, name: str) -> str | None:
        """Settings that say nothing of weights with a scale for every few values, or do not fit them."""
        if self.fp8 is not None:
            return (
                f"fp8={self.fp8!r} says how FP8 with float32 scales is multiplied; {name} becomes "
                "bfloat16 in registers on every card; leave it out"
            )
        tile = self.tile
        least = _LEAST_STEP[name]
        if tile is not None and min(tile.first.block_k, tile.second.block_k) < least:
            return (
                f"the tile's block_k are {tile.first.block_k} and {tile.second.block_k}; allowed in "
                f"{name}: {least} and above, sixteen elements of two bytes"
            )
        return None


def _format_refusal(request: KernelRequest) -> str | None:
    quant = request.quant
    multiple = _MULTIPLES.get(quant.name)
    if multiple is None:
        served = ", ".join(_MULTIPLES)
        return f"multiplies {served}; this layer's format is {quant.name}"
    if isinstance(quant, Unquantized) and request.dtype is not torch.bfloat16:
        return (
            f"multiplies unquantised weights in torch.bfloat16; this layer's are "
            f"{request.dtype}; pass dtype=torch.bfloat16"
        )
    width = request.placement.local_intermediate_size(request.intermediate_size)
    if request.hidden_size % multiple or width % multiple:
        return (
            f"takes widths in multiples of {multiple} in the format {quant.name}; this layer has "
            f"hidden_size {request.hidden_size} and, on this rank, intermediate_size {width}"
        )
    return None


def _shared_refusal(request: KernelRequest) -> str | None:
    if request.num_fused_shared_experts and request.placement.ep_size > 1:
        return (
            "fused shared experts are held by every rank, so with ep_size = "
            f"{request.placement.ep_size} they would be added once per rank; run them unfused"
        )
    return None


def _grouped(
    args: Fp8BlockMoeArgs | Fp4MoeArgs, scales: Literal["mxfp8", "mxfp4", "nvfp4"]
) -> Operands:
    """A record whose weights have a scale for every few values of the sum."""
    scale = args.hidden_states_scale
    return Operands(
        hidden=_rows(args.hidden_states),
        hidden_scale=None if scale is None else _rows(scale),
        first=args.gemm1_weights,
        first_scale=args.gemm1_weights_scale,
        second=args.gemm2_weights,
        second_scale=args.gemm2_weights_scale,
        scales=scales,
        outputs=_fp4_outputs(args) if isinstance(args, Fp4MoeArgs) else None,
    )


def _fp4_outputs(args: Fp4MoeArgs) -> Outputs | None:
    """The output scales of NVFP4; MXFP4 has none."""
    first, stored = args.output1_scale_gate_scalar, args.output1_scale_scalar
    second = args.output2_scale_scalar
    if first is None or stored is None or second is None:
        return None
    return Outputs(first=first, stored=stored, second=second)


def _operand(operands: Operands) -> Operand:
    """Whose tiles are meant."""
    if operands.group:
        return "mxfp8" if operands.scales == "mxfp8" else "fp4"
    return "bf16" if operands.fp8 == "none" else "fp8"


def quantized_record(args: MoeArgs) -> MoeArgs:
    """The record with its activations in the format."""
    to = to_format_of(args)
    if to is None:
        return args
    x = TritonKernel().quantize(args.hidden_states, to.quant, input_scale=to.input_scale)
    match args:
        case Fp8PerTensorMoeArgs():
            return replace(args, hidden_states=x.data, to_format=None)
        case Fp8BlockMoeArgs() | Fp4MoeArgs():
            scale = _as_recorded(x.scale, to.quant)
            return replace(args, hidden_states=x.data, hidden_states_scale=scale, to_format=None)
        case _:
            return args


def _as_recorded(scale: Tensor | None, quant: Format) -> Tensor | None:
    """An activation's scales as records have them: a whole tensor's is in the output scales."""
    if isinstance(quant, Fp8PerTensor):
        return None
    return scale.T if scale is not None and isinstance(quant, Fp8BlockScale) else scale


def _quantizing(
    x: Tensor, quant: Format, input_scale: Tensor | None, pack: int = 0
) -> Quantizing | None:
    """What a launch has to do, or None where PyTorch quantises: as on cards without float8_e4m3fn.

    `pack`: of weights that read activations in parts.
    """
    multiple = _MULTIPLES.get(quant.name, 0)
    fits = x.dim() == 2 and x.is_floating_point() and multiple and x.shape[1] % multiple == 0
    if not fits or x.shape[0] == 0 or not _has_fp8(x.device):
        return None
    x = _rows(x)
    # That of a layer is float32 already.
    whole = None if input_scale is None or input_scale.numel() != 1 else input_scale.float()
    (tokens, width), fp8 = x.shape, torch.float8_e4m3fn

    def empty(columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty((tokens, columns), dtype=dtype, device=x.device)

    wide = empty(width, torch.bfloat16) if pack else None
    match quant:
        case Fp8BlockScale():
            scale = empty(width // 128, torch.float32)
            return Quantizing(form="block", x=x, out=empty(width, fp8), scale=scale)
        case Fp8PerTensor() if whole is not None:
            return Quantizing(form="tensor", x=x, given=whole, out=empty(width, fp8))
        case MxFp8() | MxFp4(activation="mxfp8"):
            if wide is not None:
                return Quantizing(form="mxfp8", x=x, out=wide, pack=pack)
            scale = empty(width // 32, torch.uint8)
            return Quantizing(form="mxfp8", x=x, out=empty(width, fp8), scale=scale)
        case Nvfp4() if whole is not None:
            if wide is not None:
                return Quantizing(form="nvfp4", x=x, given=whole, out=wide, pack=pack)
            out, scale = empty(width // 2, torch.uint8), empty(width // 16, fp8)
            return Quantizing(form="nvfp4", x=x, given=whole, out=out, scale=scale)
        case MxFp4() if wide is not None and x.dtype is torch.bfloat16:
            return Quantizing(form="parts", x=x, out=wide, pack=pack)
        case _:
            return None


def _rows(x: Tensor) -> Tensor:
    """Rows of adjacent values, whatever lies between two rows."""
    return x if x.stride(1) == 1 else x.contiguous()


def routed_slots(
    routing: Routing,
    experts: ExpertArgs,
    request: SortRequest,
    beside: Quantizing | None = None,
) -> Slots:
    """A record's routing, by the fused routing kernel or as given, sorted by expert.

    `beside`: what the fused routing kernel's launch quantises.
    """
    if isinstance(routing, Precomputed):
        assert beside is None, "nothing is routed beside it"
        return _sorted(routing, request, on_input=False)
    settings = _settings(
        routing.routing_method_type,
        routing.n_group,
        routing.topk_group,
        routing.group_score,
        routing.routed_scaling_factor,
        RoutingShape(num_experts=experts.num_experts, top_k=experts.top_k),
        norm_topk_prob=routing.norm_topk_prob,
    )
    shared, on_input = experts.num_fused_shared_experts, routing.use_routing_scales_on_input
    ids, weights, slots = _routing_launch().route(
        settings,
        routing.routing_logits,
        routing.routing_bias,
        None if shared else request,
        beside=beside,
    )
    if routing.routing_replay_out is not None:
        routing.routing_replay_out[: ids.shape[0]].copy_(ids)
    if slots is not None:
        return Slots(ids=ids, weights=weights, sorted=slots, on_input=on_input)
    chosen = Precomputed(topk_ids=as_global_ids(ids), topk_weights=weights)
    return _sorted(append_shared(chosen, experts.num_experts, shared), request, on_input=on_input)


def _sorted(routing: Precomputed, request: SortRequest, *, on_input: bool) -> Slots:
    ids = routing.topk_ids.to(torch.int32).contiguous()
    return Slots(
        ids=ids,
        weights=routing.topk_weights.contiguous(),
        sorted=sort_slots(ids, request),
        on_input=on_input,
    )


@cache
def _settings(
    method: str,
    n_group: int | None,
    topk_group: int | None,
    group_score: Literal["max", "top2_sum"],
    factor: float | None,
    shape: RoutingShape,
    *,
    norm_topk_prob: bool,
) -> RouteSettings:
    """The routing kernel's constants for a record's routing arguments."""
    told = InKernel(
        routing_method_type=method,
        n_group=n_group,
        topk_group=topk_group,
        group_score=group_score,
        routed_scaling_factor=factor,
        norm_topk_prob=norm_topk_prob,
        use_routing_scales_on_input=False,
        logits_dtypes=(torch.float32,),
    )
    settings = route_settings(told, shape)
    if isinstance(settings, Refused):
        raise UnsupportedRouting(settings.reason)
    return settings


@cache
def _table(device: torch.device, operand: Operand, hidden_size: int) -> Table:
    card = _card(device)
    return own_table(card, operand) or table_of(card, operand, hidden_size)


@cache
def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@cache
def _has_fp8(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _NATIVE_FP8


def combined(rows: Tensor, place: Tensor, slots: Slots, output: Tensor | None) -> Tensor:
    """(T, H) bfloat16: the weighted sum over each token's slots of rows that stand by place."""
    return _launch().combine(rows, slots, output, place)


class _Launch(Protocol):
    """`typed_moe.kernels._triton_experts_launch`, which is imported late."""

    def rows(
        self, operands: Operands, slots: Slots, experts: ExpertArgs, tile: ExpertTile
    ) -> Tensor: ...

    def combine(
        self, rows: Tensor, slots: Slots, output: Tensor | None, place: Tensor | None = None
    ) -> Tensor: ...


def _launch() -> _Launch:
    from typed_moe.kernels import _triton_experts_launch  # noqa: PLC0415 - heavy

    return _triton_experts_launch


class _InputsLaunch(Protocol):
    """`typed_moe.kernels._triton_inputs_launch`, which is imported late."""

    def quantize(self, quantizing: Quantizing) -> None: ...


def _inputs_launch() -> _InputsLaunch:
    from typed_moe.kernels import _triton_inputs_launch  # noqa: PLC0415 - heavy

    return _triton_inputs_launch


class _RoutingLaunch(Protocol):
    """`typed_moe.kernels._triton_launch`, which is imported late."""

    def route(
        self,
        settings: RouteSettings,
        logits: Tensor,
        bias: Tensor | None,
        sort: SortRequest | None,
        *,
        beside: Quantizing | None = None,
    ) -> tuple[Tensor, Tensor, SortedSlots | None]: ...


def _routing_launch() -> _RoutingLaunch:
    from typed_moe.kernels import _triton_launch  # noqa: PLC0415 - heavy

    return _triton_launch
