"""Bytes: what prepared weights take, and what a call allocates beside the call by hand."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from typing_extensions import override

from tests.kernels.recorded_flashinfer import RecordedLibrary
from tests.layer.build import Build, random_experts
from typed_moe import (
    Bf16,
    Format,
    Fp8BlockScale,
    Fp8PerTensor,
    MxFp4,
    MxFp8,
    Nvfp4,
    Renormalize,
    RoutingForm,
)
from typed_moe.cli import _bench
from typed_moe.cli._bench_by_hand import Call
from typed_moe.cli._bench_calls import Pair, open_library, pairs
from typed_moe.kernels import FlashInferKernel
from typed_moe.kernels.flashinfer_facts import NEWEST

EXPERTS, HIDDEN, WIDTH = 8, 256, 256
VALUES = EXPERTS * 3 * WIDTH * HIDDEN
"""Weights of all experts: gate, up and down."""

BYTES_PER_VALUE: tuple[tuple[Format, float], ...] = (
    (Bf16(), 2),
    (Fp8PerTensor(), 1),
    (Fp8BlockScale(), 1 + 4 / 128**2),
    (MxFp8(), 1 + 1 / 32),
    (MxFp4(), 1 / 2 + 1 / 32),
    (Nvfp4(), 1 / 2 + 1 / 16),
)
"""What a format stores of a weight: its bits, and its share of a block's scale."""

CONSTANTS = 16 * EXPERTS * 4
"""Room for per-expert float32 scales and settings, of which no entry point has more than 16."""


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address -> bytes of what tensors are stored in."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage.data_ptr(): storage.nbytes() for storage in found}


def _live() -> dict[int, int]:
    """Of every tensor that Python can reach."""
    gc.collect()
    # By the exact type: isinstance would wake deprecated objects, and fakes have no storage.
    found = [one for one in gc.get_objects() if type(one) in (Tensor, torch.nn.Parameter)]
    return _storages(one for one in found if one.device.type == "cpu")


@pytest.mark.parametrize(
    ("quant", "each"), BYTES_PER_VALUE, ids=[quant.name for quant, _ in BYTES_PER_VALUE]
)
def test_prepared_weights_are_the_only_copy(quant: Format, each: float) -> None:
    """After the first call all there is are the stored bytes, in the kernel's layout."""
    experts = random_experts(EXPERTS, HIDDEN, WIDTH)
    library = RecordedLibrary(NEWEST)
    before = _live()
    made = Build(
        routing=Renormalize(),
        num_experts=EXPERTS,
        top_k=2,
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        quant=quant,
        kernel=FlashInferKernel(library),
        dtype=torch.bfloat16,
    )
    layer = made.loaded(experts)
    for name, parameter in layer.named_parameters():
        if name.endswith("input_scale"):
            parameter.data.fill_(0.01)
    layer(torch.randn(3, HIDDEN).bfloat16(), torch.randn(3, EXPERTS))
    ((_, arguments),) = library.calls
    given = _storages(one for one in arguments.values() if isinstance(one, Tensor))
    library.calls.clear()
    weights = _storages(layer.parameters())
    del arguments
    kept = {address: size for address, size in _live().items() if address not in before}

    assert sum(weights.values()) <= VALUES * each + CONSTANTS
    assert sum(kept.values()) <= VALUES * each + CONSTANTS
    # The kernel is given the layer's own storage.
    large = {address for address, size in given.items() if size > EXPERTS * HIDDEN * WIDTH // 4}
    assert len(large) >= 2
    assert large <= weights.keys()


class Allocated(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Adds up the storages that operators make."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = 0
        self.largest = 0

    @override
    def __torch_dispatch__(  # type: ignore[explicit-any]  # an operator takes anything
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        given = _storages(one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor))
        result = func(*args, **(kwargs or {}))
        made = _storages(one for one in tree_leaves(result) if isinstance(one, Tensor))
        new = [size for address, size in made.items() if address not in given]
        self.bytes += sum(new)
        self.largest = max(self.largest, *new, 0)
        return result


def _allocated(call: Call, tokens: int) -> int:
    given = _bench.inputs(tokens)
    counted = Allocated()
    with counted:
        call(*given)
    return counted.bytes


@pytest.fixture(scope="module")
def made() -> tuple[Pair, ...]:
    """Three formats in both forms, each also by hand."""
    pytest.importorskip("flashinfer")
    return pairs(open_library())


def test_the_count_sees_what_is_made() -> None:
    """A sum makes a tensor, a view and an addition in place make none."""
    x = torch.zeros(8, 4)
    counted = Allocated()
    with counted:
        x.view(4, 8).add_(1)
        assert counted.bytes == 0
        x + x
    assert counted.bytes == 8 * 4 * 4


@pytest.mark.parametrize("tokens", _bench.TOKENS)
def test_a_call_allocates_what_the_call_by_hand_does(made: tuple[Pair, ...], tokens: int) -> None:
    """To the byte from logits; routed outside, 8 more on the CPU, where ids are looked at."""
    for pair in made:
        mine, theirs = _allocated(pair.runner, tokens), _allocated(pair.by_hand, tokens)
        extremes = 8 if pair.form is RoutingForm.PRECOMPUTED else 0
        assert mine == theirs + extremes, (pair.quant, pair.form)


def test_looking_at_the_weights_takes_one_experts_masks() -> None:
    """Not those of the whole stack, which are larger than the weights."""
    experts = random_experts(64, 128, 128)
    layer = Build(
        routing=Renormalize(), num_experts=64, hidden_size=128, intermediate_size=128
    ).loaded(experts)
    with Allocated() as counted:
        layer.validate_weights()
    assert counted.largest <= 2 * layer.get_parameter("w13_weight")[0].nbytes
