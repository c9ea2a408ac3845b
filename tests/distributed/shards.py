"""The same stored experts, whole and in shards, in every format."""

from __future__ import annotations

import functools
from typing import Final, final

import attrs
import torch
from torch import Tensor

from tests.layer.build import Build, random_experts
from typed_moe import FusedMoE, Placement, Renormalize, TokenExchange
from typed_moe.config import FORMATS

NAMES: Final = tuple(FORMATS)
EXPERTS: Final = 8
HIDDEN: Final = 128
# Halves under tensor parallelism are whole blocks of every format; the largest is 128.
INTERMEDIATE: Final = 256

EXACT: Final = 2e-6
"""A row's |got - expected| / |expected|: float32 sums in another order, 2**-24 a term.

The first matrix's product is the same sum in a shard as in the whole layer, since it runs over H,
which nothing splits. So what is rounded to the format between the matrices is the same."""
FLIPPED: Final = 0.1
"""The same of a row in which one value between the matrices rounded the other way: BLAS orders
the sums of the first product by the matrix's shape, so a value on a rounding border may fall on
either side. E2M1's steps are up to half of a value, and a row has 512 of them."""
FLIPS: Final = 3
"""Rows of one format that may be so; a wrong sum is wrong in nearly every row."""


@functools.cache
def whole(name: str) -> FusedMoE:
    """One rank's layer, calibrated."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        experts = random_experts(EXPERTS, HIDDEN, INTERMEDIATE)
        layer = _build(name).loaded(experts)
        layer.calibrate(*tokens(256))
    return layer


def shard(name: str, placement: Placement, exchange: TokenExchange | None = None) -> FusedMoE:
    """One rank's share of `whole(name)`, value by value."""
    build = attrs.evolve(_build(name), placement=placement, exchange=exchange)
    layer = build.empty()
    layer.load_weights(_checkpoint(whole(name)))
    return layer


def tokens(count: int) -> tuple[Tensor, Tensor]:
    """hidden_states (T, H) and router_logits (T, E); the same at every call."""
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, HIDDEN, generator=generator)
    return x, torch.randn(count, EXPERTS, generator=generator)


@functools.cache
def expected(name: str, count: int) -> Tensor:
    """The whole layer's output for `tokens(count)`."""
    return whole(name)(*tokens(count))


def _build(name: str) -> Build:
    for known, fmt in FORMATS.items():
        if known == name:
            return Build(
                routing=Renormalize(),
                num_experts=EXPERTS,
                hidden_size=HIDDEN,
                intermediate_size=INTERMEDIATE,
                quant=fmt,
            )
    raise KeyError(name)


def _checkpoint(layer: FusedMoE) -> list[tuple[str, Tensor]]:
    """The layer's own stored values and scales, as a checkpoint has them.

    Not the float values: quantised anew, a slice's scale per tensor would be another one.
    """
    named: list[tuple[str, Tensor]] = []
    for name, parameter in layer.named_parameters():
        matrix, kind = name.split("_", 1)
        for expert in range(EXPERTS):
            stored = parameter.data if parameter.dim() == 0 else parameter.data[expert]
            parts = {"down_proj": stored}
            if matrix == "w13":
                halves = stored.chunk(2) if stored.dim() else (stored, stored)
                parts = {"gate_proj": halves[0], "up_proj": halves[1]}
            for part, value in parts.items():
                named.append((f"{expert}.{part}.{kind}", value))
    return named


OWN_SCALES: Final = 0.0361 * 2**0.5
"""For FP8 per channel under tensor parallelism: a rank scales its own slice of a token between the
matrices, as every engine does, so each value there is rounded twice, E4M3's 0.036 each, in two ways."""


def rows_of(name: str, tp_size: int) -> Rows:
    """What the sum of a format's shards is held to."""
    return Rows(allowed=OWN_SCALES if name == "fp8_per_channel" and tp_size > 1 else None)


@final
@attrs.define
class Rows:
    """Counts rows by how far they are off; `allowed` is for all of them, instead of a few."""

    allowed: float | None = None
    seen: int = 0
    off: int = 0
    worst: float = 0.0

    def add(self, got: Tensor, wanted: Tensor) -> None:
        """Rows of one output."""
        assert got.shape == wanted.shape, (got.shape, wanted.shape)
        assert got.dtype == wanted.dtype, (got.dtype, wanted.dtype)
        if got.shape[0]:
            error = (got.double() - wanted.double()).norm(dim=1) / wanted.double().norm(dim=1)
            assert not bool(error.isnan().any()), "a row is NaN"
            self.seen += got.shape[0]
            self.off += int((error > EXACT).sum())
            self.worst = max(self.worst, float(error.max()))

    def check(self) -> None:
        """Within summation order, but for a few values on a rounding border."""
        if self.allowed is not None:
            assert self.worst < self.allowed, self
            return
        assert self.off <= FLIPS, self
        assert self.worst < FLIPPED, self
