"""FlashInfer's own PyTorch references in place of its kernels.

`flashinfer.trace.templates.moe` has, for most entry points, a plain implementation of the same call
that runs on a CPU. `ReferenceLibrary` binds each call to the real function's signature, undoes the
weight layouts with FlashInfer's helpers where a reference does not do it itself, and calls it.

What they cover (0.7.2.post1, read and run):

* From logits: FP8 blocks and FP4, methods 0 to 5. Their TopK weighs every slot with 1 / top_k; the
  kernel gives the logits (run on an H100, 2026-11-23).
* Precomputed: the weights are followed by SwiGLUStep in every format, and per tensor always. The
  other references weigh every slot with 1 / top_k, whatever they are given.
* int4: from logits alone, and Default whatever the method. It wants plain rows and scales.
* FP4 with SwiGLU drops alpha, beta, the limit and the output scales.
* FP8 per tensor reads packed ids alone, and with SwiGLU the gate's rows first, which is not the
  order that the other references and SwiGLUStep have.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Protocol, cast, final

import torch
from flashinfer import fused_moe
from flashinfer.trace.templates import moe as templates
from flashinfer.trace.templates.gemm import _unswizzle_batched_sf_128x4
from torch import Tensor

from typed_moe.config import (
    Activation,
    Bf16,
    Format,
    Fp8PerChannel,
    Fp8PerTensor,
    MxFp8,
    MxInt4,
    Nvfp4,
    Swiglu,
    SwigluStep,
)
from typed_moe.errors import UnsupportedRouting
from typed_moe.kernels._flashinfer import InstalledFlashInfer
from typed_moe.kernels._flashinfer_library import EnumName
from typed_moe.routing import Refused, RoutingForm

STEP = 7
"""SwigluStep in FlashInfer's enum, whose references are other functions."""

_ROUTED = ("Default", "Renormalize", "RenormalizeNaive", "TopK", "DeepSeekV3")
_FOLLOWED = (Bf16, Fp8PerTensor, MxFp8, Nvfp4)


def best_covered(quant: Format) -> Activation:
    """The activation with which a format's references follow most of a call."""
    return SwigluStep(limit=1.5) if isinstance(quant, Bf16 | MxFp8 | Nvfp4) else Swiglu()


def not_covered(quant: Format, form: RoutingForm, method: str) -> Refused | None:
    """Why no reference says what a call means, with the activation of `best_covered`."""
    if isinstance(quant, Fp8PerChannel):
        return Refused(f"FlashInfer has no reference of {quant.name}")
    if isinstance(quant, MxInt4):
        if form is RoutingForm.IN_KERNEL and method == "Default":
            return None
        return Refused(
            f"FlashInfer's reference of {quant.name} routes from logits, by Default alone"
        )
    if form is RoutingForm.PRECOMPUTED:
        return None
    if isinstance(quant, Bf16 | Fp8PerTensor):
        return Refused(f"FlashInfer's reference of {quant.name} from logits does not route")
    if method not in _ROUTED:
        return Refused(f"FlashInfer's references route by {', '.join(_ROUTED)} alone")
    return None


def weighs_uniformly(quant: Format, form: RoutingForm, method: str) -> bool:
    """Whether the reference weighs every slot with 1 / top_k, whatever it is given."""
    if form is RoutingForm.IN_KERNEL:
        return method == "TopK"
    return not isinstance(quant, _FOLLOWED)


class _Template(Protocol):
    """What is used of FlashInfer's `TraceTemplate`."""

    def reference(self, **arguments: object) -> Tensor:
        """The call in PyTorch."""
        ...


@final
class ReferenceLibrary:
    """The installed FlashInfer with references for kernels, on any device.

    `calls` keeps what was asked for, as the entry points got it.
    """

    def __init__(self) -> None:
        self._installed = InstalledFlashInfer()
        self.calls: list[tuple[str, dict[str, object]]] = []

    @property
    def version(self) -> str:
        """Of the installed one."""
        return self._installed.version

    def parameters(self, entry_point: str) -> frozenset[str]:
        """Of the installed one."""
        return self._installed.parameters(entry_point)

    def number(self, enum: EnumName, member: str) -> int | None:
        """Of the installed one."""
        return self._installed.number(enum, member)

    def refuses(self, device: torch.device) -> Refused | None:
        """PyTorch runs anywhere."""
        del device
        return None

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """The reference, once the arguments bind to the real function."""
        inspect.signature(getattr(fused_moe, entry_point)).bind(**arguments)
        self.calls.append((entry_point, dict(arguments)))
        template = _template(entry_point, arguments)
        return template.reference(**_readable(entry_point, dict(arguments)))

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """No reference reads `do_finalize`; all of them add up."""
        raise UnsupportedRouting(
            f"FlashInfer's reference of {entry_point} adds up whatever do_finalize says; call the "
            "layer itself"
        )


