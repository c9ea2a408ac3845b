"""What `bench layer` times: this package's layer, and its peers, behind one protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, final

import attrs
from torch import Tensor

from typed_moe.cli._bench_weights import StoredLayer, make_layer
from typed_moe.cli._errors import UserError
from typed_moe.cli._verify_kernels import triton_rounds_intermediate
from typed_moe.kernels import DeepGemmKernel, MoeKernel, TritonKernel, installed_deep_gemm
from typed_moe.routing import Refused


class Runnable(Protocol):
    """**Protocol:** one layer, from logits to the combined output."""

    def __call__(self, hidden_states: Tensor, router_logits: Tensor, /) -> Tensor:
        """(T, H) and (T, E) to (T, H)."""
        ...


@final
@attrs.frozen(kw_only=True, eq=False)
class Built:
    """A side that is ready to run.

    Attributes:
        layers: one for each that was stored.
        about: what runs, for the report.
        roundings: to bfloat16 that it makes beyond those of a fused layer, for the bound on its
            error.
        rounds_intermediate: between the two matrices as the format does.
        tune: called once for each T, before anything is checked or timed.
        library: whose kernels this package's layer calls, with its version; None: its own.
    """

    layers: tuple[Runnable, ...]
    about: str
    roundings: int = 0
    rounds_intermediate: bool = True
    tune: Runnable | None = None
    library: str | None = None


class Side(Protocol):
    """**Protocol:** a column of the table."""

    @property
    def name(self) -> str:
        """For the report, and for `--peer`."""
        ...

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        """Runs of these layers, or why there are none: not installed, or no such format."""
        ...


@final
@attrs.frozen(kw_only=True)
class Ours:
    """`FusedMoE`, with the kernel that its plan chooses, or with this one.

    Attributes:
        name: of the column; a kernel's own, so that its times are found by it.
        kernel: None leaves it to the plan.
    """

    name: str = "typed-moe"
    kernel: MoeKernel | None = None

    def build(self, stored: Sequence[StoredLayer], /) -> Built | Refused:
        """With the weights copied in: a kernel may rearrange them."""
        try:
            layers = tuple(make_layer(one, self.kernel) for one in stored)
        except ValueError as error:
            return Refused(" ".join(str(error).split()))
        plan = layers[0].plan
        request = plan.request
        library = library_of(plan.kernel)
        by = "" if library is None else f", {library}"
        return Built(
            layers=layers,
            about=f"FusedMoE, kernel {plan.kernel}{by}, {plan.form.value} routing",
            # The first product of a library's comes back in bfloat16: gate and up projection.
            roundings=0 if library is None else _LIBRARY_ROUNDINGS,
            rounds_intermediate=plan.kernel != "triton"
            or triton_rounds_intermediate(request.quant, request.device),
            library=library,
        )


def library_of(kernel: str) -> str | None:
    """Distribution and version of the library that a plan's kernel calls; None: it calls none."""
    if DeepGemmKernel().name not in kernel:
        return None
    found = installed_deep_gemm()
    return None if isinstance(found, Refused) else found.name


def _torch() -> Side:
    from typed_moe.cli._peer_torch import TorchGroupedMm  # noqa: PLC0415 - where it is timed

    return TorchGroupedMm()


def _transformers() -> Side:
    from typed_moe.cli._peer_transformers import Transformers  # noqa: PLC0415 - takes seconds

    return Transformers()


def _cutile() -> Side:
    from typed_moe.cli._peer_cutile import FlashInferCuTile  # noqa: PLC0415 - takes seconds

    return FlashInferCuTile()


def _sglang() -> Side:
    from typed_moe.cli._peer_sglang import Sglang  # noqa: PLC0415 - where it is timed

    return Sglang()


_PEERS: Mapping[str, Callable[[], Side]] = MappingProxyType(
    {
        "torch": _torch,
        "transformers": _transformers,
        "flashinfer-cutile": _cutile,
        "sglang": _sglang,
    }
)
PEERS: tuple[str, ...] = tuple(_PEERS)
"""What `--peer` takes."""
_KERNELS: Mapping[str, Callable[[], MoeKernel]] = MappingProxyType(
    {"triton": TritonKernel, "deep_gemm": DeepGemmKernel}
)
KERNELS: tuple[str, ...] = tuple(_KERNELS)
"""What `--kernel` takes."""
_LIBRARY_ROUNDINGS = 2


def sides(peers: tuple[str, ...], kernels: tuple[str, ...] = ()) -> tuple[Side, ...]:
    """This package's layer, or one for each of these kernels; then these peers, all where none is named.

    Raises:
        UserError: no such peer or kernel, or a peer beside `none`.
    """
    unknown = [name for name in kernels if name not in _KERNELS]
    if unknown:
        raise UserError(f"--kernel is {unknown[0]!r}; allowed: {', '.join(KERNELS)}")
    unknown = [name for name in peers if name not in _PEERS and name != "none"]
    if unknown:
        raise UserError(f"--peer is {unknown[0]!r}; allowed: {', '.join(PEERS)}, none")
    if "none" in peers and len(peers) > 1:
        raise UserError("--peer is 'none' beside others; allowed: 'none' alone, or names")
    names = [name for name in peers if name != "none"] if peers else PEERS
    ours = [Ours(name=name, kernel=_KERNELS[name]()) for name in dict.fromkeys(kernels)]
    return (*(ours or [Ours()]), *(_PEERS[name]() for name in names))
