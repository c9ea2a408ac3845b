"""The kernels that `typed-moe verify` has to run on a device, and what each can show."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Protocol, final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._errors import UserError
from typed_moe.config import (
    Activation,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    Nvfp4,
    Swiglu,
)
from typed_moe.kernels import (
    DeepGemmKernel,
    FlashInferKernel,
    MoeKernel,
    ReferenceKernel,
    TritonKernel,
    fused_routing_refusal,
    installed_deep_gemm,
    installed_flashinfer,
)
from typed_moe.routing import Refused, RoutingForm

_NATIVE_FP8 = (8, 9)  # compute capability


class Weighing(Enum):
    """What a kernel does with the routing weights."""

    FOLLOWED = "as told"
    UNIFORM = "every slot with 1 / top_k"


class KernelSource(Protocol):
    """**Protocol:** makes one kernel for each layer, and knows what that kernel leaves out."""

    @property
    def name(self) -> str:
        """For the report."""
        ...

    @property
    def stops_before_sum(self) -> bool:
        """Whether its unfinalized rows are verified too, where the plan has any."""
        ...

    def rounds_intermediate(self, quant: Format) -> bool:
        """Whether it rounds between the two matrices as the format does."""
        ...

    def activation(self, quant: Format) -> Activation:
        """With which a format is verified."""
        ...

    def kernel(self) -> MoeKernel:
        """A new one."""
        ...

    def weighing(self, quant: Format, form: RoutingForm, method: str) -> Weighing | Refused:
        """What it does with the weights, or why it shows nothing."""
        ...

    def given(self) -> tuple[Tensor, Tensor] | None:
        """(T, k) ids and weights that the last call was given, where they are looked at."""
        ...


def _in_every_format(quant: Format) -> bool:
    del quant
    return True


@final
@attrs.frozen(kw_only=True)
class Complete:
    """A kernel that computes everything its rules let through, and whose output shows it.

    Attributes:
        name: for the report.
        make: a new kernel; it has no state.
        rounds: whether it rounds between the two matrices as a format does.
    """

    name: str
    make: Callable[[], MoeKernel]
    rounds: Callable[[Format], bool] = _in_every_format
    stops_before_sum: bool = True

    def rounds_intermediate(self, quant: Format) -> bool:
        """As it was told."""
        return self.rounds(quant)

    def activation(self, quant: Format) -> Activation:
        """What most models have."""
        del quant
        return Swiglu()

    def kernel(self) -> MoeKernel:
        """A new one."""
        return self.make()

    def weighing(self, quant: Format, form: RoutingForm, method: str) -> Weighing | Refused:
        """It computes everything."""
        del quant, form, method
        return Weighing.FOLLOWED

    def given(self) -> tuple[Tensor, Tensor] | None:
        """Its output shows them."""
        return None


REFERENCE = Complete(name="reference", make=ReferenceKernel)
"""The package's float32 kernel."""


def triton_rounds_intermediate(quant: Format, device: torch.device) -> bool:
    """Whether the Triton kernels round between the two matrices as the format does.

    Not where they unpack weights in registers and keep the intermediate in bfloat16: MX and FP4 formats,
    and FP8 on a card without its matrix units. The format's own rounding changes the size of what goes
    through it: the E8M0 floor rule saturates, by 1.6 per cent of the output in MXFP8.
    """
    match quant:
        case MxFp8() | MxFp4(activation="mxfp8") | Nvfp4():
            return False
        case Fp8BlockScale() | Fp8PerTensor():
            return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _NATIVE_FP8
        case _:
            return True


@final
class FlashInfer:
    """FlashInfer's kernels on their own GPUs."""

    stops_before_sum = True

    def __init__(self, device: torch.device) -> None:
        self._library = installed_flashinfer(device)

    @property
    def name(self) -> str:
        """And the release."""
        if isinstance(self._library, Refused):
            return "flashinfer"
        return f"flashinfer {self._library.version}"

    @property
    def absent(self) -> Refused | None:
        """Why there is none."""
        return self._library if isinstance(self._library, Refused) else None

    def rounds_intermediate(self, quant: Format) -> bool:
        """In every format."""
        del quant
        return True

    def activation(self, quant: Format) -> Activation:
        """What most models have."""
        del quant
        return Swiglu()

    def kernel(self) -> MoeKernel:
        """One for each layer: it keeps what the layer's calls have in common."""
        assert not isinstance(self._library, Refused), "an absent library is not asked"
        return FlashInferKernel(self._library)

    def weighing(self, quant: Format, form: RoutingForm, method: str) -> Weighing | Refused:
        """It computes everything that its rules let through."""
        del quant, form, method
        return Weighing.FOLLOWED

    def given(self) -> tuple[Tensor, Tensor] | None:
        """Its output shows them."""
        return None


