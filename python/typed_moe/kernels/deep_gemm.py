"""The experts with DeepGEMM's grouped products, for Hopper cards where it is installed.

Routing, sort, gather, activation, quantisation and sum are this package's launches; the two products are
the library's: `m_grouped_fp8_gemm_nt_contiguous` for blocks of 128 x 128, and
`m_grouped_bf16_gemm_nt_contiguous`. Eight to ten launches for a layer from logits, without a host
synchronisation and without atomics. DeepGEMM compiles its kernels at the first call of a size.

Source: https://github.com/deepseek-ai/DeepGEMM, csrc/apis/gemm.hpp; SGLang's branch is sgl-deep-gemm.

Shapes: T tokens, H hidden size, I intermediate size of this rank, k slots per token, P places.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Protocol, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import Bf16, Format, Fp8BlockScale, Unquantized
from typed_moe.kernels._deep_gemm_library import DeepGemmLibrary
from typed_moe.kernels._expert_operands import Slots
from typed_moe.kernels._protocol import KernelRequest
from typed_moe.kernels._slots import SortRequest
from typed_moe.kernels._unfinalized import Unfinalized, UnfinalizedRules
from typed_moe.kernels.args import (
    Bf16MoeArgs,
    ExpertArgs,
    Fp8BlockMoeArgs,
    MoeArgs,
    Routing,
    given_scale,
)
from typed_moe.kernels.triton_experts import (
    TRITON_RULES,
    TritonKernel,
    combined,
    quantized_record,
    routed_slots,
)
from typed_moe.kernels.weights import ExpertWeights
from typed_moe.quantization import Quantized
from typed_moe.routing import KernelRules, Refused

_NAME = "deep_gemm"
_MULTIPLES = {"bf16": 64, "unquantized": 64, "fp8_block": 128}
"""Of both widths: a step of the product, and whole groups that share a scale."""
_ALIGNED = 16
"""Bytes: where a matrix has to start that the card copies by itself."""

DEEP_GEMM_RULES = attrs.evolve(TRITON_RULES, kernel=_NAME, source="typed_moe.kernels.deep_gemm")
"""What routes is the same as for the Triton kernels."""


@final
@attrs.frozen(kw_only=True)
class DeepGemmKernel:
    """DeepGEMM's grouped products, in bfloat16 and FP8 blocks, on compute capability 9.0.

    Attributes:
        library: the products; None takes the installed `deep_gemm`.
    """

    library: DeepGemmLibrary | None = None

    @property
    def name(self) -> str:
        """`deep_gemm`."""
        return _NAME

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """The formats, widths and cards of its products; every activation and routing method."""
        refused = layer_refusal(request)
        if refused is not None:
            return refused
        library = self.library or installed_deep_gemm()
        if isinstance(library, Refused):
            return library
        refused = library.refuses(request.device)
        if refused is not None:
            return refused
        routes = TritonKernel().rules(request)
        return routes if isinstance(routes, Refused) else DEEP_GEMM_RULES

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As they are: gate rows first, scales row-major.

        Raises:
            ValueError: a tensor's values do not lie row by row, or do not start on 16 bytes.
        """
        weights = TritonKernel().prepare(weights, request)
        for name in ("w13_weight", "w2_weight"):
            tensor: Tensor = getattr(weights, name)
            if tensor.data_ptr() % _ALIGNED:
                raise ValueError(
                    f"{name} starts at an address that is no multiple of {_ALIGNED} bytes, which "
                    f"DeepGEMM's copies need; pass {name}.clone()"
                )
        return weights

    def __call__(self, args: MoeArgs, /) -> Tensor:
        """(T, H) bfloat16: the sum over this rank's experts of weight * expert(x).

        Raises:
            TypeError: a record of another family, or of another dtype.
        """
        rows, place, slots = self._rows(args)
        return combined(rows, place, slots, args.output)

    def unfinalized_rules(
        self, request: KernelRequest, routing: type[Routing]
    ) -> UnfinalizedRules | Refused:
        """bfloat16 rows with float32 weights."""
        del request, routing
        return UnfinalizedRules(rows_dtype=torch.bfloat16, weights_dtype=torch.float32)

    def unfinalized(self, args: MoeArgs, /) -> Unfinalized:
        """P rows, by place; those of no slot are undefined."""
        rows, place, slots = self._rows(args)
        moved = slots.ids - slots.sorted.first_local
        is_local = (moved >= 0) & (moved < slots.sorted.counts.shape[0])
        weights = torch.ones_like(slots.weights) if slots.on_input else slots.weights
        return Unfinalized(
            gemm2_output=rows,
            expert_weights=weights.float(),
            expanded_idx_to_permuted_idx=torch.where(is_local, place, -1),
        )

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        """See `TritonKernel.quantize`."""
        return TritonKernel().quantize(hidden_states, quant, input_scale=input_scale)

    def _rows(self, args: MoeArgs) -> tuple[Tensor, Tensor, Slots]:
        """The experts' outputs by place, the slots' places, and the slots."""
        library = self.library or installed_deep_gemm()
        assert not isinstance(library, Refused), "rules refuse a library that is not there"
        args, experts = quantized_record(args), args.experts
        request = SortRequest(
            first_local=experts.local_expert_offset,
            num_local=experts.local_num_experts + experts.num_fused_shared_experts,
            block_size=library.alignment(),
        )
        slots = routed_slots(args.routing, experts, request)
        match args:
            case Bf16MoeArgs(hidden_states=x) if x.dtype is torch.bfloat16:
                return *_bf16(library, args, slots), slots
            case Fp8BlockMoeArgs(fp8_quantization_type="DeepSeekFp8"):
                return *_fp8(library, args, slots), slots
            case _:
                raise TypeError(
                    "DeepGEMM's products take Bf16MoeArgs in bfloat16 and Fp8BlockMoeArgs of "
                    f"DeepSeekFp8; this is {type(args).__name__} with {args.hidden_states.dtype} "
                    "hidden_states. DeepGemmKernel().rules says so before a call"
                )