def _template(entry_point: str, arguments: Mapping[str, object]) -> _Template:
    """The trace template that FlashInfer would write for this call."""
    dispatch = getattr(templates, f"{entry_point}_trace_dispatch", None)
    if dispatch is None:
        return cast("_Template", getattr(templates, f"{entry_point}_trace"))
    return cast("_Template", dispatch(**arguments))


def _unshuffle(weight: Tensor, *, gated: bool) -> Tensor:
    """FlashInfer's helper: rows as they were, up before gate."""
    rows: Tensor = templates._trtllm_unshuffle_weight(  # type: ignore[no-untyped-call]  # noqa: SLF001
        weight, gated
    )
    return rows


def _readable(entry_point: str, arguments: dict[str, object]) -> dict[str, object]:
    """The arguments with plain layouts, where the reference expects those."""
    if "mxint4" in entry_point:
        return _int4(arguments)
    step = arguments["activation_type"] == STEP
    if "per_tensor" in entry_point:
        return _per_tensor(arguments, step=step)
    if step:
        return arguments
    if entry_point.startswith("trtllm_bf16"):
        for name, gated in (("gemm1_weights", True), ("gemm2_weights", False)):
            blocks = cast("Tensor", arguments[name])
            rows = blocks.transpose(1, 2).flatten(2)
            arguments[name] = _unshuffle(rows, gated=gated)
    elif "fp4" in entry_point:
        _fp4(arguments)
    if isinstance(arguments.get("topk_ids"), tuple):
        arguments["topk_ids"] = cast("tuple[Tensor, Tensor]", arguments["topk_ids"])[0]
    return arguments


def _per_tensor(arguments: dict[str, object], *, step: bool) -> dict[str, object]:
    given = arguments.get("topk_ids")
    if isinstance(given, tuple):
        ids, weights = given
        bits = weights.to(torch.bfloat16).view(torch.int16).to(torch.int32) & 0xFFFF
        arguments["topk_ids"] = (ids << 16) | bits
    if not step:
        first = cast("Tensor", arguments["gemm1_weights"])
        second = cast("Tensor", arguments["gemm2_weights"])
        up, gate = _unshuffle(first, gated=True).chunk(2, dim=1)
        arguments["gemm1_weights"] = torch.cat((gate, up), dim=1)
        arguments["gemm2_weights"] = _unshuffle(second, gated=False)
    return arguments


def _int4(arguments: dict[str, object]) -> dict[str, object]:
    """Values in blocks and tiled scales as rows again."""
    for number, gated in ((1, True), (2, False)):
        blocks = cast("Tensor", arguments[f"gemm{number}_weights"])
        scale = cast("Tensor", arguments[f"gemm{number}_weights_scale"])
        rows = _unshuffle(blocks.transpose(1, 2).flatten(2), gated=gated)
        linear = _unswizzle_batched_sf_128x4(scale, *scale.shape)
        arguments[f"gemm{number}_weights"] = rows.to(torch.uint8)
        arguments[f"gemm{number}_weights_scale"] = _unshuffle(linear, gated=gated)
    return arguments


def _fp4(arguments: dict[str, object]) -> None:
    """Packed values, tiled scales and biases of SwiGLU as rows again; MX scales as bytes."""
    for number, gated in ((1, True), (2, False)):
        weight = cast("Tensor", arguments[f"gemm{number}_weights"])
        scale = cast("Tensor", arguments[f"gemm{number}_weights_scale"])
        rows = _unshuffle(weight, gated=gated).to(torch.uint8)
        linear = _unswizzle_batched_sf_128x4(scale.view(torch.uint8), *scale.shape)
        groups = _unshuffle(linear, gated=gated).to(torch.uint8)
        mx = weight.shape[2] * 2 // scale.shape[2] == 32
        arguments[f"gemm{number}_weights"] = rows
        arguments[f"gemm{number}_weights_scale"] = (
            groups if mx else groups.view(torch.float8_e4m3fn)
        )
        bias = cast("Tensor | None", arguments[f"gemm{number}_bias"])
        if bias is not None:
            plain = _unshuffle(bias.unsqueeze(2), gated=gated).squeeze(2)
            arguments[f"gemm{number}_bias"] = plain