@final
class FlashInferReferences:
    """FlashInfer's PyTorch references in place of its kernels: the calls, on any machine."""

    stops_before_sum = False

    def __init__(self) -> None:
        # It imports flashinfer, which takes seconds and need not be installed.
        from typed_moe.testing import _flashinfer_references  # noqa: PLC0415

        self._references = _flashinfer_references
        self._library = _flashinfer_references.ReferenceLibrary()

    @property
    def name(self) -> str:
        """And the release."""
        return f"flashinfer {self._library.version} references"

    def rounds_intermediate(self, quant: Format) -> bool:
        """In none."""
        del quant
        return False

    def activation(self, quant: Format) -> Activation:
        """The one whose references follow most."""
        return self._references.best_covered(quant)

    def kernel(self) -> MoeKernel:
        """The kernel that FlashInfer's GPUs get, over the references."""
        self._library.calls.clear()
        return FlashInferKernel(self._library)

    def weighing(self, quant: Format, form: RoutingForm, method: str) -> Weighing | Refused:
        """What the references leave out."""
        refused = self._references.not_covered(quant, form, method)
        if refused is not None:
            return refused
        uniform = self._references.weighs_uniformly(quant, form, method)
        return Weighing.UNIFORM if uniform else Weighing.FOLLOWED

    def given(self) -> tuple[Tensor, Tensor] | None:
        """From the arguments, because the output does not show the weights."""
        ids = self._library.calls[-1][1].get("topk_ids")
        return ids if isinstance(ids, tuple) else None


@final
@attrs.frozen(kw_only=True)
class Found:
    """The kernels to run, and those that are not there with the reason."""

    sources: tuple[KernelSource, ...]
    absent: tuple[tuple[str, str], ...] = ()


_Finder = Callable[[torch.device], KernelSource | Refused]


def _reference(device: torch.device) -> KernelSource | Refused:
    if device.type == "cuda":
        # It would say nothing of the device, and hide that nothing else ran.
        return Refused("the float32 reference says nothing of a GPU; choose --device cpu for it")
    return REFERENCE


def _flashinfer(device: torch.device) -> KernelSource | Refused:
    if device.type == "cuda":
        fused = FlashInfer(device)
        return fused if fused.absent is None else fused.absent
    if importlib.util.find_spec("flashinfer") is None:
        return Refused(
            "not installed; pip install typed-moe[flashinfer] checks the calls to it too"
        )
    return FlashInferReferences()


def _triton(device: torch.device) -> KernelSource | Refused:
    absent = fused_routing_refusal(device)
    if absent is not None:
        return absent
    rounds = partial(triton_rounds_intermediate, device=device)
    return Complete(name="triton", make=TritonKernel, rounds=rounds)


def _deep_gemm(device: torch.device) -> KernelSource | Refused:
    absent = fused_routing_refusal(device)
    if absent is not None:
        return absent
    library = installed_deep_gemm()
    refused = library if isinstance(library, Refused) else library.refuses(device)
    return Complete(name="deep_gemm", make=DeepGemmKernel) if refused is None else refused


_FINDERS: Mapping[str, _Finder] = MappingProxyType(
    {
        "reference": _reference,
        "flashinfer": _flashinfer,
        "triton": _triton,
        "deep_gemm": _deep_gemm,
    }
)
KERNELS: tuple[str, ...] = tuple(_FINDERS)
"""What `--kernel` takes."""
_DEFAULTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"cuda": ("flashinfer", "triton"), "cpu": ("reference", "flashinfer")}
)


def kernels_of(device: torch.device, names: tuple[str, ...] = ()) -> Found:
    """What there is for a device.

    Args:
        device: on a CUDA device its kernels are run; on a CPU the reference kernel and FlashInfer's
            references, and Triton's kernels where its interpreter runs them (TRITON_INTERPRET=1).
        names: out of `KERNELS`; none: all that a device has.

    Raises:
        UserError: no such name, or what is named is not there.
    """
    unknown = [name for name in names if name not in KERNELS]
    if unknown:
        raise UserError(f"--kernel is {unknown[0]!r}; allowed: {', '.join(KERNELS)}")
    found = {name: _FINDERS[name](device) for name in names or _DEFAULTS[device.type]}
    for name in names:
        one = found[name]
        if isinstance(one, Refused):
            raise UserError(f"--kernel is {name!r}: {one.reason}")
    return Found(
        sources=tuple(one for one in found.values() if not isinstance(one, Refused)),
        absent=tuple((name, one.reason) for name, one in found.items() if isinstance(one, Refused)),
    )
