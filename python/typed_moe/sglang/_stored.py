"""What SGLang's methods have loaded, as our runners take it, by checkpoint format."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Protocol, cast, final

import attrs
import torch
from torch import Tensor

from typed_moe.config import Bf16, Format, Fp8BlockScale, Fp8PerTensor, MxFp4, Nvfp4, Unquantized
from typed_moe.errors import CheckpointError, UnsupportedRouting
from typed_moe.kernels import ExpertWeights
from typed_moe.sglang._activation import is_interleaved
from typed_moe.sglang._seam import ConfigLike, QuantConfigLike, QuantMethodLike, SeamLayerLike

_QUANTIZATION = "sglang.srt.layers.quantization"


def checkpoint_method(
    given: QuantMethodLike | None,
    quant_config: QuantConfigLike | None,
    layer: SeamLayerLike,
    prefix: str,
) -> QuantMethodLike:
    """SGLang's own method for the layer, which knows the checkpoint's names and loaders.

    Raises:
        UnsupportedRouting: it makes a format that is not served.
    """
    method = given
    if method is None and quant_config is not None:
        method = nvfp4_method(quant_config, prefix) or quant_config.get_quant_method(layer, prefix)
    if method is None:
        unquantised = importlib.import_module(f"{_QUANTIZATION}.unquant")
        method = cast("QuantMethodLike", unquantised.UnquantizedFusedMoEMethod())
    if _class_name(method) not in FORMATS:
        raise UnsupportedRouting(
            f"{prefix}: the checkpoint is read by SGLang's {_class_name(method)}; typed-moe's runners "
            f"are there for {', '.join(sorted(FORMATS))}"
        )
    return method


def stored_format(method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike) -> Format:
    """The format of a layer's parameters.

    Raises:
        UnsupportedRouting: a variant that our runners are not there for.
    """
    return FORMATS[_class_name(method)].fmt(method, layer, config)


def stored_weights(
    method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike
) -> ExpertWeights:
    """A layer's loaded parameters. Those that a runner stores otherwise are written over.

    Raises:
        CheckpointError: a scale that is no scale.
    """
    if is_interleaved(config):
        for name in _FIRST:
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor):
                _gate_first(tensor, 2 * layer.intermediate_size_per_partition)
    return FORMATS[_class_name(method)].weights(layer)


_FIRST = ("w13_weight", "w13_weight_bias", "w13_weight_scale")


def _class_name(method: object) -> str:
    return type(method).__name__


def release_unused(layer: SeamLayerLike) -> None:
    """Let go of what a method has made for kernels of its own: NVFP4's scales once more, swizzled."""
    for name in ("w13_blockscale_swizzled", "w2_blockscale_swizzled"):
        if getattr(layer, name, None) is not None:
            setattr(layer, name, None)


@torch.no_grad()
def _gate_first(tensor: Tensor, rows: int) -> None:
    """Rows by turns into the gate's rows above the up projection's, expert by expert, in place.

    Args:
        tensor: (L, `rows` or more, ...); what is beyond is padding.
        rows: 2I.
    """
    for expert in tensor:
        real = expert[:rows]
        real.copy_(torch.cat((real[::2], real[1::2])))


# --- unquantised ---


def _plain_format(method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike) -> Format:
    del method, config
    return Bf16() if layer.w13_weight.dtype is torch.bfloat16 else Unquantized()


def _plain_weights(layer: SeamLayerLike) -> ExpertWeights:
    return ExpertWeights(w13_weight=layer.w13_weight, w2_weight=layer.w2_weight, **_biases(layer))


def _biases(layer: SeamLayerLike) -> dict[str, Tensor | None]:
    def bias(name: str) -> Tensor | None:
        # SGLang's MXFP4 method makes them, as zeros, for layers without, too.
        found: object = getattr(layer, name, None) if layer.with_bias else None
        return found.data.float() if isinstance(found, Tensor) else None

    return {"w13_bias": bias("w13_weight_bias"), "w2_bias": bias("w2_weight_bias")}


# --- FP8 ---


class _Fp8Config(Protocol):
    is_checkpoint_fp8_serialized: bool
    activation_scheme: str


class _Fp8Method(Protocol):
    quant_config: _Fp8Config
    block_quant: bool
    use_mxfp8: bool
    is_fp4_expert: bool
    weight_block_size: list[int] | None


def _fp8_format(method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike) -> Format:
    del layer, config
    fp8 = cast("_Fp8Method", method)
    settings = fp8.quant_config
    if not settings.is_checkpoint_fp8_serialized:
        raise UnsupportedRouting(
            "FP8 that SGLang makes of another checkpoint at start-up; allowed: an FP8 checkpoint"
        )
    if fp8.is_fp4_expert or fp8.use_mxfp8:
        raise UnsupportedRouting(
            "FP8 checkpoints with MXFP4 experts or MX groups; allowed: blocks of 128 x 128, or one "
            "scale per matrix"
        )
    if fp8.block_quant:
        block = list(fp8.weight_block_size or [])
        if block != [128, 128]:
            raise UnsupportedRouting(f"FP8 blocks of {block}; allowed: [128, 128]")
        return Fp8BlockScale()
    if settings.activation_scheme != "static":
        raise UnsupportedRouting(
            "FP8 with one scale per matrix and activations quantised per call; allowed: static "
            "activation scales in the checkpoint (input_scale), or blocks of 128 x 128"
        )
    return Fp8PerTensor()


