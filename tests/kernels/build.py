"""Argument records of random stored values, beside what the values are worth in float64.

Nothing here quantises with the package: stored bits are drawn, and `tests.quantization.grids`
says what they mean. An expert's first matrix has the gate's rows above the up projection's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import attrs
import torch
from torch import Tensor

from tests import oracle
from tests.quantization import grids
from typed_moe.kernels import (
    ActivationType,
    Bf16MoeArgs,
    ExpertArgs,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerChannelMoeArgs,
    Fp8PerTensorMoeArgs,
    FromLogits,
    MoeArgs,
    MxInt4MoeArgs,
    Precomputed,
    Routing,
)
from typed_moe.routing import as_global_ids

RecordName = Literal[
    "bf16",
    "fp8_per_tensor",
    "fp8_per_channel",
    "fp8_block",
    "mxfp8",
    "nvfp4",
    "mxfp4_bf16",
    "mxfp4_mxfp8",
    "mxint4",
]
KINDS: dict[oracle.Kind, ActivationType] = {
    "swiglu": "Swiglu",
    "swiglu_step": "SwigluStep",
    "geglu": "Geglu",
    "geglu_tanh": "GegluTanh",
    "relu2": "Relu2",
    "silu": "Silu",
    "gelu": "Gelu",
    "gelu_tanh": "GeluTanh",
}
"""FlashInfer's name of each of the oracle's activations."""

EXPERTS, HIDDEN, WIDTH, TOKENS = 6, 256, 128, 24


@attrs.frozen(kw_only=True)
class Sizes:
    """Of a record."""

    experts: int = EXPERTS
    hidden: int = HIDDEN
    width: int = WIDTH
    tokens: int = TOKENS
    top_k: int = 2


@attrs.frozen(kw_only=True, eq=False)
class Record:
    """A record without its routing, and the same layer for the oracle."""

    make: Callable[[Routing], MoeArgs]
    experts: oracle.Experts
    x: Tensor
    act: oracle.Act
    rounding: Callable[[Tensor], Tensor]


def expert_args(act: oracle.Act, size: Sizes) -> ExpertArgs:
    """The constant half of a record for a rank that holds every expert."""

    def vector(value: float | None) -> Tensor | None:
        return None if value is None else torch.full((size.experts,), value)

    return ExpertArgs(
        num_experts=size.experts,
        top_k=size.top_k,
        intermediate_size=size.width,
        local_expert_offset=0,
        local_num_experts=size.experts,
        activation_type=KINDS[act.kind],
        gemm1_alpha=vector(act.alpha),
        gemm1_beta=vector(act.beta),
        gemm1_clamp_limit=vector(act.limit),
    )


def precomputed(ids: Tensor, weights: Tensor) -> Precomputed:
    """Final routing."""
    return Precomputed(topk_ids=as_global_ids(ids.int()), topk_weights=weights.float())


def from_logits(logits: Tensor, method: str = "Renormalize", *, on_input: bool = False) -> Routing:
    """Routing by the kernel, for a method without settings."""
    return FromLogits(
        routing_logits=logits,
        routing_bias=None,
        n_group=None,
        topk_group=None,
        routed_scaling_factor=None,
        routing_method_type=method,
        use_routing_scales_on_input=on_input,
    )


def record(name: RecordName, act: oracle.Act, size: Sizes | None = None) -> Record:
    """A random record."""
    size = Sizes() if size is None else size
    makers: dict[RecordName, Callable[[oracle.Act, Sizes], Record]] = {
        "bf16": _bf16,
        "fp8_per_tensor": _per_tensor,
        "fp8_per_channel": _per_channel,
        "fp8_block": _block,
        "mxfp8": _mxfp8,
        "nvfp4": _nvfp4,
        "mxfp4_bf16": lambda wanted, of: _mxfp4(wanted, of, mx_activation=False),
        "mxfp4_mxfp8": lambda wanted, of: _mxfp4(wanted, of, mx_activation=True),
        "mxint4": _mxint4,
    }
    return makers[name](act, size)


def rows_of(act: oracle.Act, size: Sizes) -> int:
    """M: rows of the first matrix."""
    return 2 * size.width if act.gated else size.width


def _experts(first: Tensor, second: Tensor, act: oracle.Act) -> oracle.Experts:
    gate, up = first.chunk(2, dim=1) if act.gated else (None, first)
    return oracle.Experts(up=up, down=second, gate=gate)


def _bf16(act: oracle.Act, size: Sizes) -> Record:
    x = torch.randn(size.tokens, size.hidden).bfloat16()
    first = (torch.randn(size.experts, rows_of(act, size), size.hidden) / 8).bfloat16()
    second = (torch.randn(size.experts, size.hidden, size.width) / 8).bfloat16()
    return Record(
        make=lambda routing: Bf16MoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            gemm1_weights=first,
            gemm2_weights=second,
        ),
        experts=_experts(first.double(), second.double(), act),
        x=x.double(),
        act=act,
        rounding=lambda hidden: hidden.bfloat16().double(),
    )


def _fp8(*shape: int) -> Tensor:
    """Random float8_e4m3fn values."""
    return (torch.randn(*shape) * 64).clamp(-448, 448).to(torch.float8_e4m3fn)


def _scales(*shape: int) -> Tensor:
    """Float32 scales around 2^-9, which undo the size of `_fp8`."""
    return torch.exp2(torch.randn(*shape) - 9)


def _per_tensor(act: oracle.Act, size: Sizes) -> Record:
    x, x_scale, h_scale = _fp8(size.tokens, size.hidden), torch.tensor(0.011), torch.tensor(0.07)
    first, second = (
        _fp8(size.experts, rows_of(act, size), size.hidden),
        _fp8(size.experts, size.hidden, size.width),
    )
    s1, s2 = _scales(size.experts), _scales(size.experts)
    gate_scale = s1 * x_scale

    def rounding(hidden: Tensor) -> Tensor:
        return grids.nearest(hidden / h_scale.double(), grids.E4M3) * h_scale.double()

    return Record(
        make=lambda routing: Fp8PerTensorMoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            gemm1_weights=first,
            output1_scales_scalar=(gate_scale if act.gated else torch.ones(size.experts)) / h_scale,
            output1_scales_gate_scalar=gate_scale,
            gemm2_weights=second,
            output2_scales_scalar=s2 * h_scale,
        ),
        experts=_experts(
            first.double() * s1.double().view(-1, 1, 1),
            second.double() * s2.double().view(-1, 1, 1),
            act,
        ),
        x=x.double() * x_scale.double(),
        act=act,
        rounding=rounding,
    )


def _per_channel(act: oracle.Act, size: Sizes) -> Record:
    x, x_scale = _fp8(size.tokens, size.hidden), _scales(size.tokens, 1)
    first, second = (
        _fp8(size.experts, rows_of(act, size), size.hidden),
        _fp8(size.experts, size.hidden, size.width),
    )
    s1, s2 = _scales(size.experts, rows_of(act, size)), _scales(size.experts, size.hidden)
    e1, e2 = torch.rand(size.experts) + 0.5, torch.rand(size.experts) + 0.5

    def rounding(hidden: Tensor) -> Tensor:
        scale = hidden.abs().amax(dim=1, keepdim=True) / 448
        return grids.nearest(hidden / scale, grids.E4M3) * scale

    def worth(data: Tensor, rows: Tensor, whole: Tensor) -> Tensor:
        return data.double() * rows.double().unsqueeze(-1) * whole.double().view(-1, 1, 1)

    return Record(
        make=lambda routing: Fp8PerChannelMoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            hidden_states_scale=x_scale,
            gemm1_weights=first,
            gemm1_per_channel_weight_scale=s1,
            output1_scale_scalar=e1 if act.gated else torch.ones(size.experts),
            output1_scale_gate_scalar=e1,
            gemm2_weights=second,
            gemm2_per_channel_weight_scale=s2,
            output2_scale_scalar=e2,
        ),
        experts=_experts(worth(first, s1, e1), worth(second, s2, e2), act),
        x=x.double() * x_scale.double(),
        act=act,
        rounding=rounding,
    )


def _spread(scale: Tensor, rows: int, columns: int) -> Tensor:
    """One scale per block, as one per value; float64."""
    return scale.double().repeat_interleave(rows, dim=-2).repeat_interleave(columns, dim=-1)


def _block(act: oracle.Act, size: Sizes) -> Record:
    x, x_scale = _fp8(size.tokens, size.hidden), _scales(size.tokens, size.hidden // 128)
    first, second = (
        _fp8(size.experts, rows_of(act, size), size.hidden),
        _fp8(size.experts, size.hidden, size.width),
    )
    s1 = _scales(size.experts, rows_of(act, size) // 128, size.hidden // 128)
    s2 = _scales(size.experts, size.hidden // 128, size.width // 128)

    def rounding(hidden: Tensor) -> Tensor:
        groups = hidden.reshape(-1, 128)
        scale = groups.abs().amax(dim=1, keepdim=True) / 448
        return (grids.nearest(groups / scale, grids.E4M3) * scale).reshape(hidden.shape)

    return Record(
        make=lambda routing: Fp8BlockMoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            hidden_states_scale=x_scale.T,
            gemm1_weights=first,
            gemm1_weights_scale=s1,
            gemm2_weights=second,
            gemm2_weights_scale=s2,
            fp8_quantization_type="DeepSeekFp8",
        ),
        experts=_experts(
            first.double() * _spread(s1, 128, 128), second.double() * _spread(s2, 128, 128), act
        ),
        x=x.double() * _spread(x_scale, 1, 128),
        act=act,
        rounding=rounding,
    )


def _bytes(*shape: int) -> Tensor:
    """Random E8M0 scales around 2^-9."""
    return torch.randint(116, 121, shape, dtype=torch.uint8)


def round_mx(hidden: Tensor) -> Tensor:
    """To MXFP8: a power of two per 32 values, by the specification's floor rule."""
    groups = hidden.reshape(-1, 32)
    amax = groups.abs().amax(dim=1, keepdim=True)
    scale = torch.exp2(torch.floor(torch.log2(amax)) - 8)
    return (grids.nearest(groups / scale, grids.E4M3) * scale).reshape(hidden.shape)


