"""How the reference kernel reads each record: what a stored value is worth.

A record gives three things: a token's hidden state in float32, the first matrix's product in
physical units, and the second's, with the intermediate rounded as the format says in between.
"""

from __future__ import annotations

from typing import Protocol, assert_never, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import (
    Fp8BlockScale,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    MxInt4,
    Nvfp4,
)
from typed_moe.kernels.args import (
    Bf16MoeArgs,
    Fp4MoeArgs,
    Fp8BlockMoeArgs,
    Fp8PerChannelMoeArgs,
    Fp8PerTensorMoeArgs,
    MoeArgs,
    MxInt4MoeArgs,
    check_in_format,
    given_scale,
)
from typed_moe.quantization import (
    Quantized,
    dequantize_activation,
    dequantize_weight,
    quantize_activation,
)


class Numerics(Protocol):
    """**Protocol:** one record's stored values, as float32."""

    @property
    def hidden_size(self) -> int:
        """H."""
        ...

    def hidden_states(self, token: Tensor) -> Tensor:
        """(n, H) float32 rows of these tokens, in the units that `first` expects."""
        ...

    def first(self, x: Tensor, expert: int) -> Tensor:
        """(n, M) float32: the first matrix's product, in physical units."""
        ...

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        """(n, H) float32: the second matrix's product of the rounded intermediate."""
        ...


def numerics_of(args: MoeArgs) -> Numerics:
    """The reader of a record."""
    check_in_format(args)
    match args:
        case Bf16MoeArgs():
            return _Plain(args=args)
        case Fp8PerTensorMoeArgs():
            return _PerTensor(args=args)
        case Fp8PerChannelMoeArgs():
            return _PerChannel(args=args)
        case Fp8BlockMoeArgs():
            return _Block(args=args)
        case Fp4MoeArgs():
            return _Nvfp4(args=args) if args.output2_scale_scalar is not None else _Mxfp4(args=args)
        case MxInt4MoeArgs():
            return _Mxint4(args=args)
        case _:
            assert_never(args)


@final
@attrs.frozen(kw_only=True, eq=False)
class _Plain:
    args: Bf16MoeArgs

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        return self.args.hidden_states[token].float()

    def first(self, x: Tensor, expert: int) -> Tensor:
        return x @ self.args.gemm1_weights[expert].float().T

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        del gated
        rounded = hidden.to(self.args.hidden_states.dtype).float()
        return rounded @ self.args.gemm2_weights[expert].float().T


@final
@attrs.frozen(kw_only=True, eq=False)
class _PerTensor:
    args: Fp8PerTensorMoeArgs

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        return self.args.hidden_states[token].float()

    def first(self, x: Tensor, expert: int) -> Tensor:
        product = x @ self.args.gemm1_weights[expert].float().T
        return product * self.args.output1_scales_gate_scalar[expert]

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        args = self.args
        stored = hidden * _to_stored(
            args.output1_scales_scalar[expert], args.output1_scales_gate_scalar[expert], gated=gated
        )
        rounded = quantize_activation(
            stored, Fp8PerTensor(), input_scale=torch.ones((), device=stored.device)
        ).data.float()
        product = rounded @ args.gemm2_weights[expert].float().T
        return product * args.output2_scales_scalar[expert]


@final
@attrs.frozen(kw_only=True, eq=False)
class _PerChannel:
    args: Fp8PerChannelMoeArgs

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        stored = Quantized(
            data=self.args.hidden_states[token], scale=self.args.hidden_states_scale[token]
        )
        return dequantize_activation(stored, Fp8PerChannel())

    def first(self, x: Tensor, expert: int) -> Tensor:
        args = self.args
        weight = self._weight(args.gemm1_weights, args.gemm1_per_channel_weight_scale, expert)
        return (x @ weight.T) * args.output1_scale_gate_scalar[expert]

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        args, fmt = self.args, Fp8PerChannel()
        stored = hidden * _to_stored(
            args.output1_scale_scalar[expert], args.output1_scale_gate_scalar[expert], gated=gated
        )
        rounded = dequantize_activation(quantize_activation(stored, fmt), fmt)
        weight = self._weight(args.gemm2_weights, args.gemm2_per_channel_weight_scale, expert)
        return (rounded @ weight.T) * args.output2_scale_scalar[expert]

    def _weight(self, weights: Tensor, scales: Tensor, expert: int) -> Tensor:
        return dequantize_weight(
            Quantized(data=weights[expert], scale=scales[expert]), Fp8PerChannel()
        )


