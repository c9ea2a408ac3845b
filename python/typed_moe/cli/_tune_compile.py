"""Tiles compiled in processes side by side, so that the search finds them in Triton's cache."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import final

import attrs
import torch
from torch import Tensor

from typed_moe.cli._bench_shapes import LayerShape
from typed_moe.cli._bench_weights import StoredLayer, draw_inputs, draw_layer, make_layer
from typed_moe.config import Format
from typed_moe.kernels import ExpertWeights, KernelRequest, MoeArgs, TritonKernel
from typed_moe.kernels._expert_tiles import ExpertTile
from typed_moe.layer import FusedMoE
from typed_moe.quantization import Quantized
from typed_moe.routing import KernelRules, Refused

Compilers = Callable[[int, Sequence[ExpertTile]], None]
"""(T, tiles) compiled, wherever."""
_MOST_JOBS = 8
_CONTEXT_BYTES = 1 << 30  # of a process on the card, beside its layer
_COPIES = 2.5  # of a layer's weights while one is made


@final
class AnyTile:
    """`TritonKernel` with a tile that is changed between calls."""

    def __init__(self) -> None:
        self.kernel = TritonKernel()

    @property
    def name(self) -> str:
        """For plans."""
        return self.kernel.name

    def rules(self, request: KernelRequest) -> KernelRules | Refused:
        """As the kernel's."""
        return self.kernel.rules(request)

    def prepare(self, weights: ExpertWeights, request: KernelRequest) -> ExpertWeights:
        """As the kernel's."""
        return self.kernel.prepare(weights, request)

    def quantize(
        self, hidden_states: Tensor, quant: Format, *, input_scale: Tensor | None = None
    ) -> Quantized:
        """As the kernel's."""
        return self.kernel.quantize(hidden_states, quant, input_scale=input_scale)

    def __call__(self, args: MoeArgs, /) -> Tensor:
        return self.kernel(args)


def here(tokens: int, tiles: Sequence[ExpertTile]) -> None:
    """Not ahead of time: a tile is compiled when it is timed."""
    del tokens, tiles


def jobs_for(stored: StoredLayer) -> int:
    """As many processes as the machine's cores and the card's free memory have room for."""
    cores = max(1, (os.cpu_count() or 1) // 2)
    device = stored.state["w13_weight"].device
    if device.type != "cuda":
        return min(_MOST_JOBS, cores)
    weights = sum(tensor.nbytes for tensor in stored.state.values())
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, min(_MOST_JOBS, cores, int(free / (_COPIES * weights + _CONTEXT_BYTES))))


@contextmanager
def compilers(
    jobs: int, shape: LayerShape, quant: Format, device: torch.device
) -> Iterator[Compilers]:
    """So many processes, each with a layer of this shape, for as long as it is tuned."""
    if jobs == 1:
        yield here
        return
    with ProcessPoolExecutor(
        max_workers=jobs,
        mp_context=get_context("spawn"),
        initializer=_start,
        initargs=(shape, quant, str(device)),
    ) as pool:

        def ahead(tokens: int, tiles: Sequence[ExpertTile]) -> None:
            list(pool.map(_run, [tokens] * len(tiles), tiles))

        yield ahead


@final
@attrs.frozen(kw_only=True, eq=False)
class _Started:
    """What a process keeps between its tiles."""

    shape: LayerShape
    kernel: AnyTile
    layer: FusedMoE
    device: torch.device


_started: list[_Started] = []


def _start(shape: LayerShape, quant: Format, device: str) -> None:
    kernel = AnyTile()
    where = torch.device(device)
    layer = make_layer(draw_layer(shape, quant, 0, where), kernel)
    _started.append(_Started(shape=shape, kernel=kernel, layer=layer, device=where))


@torch.no_grad()
def _run(tokens: int, tile: ExpertTile) -> str:
    """Call a layer with a tile, for what it compiles."""
    mine = _started[0]
    inputs = draw_inputs(mine.shape, tokens, mine.device)
    mine.kernel.kernel = TritonKernel(tile=tile)
    try:
        mine.layer(inputs.hidden_states, inputs.router_logits)
    # The search calls it again, and says what it finds.
    except Exception as error:  # noqa: BLE001
        return str(error)
    return ""