def _fp8_weights(layer: SeamLayerLike) -> ExpertWeights:
    if hasattr(layer, "w13_weight_scale_inv"):
        tensors = cast("_BlockLayer", layer)
        return ExpertWeights(
            w13_weight=layer.w13_weight,
            w2_weight=layer.w2_weight,
            w13_scale=tensors.w13_weight_scale_inv,
            w2_scale=tensors.w2_weight_scale_inv,
            **_biases(layer),
        )
    return _per_tensor_weights(layer)


class _BlockLayer(Protocol):
    w13_weight_scale_inv: Tensor
    w2_weight_scale_inv: Tensor


class _PerTensorLayer(Protocol):
    w13_weight: Tensor
    w2_weight: Tensor
    w13_weight_scale: Tensor
    w2_weight_scale: Tensor
    w13_input_scale: Tensor
    w2_input_scale: Tensor


def _modelopt_fp8_format(
    method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike
) -> Format:
    del layer, config
    if not cast("_Fp8Method", method).quant_config.is_checkpoint_fp8_serialized:
        raise UnsupportedRouting(
            "FP8 that SGLang makes of another checkpoint at start-up; allowed: an FP8 checkpoint"
        )
    return Fp8PerTensor()


def _per_tensor_weights(layer: SeamLayerLike) -> ExpertWeights:
    tensors = cast("_PerTensorLayer", layer)
    for name in ("w13_weight_scale", "w2_weight_scale", "w13_input_scale", "w2_input_scale"):
        _check_scale(layer.layer_name, name, getattr(tensors, name))
    return ExpertWeights(
        w13_weight=tensors.w13_weight,
        w2_weight=tensors.w2_weight,
        w13_scale=_one_scale(tensors.w13_weight, tensors.w13_weight_scale),
        w2_scale=tensors.w2_weight_scale.data.float(),
        # One scale for all experts, the widest, as SGLang takes it: tokens are quantised once.
        w13_input_scale=tensors.w13_input_scale.data.float().amax(),
        w2_input_scale=tensors.w2_input_scale.data.float().amax(),
        **_biases(layer),
    )


def _check_scale(layer: str, name: str, scale: Tensor) -> None:
    values = scale.data.float()
    if not bool(((values > 0) & values.isfinite()).all()):
        raise CheckpointError(
            f"{layer}: {name} holds {values.min().item()} to {values.max().item()}; allowed: positive "
            "and finite. Is it in the checkpoint?"
        )


@torch.no_grad()
def _one_scale(weight: Tensor, scales: Tensor) -> Tensor:
    """(L,): gate and up under the larger of their scales; the other's values are quantised anew.

    Args:
        weight: (L, 2I, H), written to where the two differ.
        scales: (L, 2), or (L,) or (L, 1) without a gate.
    """
    if scales.dim() == 1 or scales.shape[1] == 1:
        return scales.data.float().flatten()
    widest = scales.data.float().amax(dim=1)
    rows = weight.shape[1] // 2
    for expert, halves in enumerate(scales.data.float().tolist()):
        for half, scale in enumerate(halves):
            if scale == widest[expert].item():
                continue
            part = weight.data[expert, half * rows : (half + 1) * rows]
            part.copy_((part.float() * (scale / widest[expert])).to(weight.dtype))
    return widest


# --- FP4 ---


class _Nvfp4Config(Protocol):
    is_checkpoint_nvfp4_serialized: bool
    is_w4a16: bool
    use_per_token_activation: bool
    group_size: int

    def is_layer_excluded(self, prefix: str) -> bool: ...


class _Nvfp4Method(Protocol):
    quant_config: _Nvfp4Config


def nvfp4_method(quant_config: QuantConfigLike, prefix: str) -> QuantMethodLike | None:
    """ModelOpt's NVFP4 method, for its parameters; None: the config's layers are another's.

    Its constructor asks for a GPU that its own kernels run on, so it is made without. What a
    constructor sets is set here: no layout of a kernel's.
    """
    if type(quant_config).__name__ != "ModelOptFp4Config":
        return None
    config = cast("_Nvfp4Config", quant_config)
    if config.is_layer_excluded(prefix):
        return None
    kind = importlib.import_module(f"{_QUANTIZATION}.modelopt_quant").ModelOptNvFp4FusedMoEMethod
    method: object = kind.__new__(kind)
    vars(method).update(
        quant_config=quant_config,
        enable_flashinfer_trtllm_moe=False,
        use_flashinfer_trtllm_weight_layout=False,
        _lora_marlin=False,
        _cache_permute_indices={},
    )
    return cast("QuantMethodLike", method)


