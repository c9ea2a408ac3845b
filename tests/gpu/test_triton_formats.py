"""The Triton experts' quantised formats on a CUDA device, on stored bits drawn at random.

DeepSeek's FP8 blocks are in `test_triton_experts.py`, and so are whole layers of every format.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.kernels.build import Record, RecordName, Sizes, from_logits, precomputed, record
from tests.layer.build import ACTIVATIONS, relative_error
from tests.quantization import grids
from typed_moe import Bf16, Fp8PerTensor, TritonKernel
from typed_moe.kernels import MoeArgs, Routing
from typed_moe.kernels._expert_tiles import ANY_CARD, HOPPER, Operand
from typed_moe.quantization import stored_error_bound

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Record = TypeVar("_Record", bound="DataclassInstance")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="Triton's interpreter is on"),
]

NAMES: tuple[RecordName, ...] = ("fp8_per_tensor", "mxfp8", "mxfp4_bf16", "mxfp4_mxfp8", "nvfp4")
OPERAND: dict[RecordName, Operand] = {
    "fp8_per_tensor": "fp8",
    "mxfp8": "mxfp8",
    "mxfp4_bf16": "fp4",
    "mxfp4_mxfp8": "fp4",
    "nvfp4": "fp4",
}
SIZES = Sizes(experts=16, hidden=512, width=256, tokens=1024, top_k=4)
ODD = Sizes(experts=16, hidden=352, width=160, tokens=300, top_k=4)
"""Eleven and five groups of 32: no multiple of any tile's step, nor of four bytes of scales."""
TOKENS = (1, 8, 64, 300, 1024)
BF16, PER_TENSOR = stored_error_bound(Bf16()), stored_error_bound(Fp8PerTensor())
FORMATS = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Fresh memory is NaN and large integers, so that nothing left over passes for a result."""
    torch.use_deterministic_algorithms(mode=True, warn_only=True)
    assert bool(torch.empty(7, device="cuda", dtype=torch.bfloat16).isnan().all())
    yield
    torch.use_deterministic_algorithms(mode=False)


@attrs.frozen(kw_only=True, eq=False)
class Case:
    """A record and what it is worth."""

    made: Record
    logits: Tensor
    routing: oracle.Routing
    rounded: Tensor
    exact: Tensor

    def args(self, routing: Routing, tokens: int) -> MoeArgs:
        """The first `tokens` rows on the card."""
        args = moved(self.made.make(routing))
        cut = {
            name: value[:tokens]
            for name, value in tensors(args).items()
            if name.startswith("hidden_states")
        }
        return changed(args, cut)

    def error(self, got: Tensor, tokens: int, name: RecordName) -> float:
        """In shares of what is allowed: the intermediate stays bfloat16 but for native FP8."""
        if name == "fp8_per_tensor" and torch.cuda.get_device_capability() >= (8, 9):
            return relative_error(got.cpu(), self.rounded[:tokens]) / PER_TENSOR
        return relative_error(got.cpu(), self.exact[:tokens]) / BF16


def tensors(one: DataclassInstance) -> dict[str, Tensor]:
    """A record's own tensors by name."""
    values = {field.name: getattr(one, field.name) for field in dataclasses.fields(one)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def changed(one: _Record, values: Mapping[str, Tensor]) -> _Record:
    """The record with other tensors."""
    return replace(one, **values)


def moved(args: MoeArgs) -> MoeArgs:
    """A record with its tensors, and those of its constant half, on the card."""

    def on_card(one: _Record) -> _Record:
        return changed(one, {name: value.cuda() for name, value in tensors(one).items()})

    return on_card(replace(args, experts=on_card(args.experts)))


@cache
def case(name: RecordName, activation: str, size: Sizes = SIZES) -> Case:
    """Random stored bits, and the layer in float64 with the format's rounding and without."""
    torch.manual_seed(3)
    made = record(name, ACTIVATIONS[activation][1], size)
    logits = torch.randn(size.tokens, size.experts)
    routing = oracle.route(oracle.RULES["RenormalizeNaive"], logits, None, size.top_k)
    ids, weights = routing.ids, routing.weights
    return Case(
        made=made,
        logits=logits,
        routing=routing,
        rounded=oracle.moe(made.experts, made.x, ids, weights, made.act, rounding=made.rounding),
        exact=oracle.moe(made.experts, made.x, ids, weights, made.act),
    )


def given(one: Case, tokens: int) -> Routing:
    """The oracle's own routing, precomputed."""
    return precomputed(one.routing.ids[:tokens].cuda(), one.routing.weights[:tokens].cuda())


@FORMATS
@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_every_activation_form_and_size(name: RecordName, activation: str) -> None:
    """Within the bound of float64 on the same stored values, and the same bits again."""
    one = case(name, activation)
    for tokens in TOKENS:
        logits = one.logits[:tokens].cuda()
        for routing in (given(one, tokens), from_logits(logits, "RenormalizeNaive")):
            args = one.args(routing, tokens)
            got = TritonKernel()(args)
            assert got.dtype is torch.bfloat16
            assert one.error(got, tokens, name) < 1, tokens
            assert torch.equal(TritonKernel()(args), got)


@FORMATS
def test_every_tile_of_the_tables(name: RecordName) -> None:
    """A tile that a table gives for another size or card computes the same values."""
    one = case(name, "swiglu")
    for table in (HOPPER, ANY_CARD):
        for _, tile in table[OPERAND[name]]:
            for tokens in (3, 1000):
                got = TritonKernel(tile=tile)(one.args(given(one, tokens), tokens))
                assert one.error(got, tokens, name) < 1, tile


@FORMATS
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_widths_that_are_no_multiple_of_a_step(name: RecordName, activation: str) -> None:
    """Groups behind the last one, in both products."""
    one = case(name, activation, ODD)
    for tokens in (1, 40, 300):
        got = TritonKernel()(one.args(given(one, tokens), tokens))
        assert one.error(got, tokens, name) < 1, tokens


@pytest.mark.parametrize("tokens", TOKENS)
def test_fp8_per_tensor_converted_in_registers(tokens: int) -> None:
    """As a card without FP8 matrix units computes it: the intermediate is not rounded to FP8."""
    one = case("fp8_per_tensor", "swiglu-gpt-oss")
    got = TritonKernel(fp8="bits")(one.args(given(one, tokens), tokens))
    assert relative_error(got.cpu(), one.exact[:tokens]) < BF16


@FORMATS
@pytest.mark.parametrize("ranks", [2, 8])
def test_acceptance_46_shards_add_up(name: RecordName, ranks: int) -> None:
    """The ranks' parts are the whole; a token with no expert of a rank gets zeros there."""
    one, count, tokens = case(name, "swiglu"), SIZES.experts // ranks, 200
    args, ids = one.args(given(one, tokens), tokens), one.routing.ids[:tokens]
    total = torch.zeros(tokens, SIZES.hidden)
    for rank in range(ranks):
        part = TritonKernel()(local(args, rank * count, count)).float().cpu()
        elsewhere = ~((ids >= rank * count) & (ids < (rank + 1) * count)).any(1)
        assert bool((part[elsewhere] == 0).all())
        total += part
    assert one.error(total, tokens, name) < 1


def local(args: MoeArgs, start: int, count: int) -> MoeArgs:
    """The record of a rank that has these experts: every tensor of all experts is cut."""
    experts = replace(args.experts, local_expert_offset=start, local_num_experts=count)
    cut = {
        name: value[start : start + count]
        for name, value in tensors(args).items()
        if name.startswith(("gemm", "output"))
    }
    return changed(replace(args, experts=experts), cut)


@FORMATS
def test_skipped_slots_and_unfinalized(name: RecordName) -> None:
    """Ids of -1 add nothing; rows, weights and index add up to the call's own result."""
    one, tokens = case(name, "swiglu"), 70
    ids = one.routing.ids[:tokens].clone()
    ids[torch.rand(ids.shape) < 0.4] = -1
    ids[0] = -1
    args = one.args(precomputed(ids.cuda(), one.routing.weights[:tokens].cuda()), tokens)
    got = TritonKernel()(args)
    rows = TritonKernel().unfinalized(args)
    assert bool((got[0] == 0).all())
    assert torch.equal((rows.expanded_idx_to_permuted_idx < 0).cpu(), ids < 0)
    assert relative_error(rows.finalize().cpu(), got.double().cpu()) < BF16


class _Decoding(Protocol):
    def decoded(self, weights: str, data: Tensor, scales: Tensor) -> Tensor: ...


@pytest.mark.parametrize("weights", ["mxfp8", "mxfp4", "nvfp4"])
def test_every_byte_times_every_scale(weights: str) -> None:
    """Exactly the format's values over 2^32, or their nearest bfloat16 where it ends, beside every other byte.

    A scale beyond 2^33 (2^39 for MXFP8) leaves nothing finite, and neither does one that is NaN. The least
    scale of E8M0, 2^-127, leaves zeros, which are the nearest bfloat16.
    """
    decoding = cast("_Decoding", importlib.import_module("tests.gpu.decoding"))
    byte = torch.arange(256, dtype=torch.uint8)
    scale = e4m3(byte) if weights == "nvfp4" else grids.e8m0(byte)
    most = {"mxfp8": 166, "mxfp4": 160, "nvfp4": 255}[weights]
    for data in (byte, byte.flip(0), byte.roll(1)):
        got = decoding.decoded(weights, data, byte)
        values = e4m3(data) if weights == "mxfp8" else grids.e2m1(data[None, :]).flatten()
        assert same(got[: most + 1], values * scale[: most + 1, None] * 2.0**-32)
        assert not got[most + 1 :].isfinite().any()


def e4m3(byte: Tensor) -> Tensor:
    """What float8_e4m3fn is worth, by torch's own table."""
    return byte.view(torch.float8_e4m3fn).double()


def same(got: Tensor, expected: Tensor) -> bool:
    """The same bfloat16, signs of zeros among them; a NaN has many bit patterns."""
    wanted = expected.to(torch.bfloat16)
    number = ~wanted.isnan()
    alike = got.view(torch.int16)[number] == wanted.view(torch.int16)[number]
    return bool(alike.all()) and torch.equal(got.isnan(), wanted.isnan())