def _fp8(library: DeepGemmLibrary, args: Fp8BlockMoeArgs, slots: Slots) -> tuple[Tensor, Tensor]:
    launch = _launch()
    given = launch.gather(args.hidden_states, given_scale(args), slots)
    assert given.scale is not None, "it was given"
    first = _empty(given.rows, args.gemm1_weights)
    library.fp8(
        (given.rows, given.scale),
        (args.gemm1_weights, args.gemm1_weights_scale),
        first,
        given.group,
    )
    group, place = given.group, given.place
    # What was read is free for what is made next.
    del given
    hidden, scale = launch.activated(first, slots, args.experts, quantize=True)
    assert scale is not None, "it is quantised"
    del first
    out = _empty(hidden, args.gemm2_weights)
    library.fp8((hidden, scale), (args.gemm2_weights, args.gemm2_weights_scale), out, group)
    return out, place


def _bf16(library: DeepGemmLibrary, args: Bf16MoeArgs, slots: Slots) -> tuple[Tensor, Tensor]:
    launch = _launch()
    given = launch.gather(args.hidden_states, None, slots)
    first = _empty(given.rows, args.gemm1_weights)
    library.bf16(given.rows, args.gemm1_weights, first, given.group)
    group, place = given.group, given.place
    del given
    hidden, _ = launch.activated(first, slots, args.experts, quantize=False)
    del first
    out = _empty(hidden, args.gemm2_weights)
    library.bf16(hidden, args.gemm2_weights, out, group)
    return out, place


def _empty(rows: Tensor, weights: Tensor) -> Tensor:
    """(P, N) bfloat16 for rows (P, K) @ weights (L, N, K)^T."""
    size = (rows.shape[0], weights.shape[1])
    return torch.empty(size, dtype=torch.bfloat16, device=rows.device)


def layer_refusal(request: KernelRequest) -> Refused | None:
    """What its products cannot do for a layer, whatever is installed."""
    quant = request.quant
    if not isinstance(quant, Bf16 | Unquantized | Fp8BlockScale):
        served = ", ".join(_MULTIPLES)
        return Refused(f"multiplies {served}; this layer's format is {quant.name}")
    if isinstance(quant, Unquantized) and request.dtype is not torch.bfloat16:
        return Refused(
            f"multiplies unquantised weights in torch.bfloat16; this layer's are {request.dtype}; "
            "pass dtype=torch.bfloat16"
        )
    if request.has_bias:
        return Refused("adds no expert biases; this layer has them")
    multiple = _MULTIPLES[quant.name]
    width = request.placement.local_intermediate_size(request.intermediate_size)
    if request.hidden_size % multiple or width % multiple:
        return Refused(
            f"takes widths in multiples of {multiple} in the format {quant.name}; this layer has "
            f"hidden_size {request.hidden_size} and, on this rank, intermediate_size {width}"
        )
    return None


@cache
def installed_deep_gemm() -> DeepGemmLibrary | Refused:
    """The installed DeepGEMM, which is imported by this; or why there is none."""
    if find_spec("deep_gemm") is None:
        return Refused("is not installed; pip install sgl-deep-gemm")
    try:
        from typed_moe.kernels._deep_gemm import InstalledDeepGemm  # noqa: PLC0415 - heavy
    # A library built for another PyTorch fails in its own way: an OSError, an AssertionError, ...
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split()) or type(error).__name__
        return Refused(f"is installed and cannot be imported: {said[:300]}")
    return InstalledDeepGemm()


class _Places(Protocol):
    """`typed_moe.kernels._triton_places_launch.Places`."""

    @property
    def rows(self) -> Tensor: ...

    @property
    def scale(self) -> Tensor | None: ...

    @property
    def group(self) -> Tensor: ...

    @property
    def place(self) -> Tensor: ...


class _Launch(Protocol):
    """`typed_moe.kernels._triton_places_launch`, which is imported late."""

    def gather(self, x: Tensor, scale: Tensor | None, slots: Slots) -> _Places: ...

    def activated(
        self, first: Tensor, slots: Slots, experts: ExpertArgs, *, quantize: bool
    ) -> tuple[Tensor, Tensor | None]: ...


def _launch() -> _Launch:
    from typed_moe.kernels import _triton_places_launch  # noqa: PLC0415 - heavy

    return _triton_places_launch