def _nvfp4_format(method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike) -> Format:
    del layer, config
    settings = cast("_Nvfp4Method", method).quant_config
    if not settings.is_checkpoint_nvfp4_serialized:
        raise UnsupportedRouting(
            "NVFP4 that SGLang makes of another checkpoint at start-up; allowed: an NVFP4 checkpoint"
        )
    if settings.is_w4a16 or settings.use_per_token_activation or settings.group_size != 16:
        raise UnsupportedRouting(
            "NVFP4 with bfloat16 activations, a scale per token, or groups of "
            f"{settings.group_size}; allowed: groups of 16 and static activation scales"
        )
    return Nvfp4()


class _Nvfp4Layer(Protocol):
    w13_weight_scale: Tensor
    w2_weight_scale: Tensor
    w13_weight_scale_2: Tensor
    w2_weight_scale_2: Tensor
    w13_input_scale: Tensor
    w2_input_scale: Tensor


def _nvfp4_weights(layer: SeamLayerLike) -> ExpertWeights:
    tensors = cast("_Nvfp4Layer", layer)
    for name in ("w13_weight_scale_2", "w2_weight_scale_2", "w13_input_scale", "w2_input_scale"):
        _check_scale(layer.layer_name, name, getattr(tensors, name))
    halves = tensors.w13_weight_scale_2.data
    if halves.dim() == 2 and not torch.equal(halves[:, 0], halves[:, -1]):
        raise CheckpointError(
            f"{layer.layer_name}: gate_proj and up_proj have different weight_scale_2; allowed: the "
            "same, as ModelOpt stores experts"
        )
    return ExpertWeights(
        w13_weight=layer.w13_weight,
        w2_weight=layer.w2_weight,
        w13_scale=tensors.w13_weight_scale,
        w2_scale=tensors.w2_weight_scale,
        w13_scale_2=halves.reshape(halves.shape[0], -1)[:, 0].contiguous(),
        w2_scale_2=tensors.w2_weight_scale_2.data,
        w13_input_scale=tensors.w13_input_scale.data.float().amax(),
        w2_input_scale=tensors.w2_input_scale.data.float().amax(),
        **_biases(layer),
    )


def _mxfp4_format(method: QuantMethodLike, layer: SeamLayerLike, config: ConfigLike) -> Format:
    del method
    if config.is_gated and layer.intermediate_size_per_partition % 32 == 0:
        return MxFp4()
    raise UnsupportedRouting(
        f"MXFP4 of width {layer.intermediate_size_per_partition} "
        f"{'with' if config.is_gated else 'without'} a gate; allowed: a multiple of 32, with one"
    )


class _Mxfp4Layer(Protocol):
    w13_weight_scale: Tensor
    w2_weight_scale: Tensor


def _mxfp4_weights(layer: SeamLayerLike) -> ExpertWeights:
    """Without what SGLang has padded: the checkpoint's rows and columns come first."""
    tensors = cast("_Mxfp4Layer", layer)
    width, hidden = layer.intermediate_size_per_partition, layer.hidden_size
    biases = _biases(layer)
    first, second = biases["w13_bias"], biases["w2_bias"]
    return ExpertWeights(
        w13_weight=_part(layer.w13_weight, 2 * width, hidden // 2),
        w2_weight=_part(layer.w2_weight, hidden, width // 2),
        w13_scale=_part(tensors.w13_weight_scale, 2 * width, hidden // 32),
        w2_scale=_part(tensors.w2_weight_scale, hidden, width // 32),
        w13_bias=None if first is None else first[:, : 2 * width].contiguous(),
        w2_bias=None if second is None else second[:, :hidden].contiguous(),
    )


def _part(tensor: Tensor, rows: int, columns: int) -> Tensor:
    return tensor.data[:, :rows, :columns].contiguous()


@final
@attrs.frozen(kw_only=True)
class StoredFormat:
    """How one of SGLang's methods stores a layer.

    Attributes:
        fmt: the format, or the refusal of a variant.
        weights: the parameters.
    """

    fmt: Callable[[QuantMethodLike, SeamLayerLike, ConfigLike], Format]
    weights: Callable[[SeamLayerLike], ExpertWeights]


FORMATS: Mapping[str, StoredFormat] = MappingProxyType(
    {
        "UnquantizedFusedMoEMethod": StoredFormat(fmt=_plain_format, weights=_plain_weights),
        "Fp8MoEMethod": StoredFormat(fmt=_fp8_format, weights=_fp8_weights),
        "ModelOptFp8MoEMethod": StoredFormat(fmt=_modelopt_fp8_format, weights=_per_tensor_weights),
        "ModelOptNvFp4FusedMoEMethod": StoredFormat(fmt=_nvfp4_format, weights=_nvfp4_weights),
        "Mxfp4MoEMethod": StoredFormat(fmt=_mxfp4_format, weights=_mxfp4_weights),
    }
)
"""SGLang's methods whose checkpoints our runners serve, by class name."""