def _mxfp8(act: oracle.Act, size: Sizes) -> Record:
    x, x_scale = _fp8(size.tokens, size.hidden), _bytes(size.tokens, size.hidden // 32)
    first, second = (
        _fp8(size.experts, rows_of(act, size), size.hidden),
        _fp8(size.experts, size.hidden, size.width),
    )
    s1 = _bytes(size.experts, rows_of(act, size), size.hidden // 32)
    s2 = _bytes(size.experts, size.hidden, size.width // 32)
    return Record(
        make=lambda routing: Fp8BlockMoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            hidden_states_scale=x_scale,
            gemm1_weights=first,
            gemm1_weights_scale=s1,
            gemm2_weights=second,
            gemm2_weights_scale=s2,
            fp8_quantization_type="MxFp8",
        ),
        experts=_experts(
            first.double() * _spread(grids.e8m0(s1), 1, 32),
            second.double() * _spread(grids.e8m0(s2), 1, 32),
            act,
        ),
        x=x.double() * _spread(grids.e8m0(x_scale), 1, 32),
        act=act,
        rounding=round_mx,
    )


def _packed(*shape: int) -> Tensor:
    """Random packed four-bit codes for values of this shape."""
    return torch.randint(0, 256, (*shape[:-1], shape[-1] // 2), dtype=torch.uint8)


def _nvfp4(act: oracle.Act, size: Sizes) -> Record:
    def small(*shape: int) -> Tensor:
        return (torch.rand(*shape) * 3 + 0.5).to(torch.float8_e4m3fn)

    x, x_scale = _packed(size.tokens, size.hidden), small(size.tokens, size.hidden // 16)
    first, second = (
        _packed(size.experts, rows_of(act, size), size.hidden),
        _packed(size.experts, size.hidden, size.width),
    )
    s1, s2 = (
        small(size.experts, rows_of(act, size), size.hidden // 16),
        small(size.experts, size.hidden, size.width // 16),
    )
    g1, g2 = _scales(size.experts) * 4, _scales(size.experts) * 4
    gx, gh = torch.tensor(0.013), torch.tensor(0.0021)
    gate_scale = g1 * gx

    def rounding(hidden: Tensor) -> Tensor:
        groups = hidden.reshape(-1, 16) / gh.double()
        wanted = (groups.abs().amax(dim=1, keepdim=True) / 6).clamp(min=2.0**-9)
        scale = grids.nearest(wanted, grids.E4M3)
        stored = grids.nearest(groups / scale, grids.E2M1) * scale
        return (stored * gh.double()).reshape(hidden.shape)

    def worth(data: Tensor, scale: Tensor, second_scale: Tensor) -> Tensor:
        return grids.e2m1(data) * _spread(scale, 1, 16) * second_scale.double()

    return Record(
        make=lambda routing: Fp4MoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            hidden_states_scale=x_scale,
            gemm1_weights=first,
            gemm1_weights_scale=s1,
            gemm2_weights=second,
            gemm2_weights_scale=s2,
            output1_scale_scalar=(gate_scale if act.gated else torch.ones(size.experts)) / gh,
            output1_scale_gate_scalar=gate_scale,
            output2_scale_scalar=g2 * gh,
        ),
        experts=_experts(
            worth(first, s1, g1.view(-1, 1, 1)), worth(second, s2, g2.view(-1, 1, 1)), act
        ),
        x=worth(x, x_scale, gx),
        act=act,
        rounding=rounding,
    )


def _mxfp4(act: oracle.Act, size: Sizes, *, mx_activation: bool) -> Record:
    x_fp8, x_scale = _fp8(size.tokens, size.hidden), _bytes(size.tokens, size.hidden // 32)
    x_bf16 = torch.randn(size.tokens, size.hidden).bfloat16()
    first, second = (
        _packed(size.experts, rows_of(act, size), size.hidden),
        _packed(size.experts, size.hidden, size.width),
    )
    s1 = _bytes(size.experts, rows_of(act, size), size.hidden // 32) + 5
    s2 = _bytes(size.experts, size.hidden, size.width // 32) + 5
    worth_x = x_fp8.double() * _spread(grids.e8m0(x_scale), 1, 32)
    return Record(
        make=lambda routing: Fp4MoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x_fp8 if mx_activation else x_bf16,
            hidden_states_scale=x_scale if mx_activation else None,
            gemm1_weights=first,
            gemm1_weights_scale=s1,
            gemm2_weights=second,
            gemm2_weights_scale=s2,
            output1_scale_scalar=None,
            output1_scale_gate_scalar=None,
            output2_scale_scalar=None,
        ),
        experts=_experts(
            grids.e2m1(first) * _spread(grids.e8m0(s1), 1, 32),
            grids.e2m1(second) * _spread(grids.e8m0(s2), 1, 32),
            act,
        ),
        x=worth_x if mx_activation else x_bf16.double(),
        act=act,
        rounding=round_mx if mx_activation else lambda hidden: hidden.bfloat16().double(),
    )


def _mxint4(act: oracle.Act, size: Sizes) -> Record:
    x = torch.randn(size.tokens, size.hidden).bfloat16()
    first, second = (
        _packed(size.experts, rows_of(act, size), size.hidden),
        _packed(size.experts, size.hidden, size.width),
    )
    s1 = (torch.rand(size.experts, rows_of(act, size), size.hidden // 32) / 32 + 0.01).bfloat16()
    s2 = (torch.rand(size.experts, size.hidden, size.width // 32) / 32 + 0.01).bfloat16()
    return Record(
        make=lambda routing: MxInt4MoeArgs(
            routing=routing,
            experts=expert_args(act, size),
            hidden_states=x,
            gemm1_weights=first,
            gemm1_weights_scale=s1,
            gemm2_weights=second,
            gemm2_weights_scale=s2,
        ),
        experts=_experts(
            grids.int4(first) * _spread(s1, 1, 32), grids.int4(second) * _spread(s2, 1, 32), act
        ),
        x=x.double(),
        act=act,
        rounding=lambda hidden: hidden.bfloat16().double(),
    )
