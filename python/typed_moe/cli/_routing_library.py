"""FlashInfer's routing kernels, called through its Python once and then, to be timed, without it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import final

import torch
from torch import Tensor

from typed_moe.cli._errors import UserError
from typed_moe.routing import InKernel, Routed
from typed_moe.testing._flashinfer_routing import load_routing_library, routing_kernels


@final
class FlashInferRouting:
    """The kernels of a library that `python -m tests.conformance.build` made for this card.

    FlashInfer's Python makes the expert ids from the permutation in several launches of PyTorch's,
    which a fused layer does not need. So it is called once, and the library's own call, with the
    tensors that it was given, is what is timed: the choice, the weights and the permutation.
    """

    def __init__(self, file: Path) -> None:
        try:
            self._library = load_routing_library(file)
            self._kernels = routing_kernels(self)
        except (ImportError, OSError, RuntimeError, AttributeError) as error:
            raise UserError(
                f"--flashinfer-library {file} cannot be used ({' '.join(str(error).split())}); it is "
                "built by python -m tests.conformance.build, and needs flashinfer installed"
            ) from error
        self._arguments: tuple[object, ...] = ()

    def trtllm_gen_routing(self, *arguments: object) -> object:
        """What FlashInfer's Python calls."""
        self._arguments = arguments
        return self._library.trtllm_gen_routing(*arguments)

    def prepared(
        self, told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int, /
    ) -> tuple[Routed, Callable[[], object]]:
        """The choice, and the library's own call that makes it."""
        result = self._kernels(told, logits, bias, top_k)
        torch.cuda.synchronize()
        arguments = self._arguments
        routed = Routed(topk_ids=result.topk_ids, topk_weights=result.topk_weights.float())
        return routed, lambda: self._library.trtllm_gen_routing(*arguments)
