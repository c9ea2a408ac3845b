"""The fused routing kernel's tiles on this machine's GPU: rows, levels, warps, overlap.

    python -m tests.gpu.sweep_routing [--json FILE]

Microseconds per call in a CUDA graph, from which `typed_moe.kernels._triton_launch.tile_of` is made.
`typed-moe bench routing` times the kernel as it is used.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import attrs
import torch
from torch import Tensor

from typed_moe import Refused
from typed_moe.cli._bench_clock import CudaClocks, cuda_clocks
from typed_moe.cli._bench_routing import BLOCK, Router, chosen_routers
from typed_moe.kernels import FusedRouting, SortRequest, fused_routing
from typed_moe.routing import BiasRule

CALLS = 20
SWEPT = ("qwen3-30b-a3b", "deepseek-v3", "qwen3-next-80b-a3b")
Row = dict[str, float | int | str]
"""One line of a table."""


def launch() -> ModuleType:
    """The launch module, which needs Triton."""
    return importlib.import_module("typed_moe.kernels._triton_launch")


@attrs.frozen(kw_only=True)
class Tiles:
    """One router's calls with any tile."""

    router: Router
    fused: FusedRouting
    clocks: CudaClocks

    def inputs(self, tokens: int) -> tuple[Tensor, Tensor | None]:
        """float32 logits (T, E) and the bias (E,), if it reads one."""
        device, experts = self.clocks.device, self.router.shape.num_experts
        logits = 2.0 * torch.randn(tokens, experts, device=device)
        bias = 0.1 * torch.randn(experts, device=device)
        return logits, bias if self.router.strategy.bias is BiasRule.REQUIRED else None

    def time(self, given: tuple[Tensor, Tensor | None], request: SortRequest, **tile: int) -> float:
        """Microseconds with this tile."""
        route, chosen = vars(launch())["route"], vars(launch())["Tile"](**tile)
        return self.clocks.graph(
            [lambda: route(self.fused.settings, *given, request, chosen)] * CALLS
        )


def sweep(tiles: Tiles) -> Iterator[Row]:
    """One launch with any number of warps; several, by rows, levels, sums between and overlap."""
    name = tiles.router.name
    experts = tiles.router.shape.num_experts
    request = SortRequest(first_local=0, num_local=experts, block_size=BLOCK)
    for tokens, warps, levels in itertools.product((1, 2, 4), (1, 4), (0, 4)):
        tile = {"rows": 1, "levels": levels, "whole": tokens, "whole_warps": warps}
        us = tiles.time(tiles.inputs(tokens), request, warps=1, **tile)
        yield {"model": name, "tokens": tokens, "warps": warps, "levels": levels, "one launch": us}
    for tokens, rows, levels, place_warps, scan in (
        *itertools.product((8, 64), (1, 2), (0, 4), (4, 8), (1, 2**30)),
        *itertools.product((512,), (1, 2), (0, 4), (4, 8), (1,)),
        *itertools.product((4096, 16384), (1, 2, 4, 8), (0, 4), (4, 8), (1,)),
    ):
        given = tiles.inputs(tokens)
        tile = {"rows": rows, "levels": levels, "place_warps": place_warps, "scan": scan}
        said: Row = {"model": name, "tokens": tokens, **tile}
        for overlap in (0, 1):
            more = {"warps": 1, "whole": 0, "place_slots": 32 * place_warps, "overlap": overlap}
            said[f"overlap {overlap}"] = tiles.time(given, request, **tile, **more)
        yield said


def main() -> None:
    """Print a line per tile."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    clocks = cuda_clocks("the sweep")
    found: list[Row] = []
    for router in chosen_routers(SWEPT):
        fused = fused_routing(router.strategy, shape=router.shape, device=clocks.device)
        if isinstance(fused, Refused):
            raise SystemExit(f"{router.name}: {fused.reason}")
        for row in sweep(Tiles(router=router, fused=fused, clocks=clocks)):
            found.append(row)
            print("\t".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
            sys.stdout.flush()
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    with torch.no_grad():
        main()
