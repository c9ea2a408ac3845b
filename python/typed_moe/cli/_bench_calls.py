"""One MoE call, through the runner and written out by hand, into a function that does nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_by_hand import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Call, by_hand
from typed_moe.cli._errors import UserError
from typed_moe.config import Bf16, Format, Fp8BlockScale, Nvfp4
from typed_moe.kernels import FlashInferKernel
from typed_moe.kernels._flashinfer_library import EnumName, FlashInferLibrary
from typed_moe.layer import FusedMoE
from typed_moe.routing import Refused, RenormalizeNaive, RoutingForm

MAX_TOKENS = 256


@final
class NoOpLibrary:
    """The installed FlashInfer, with functions that return a tensor that is already there.

    `keep` is called with each call's entry point and keywords, where it is set.
    """

    def __init__(self, installed: FlashInferLibrary) -> None:
        self._installed = installed
        self._output = torch.zeros(MAX_TOKENS, HIDDEN, dtype=torch.bfloat16)
        self.keep: Callable[[str, Mapping[str, object]], None] | None = None

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
        """Nothing runs, so anywhere."""
        del device
        return None

    def call(self, entry_point: str, arguments: Mapping[str, object]) -> Tensor:
        """The keywords are unpacked, as for a function, and nothing else happens."""
        if self.keep is not None:
            self.keep(entry_point, arguments)
        return self._nothing(**arguments)

    def call_unfinalized(
        self, entry_point: str, arguments: Mapping[str, object]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Not timed."""
        raise NotImplementedError(f"{entry_point} is timed with its sum alone")

    def _nothing(self, **arguments: object) -> Tensor:
        del arguments
        return self._output


def open_library() -> NoOpLibrary:
    """Over the installed FlashInfer. Raises: UserError: it is not installed."""
    try:
        # Takes seconds and need not be installed.
        from typed_moe.kernels._flashinfer import InstalledFlashInfer  # noqa: PLC0415
    except ImportError as error:
        raise UserError(
            f"flashinfer cannot be imported ({error}), and the calls that are timed are calls to "
            "it; pip install typed-moe[flashinfer]"
        ) from error
    return NoOpLibrary(InstalledFlashInfer())


@final
@attrs.frozen(kw_only=True, eq=False)
class Pair:
    """The same call twice.

    Attributes:
        quant: the layer's format.
        form: who routes.
        runner: through `FusedMoE`'s runner.
        by_hand: written out.
        library: that both call.
    """

    quant: Format
    form: RoutingForm
    runner: Call
    by_hand: Call
    library: NoOpLibrary


def pairs(library: NoOpLibrary) -> tuple[Pair, ...]:
    """What is timed: three formats, both routing forms."""
    return tuple(
        _pair(quant, form, library)
        for quant in (Bf16(), Fp8BlockScale(), Nvfp4())
        for form in RoutingForm
    )


def _pair(quant: Format, form: RoutingForm, library: NoOpLibrary) -> Pair:
    layer = FusedMoE(
        num_experts=EXPERTS,
        top_k=TOP_K,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        routing=RenormalizeNaive(),
        quant=quant,
        kernel=FlashInferKernel(library),
        routing_form=form,
        device="cpu",
        dtype=torch.bfloat16,
    )
    for parameter in layer.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            parameter.data.fill_(0.5)
        else:
            parameter.data.view(torch.uint8).fill_(1)
    runner = layer.prepare_weights()
    seen: list[Mapping[str, object]] = []
    library.keep = lambda _, arguments: seen.append(arguments)
    runner(torch.ones(1, HIDDEN, dtype=torch.bfloat16), torch.zeros(1, EXPERTS), None)
    library.keep = None
    scale = dict(layer.named_parameters()).get("w13_input_scale")
    return Pair(
        quant=quant,
        form=form,
        runner=lambda hidden_states, logits: runner(hidden_states, logits, None),
        by_hand=by_hand(quant, form, library, seen[0], scale),
        library=library,
    )