@final
@attrs.frozen(kw_only=True, eq=False)
class _Block:
    args: Fp8BlockMoeArgs

    @property
    def _format(self) -> Fp8BlockScale | MxFp8:
        return Fp8BlockScale() if self.args.fp8_quantization_type == "DeepSeekFp8" else MxFp8()

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        scale = given_scale(self.args)
        rows = scale.T if self.args.fp8_quantization_type == "DeepSeekFp8" else scale
        stored = Quantized(data=self.args.hidden_states[token], scale=rows[token])
        return dequantize_activation(stored, self._format)

    def first(self, x: Tensor, expert: int) -> Tensor:
        return x @ self._weight(self.args.gemm1_weights, self.args.gemm1_weights_scale, expert).T

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        del gated
        rounded = dequantize_activation(quantize_activation(hidden, self._format), self._format)
        weight = self._weight(self.args.gemm2_weights, self.args.gemm2_weights_scale, expert)
        return rounded @ weight.T

    def _weight(self, weights: Tensor, scales: Tensor, expert: int) -> Tensor:
        return dequantize_weight(
            Quantized(data=weights[expert], scale=scales[expert]), self._format
        )


@final
@attrs.frozen(kw_only=True, eq=False)
class _Nvfp4:
    args: Fp4MoeArgs

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        scale = self.args.hidden_states_scale
        assert scale is not None, "an NVFP4 record has block scales of the hidden states"
        return _nvfp4_without_global(self.args.hidden_states[token], scale[token])

    def first(self, x: Tensor, expert: int) -> Tensor:
        scale = self.args.output1_scale_gate_scalar
        assert scale is not None, "an NVFP4 record has output scales"
        product = x @ self._weight(self.args.gemm1_weights, self.args.gemm1_weights_scale, expert).T
        return product * scale[expert]

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        args = self.args
        assert args.output1_scale_scalar is not None, "an NVFP4 record has output scales"
        assert args.output1_scale_gate_scalar is not None, "an NVFP4 record has output scales"
        assert args.output2_scale_scalar is not None, "an NVFP4 record has output scales"
        stored = hidden * _to_stored(
            args.output1_scale_scalar[expert], args.output1_scale_gate_scalar[expert], gated=gated
        )
        one = torch.ones((), device=stored.device)
        rounded = dequantize_activation(
            quantize_activation(stored, Nvfp4(), input_scale=one), Nvfp4()
        )
        weight = self._weight(args.gemm2_weights, args.gemm2_weights_scale, expert)
        return (rounded @ weight.T) * args.output2_scale_scalar[expert]

    def _weight(self, weights: Tensor, scales: Tensor, expert: int) -> Tensor:
        return _nvfp4_without_global(weights[expert], scales[expert])


@final
@attrs.frozen(kw_only=True, eq=False)
class _Mxfp4:
    args: Fp4MoeArgs

    @property
    def _format(self) -> MxFp4:
        return MxFp4(activation="bf16" if self.args.hidden_states_scale is None else "mxfp8")

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        scale = self.args.hidden_states_scale
        stored = Quantized(
            data=self.args.hidden_states[token], scale=None if scale is None else scale[token]
        )
        return dequantize_activation(stored, self._format)

    def first(self, x: Tensor, expert: int) -> Tensor:
        return x @ self._weight(self.args.gemm1_weights, self.args.gemm1_weights_scale, expert).T

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        del gated
        rounded = dequantize_activation(quantize_activation(hidden, self._format), self._format)
        weight = self._weight(self.args.gemm2_weights, self.args.gemm2_weights_scale, expert)
        return rounded @ weight.T

    def _weight(self, weights: Tensor, scales: Tensor, expert: int) -> Tensor:
        return dequantize_weight(
            Quantized(data=weights[expert], scale=scales[expert]), self._format
        )


@final
@attrs.frozen(kw_only=True, eq=False)
class _Mxint4:
    args: MxInt4MoeArgs

    @property
    def hidden_size(self) -> int:
        return self.args.gemm2_weights.shape[1]

    def hidden_states(self, token: Tensor) -> Tensor:
        return self.args.hidden_states[token].float()

    def first(self, x: Tensor, expert: int) -> Tensor:
        return x @ self._weight(self.args.gemm1_weights, self.args.gemm1_weights_scale, expert).T

    def second(self, hidden: Tensor, expert: int, *, gated: bool) -> Tensor:
        del gated
        weight = self._weight(self.args.gemm2_weights, self.args.gemm2_weights_scale, expert)
        return hidden.to(torch.bfloat16).float() @ weight.T

    def _weight(self, weights: Tensor, scales: Tensor, expert: int) -> Tensor:
        return dequantize_weight(Quantized(data=weights[expert], scale=scales[expert]), MxInt4())


def _to_stored(output_scale: Tensor, gate_scale: Tensor, *, gated: bool) -> Tensor:
    """The factor from physical units to those in which the intermediate is stored.

    For a gated activation the record's output scale holds the first matrix's scale too.
    """
    return output_scale / gate_scale if gated else output_scale


def _nvfp4_without_global(data: Tensor, scale: Tensor) -> Tensor:
    """NVFP4 values with a per-tensor scale of 1; the record's output scales hold the real one."""
    one = torch.ones((), device=data.device)
    return dequantize_weight(Quantized(data=data, scale=scale, global_scale=one), Nvfp4())
