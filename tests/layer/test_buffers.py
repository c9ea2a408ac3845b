"""What a caller may have a call write to: the result, and the chosen experts."""

from __future__ import annotations

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import CASES, Case, find, sized
from tests.kernels.recorded_flashinfer import RecordedLibrary, fill
from tests.layer.build import Build, random_experts
from typed_moe import (
    Bf16,
    FlashInferKernel,
    Fp8BlockScale,
    FusedMoE,
    Llama4,
    Nvfp4,
    RenormalizeNaive,
    RoutingForm,
    UnsupportedRouting,
)


def layer_of(case: Case, form: RoutingForm | None) -> FusedMoE:
    """A small float32 layer of a case, on the reference kernel."""
    build = Build(
        routing=case.strategy,
        num_experts=case.num_experts,
        top_k=case.top_k,
        routing_form=form,
    )
    return build.loaded(random_experts(case.num_experts, 16, 12), case.bias())


@pytest.mark.parametrize("form", [None, RoutingForm.PRECOMPUTED], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_acceptance_39_the_chosen_experts_are_reported(
    case: Case, form: RoutingForm | None
) -> None:
    """flashinfer#3382: the ids that ran, in every form; rows beyond T are left alone."""
    case = sized(case, 32, min(case.top_k, 4))
    layer = layer_of(case, form)
    logits = torch.randn(5, 32)
    replay = torch.full((8, case.top_k), -7, dtype=torch.int16)
    x = torch.randn(5, 16)
    told = layer(x, logits, routing_replay_out=replay)

    expected = oracle.route(case.rule, logits, layer.e_score_correction_bias, case.top_k)
    assert bool(expected.decided.all())
    assert torch.equal(replay[:5].sort(1).values.long(), expected.ids.sort(1).values)
    assert (replay[5:] == -7).all()
    assert torch.equal(told, layer(x, logits))


@pytest.mark.parametrize("case", [find("RenormalizeNaive"), find("Llama4")], ids=lambda c: c.id)
def test_the_result_goes_where_it_is_told(case: Case) -> None:
    """The buffer is what comes back; no tokens leave it as it was."""
    layer = layer_of(case, None)
    x, logits = torch.randn(5, 16), torch.randn(5, case.num_experts)
    output = torch.full((5, 16), torch.nan)

    assert layer(x, logits, output=output) is output
    assert torch.equal(output, layer(x, logits))
    empty = torch.empty(0, 16)
    assert layer(x[:0], logits[:0], output=empty) is empty


def recorded(build: Build, version: str = "0.7.2.post1") -> tuple[FusedMoE, RecordedLibrary]:
    """A bfloat16 layer whose calls are kept."""
    library = RecordedLibrary(version)
    made = attrs.evolve(build, kernel=FlashInferKernel(library), dtype=torch.bfloat16)
    layer = made.empty()
    fill(layer)
    return layer, library


WIDE = Build(
    routing=RenormalizeNaive(),
    num_experts=16,
    hidden_size=128,
    intermediate_size=128,
    quant=Fp8BlockScale(),
)


def test_flashinfer_writes_to_the_buffers_itself() -> None:
    """Both go to the entry point as they are."""
    layer, library = recorded(WIDE)
    x, logits = torch.randn(3, 128).bfloat16(), torch.randn(3, 16)
    output, replay = torch.empty_like(x), torch.empty(3, 2, dtype=torch.int16)
    assert layer(x, logits, output=output, routing_replay_out=replay) is output
    ((_, arguments),) = library.calls
    assert arguments["output"] is output
    assert arguments["routing_replay_out"] is replay


@pytest.mark.parametrize(
    ("version", "build"),
    [
        ("0.6.8", attrs.evolve(WIDE, quant=Nvfp4())),
        ("0.6.12", attrs.evolve(WIDE, quant=Bf16())),
    ],
    ids=str,
)
def test_a_release_that_does_not_write_the_replay(version: str, build: Build) -> None:
    """flashinfer#3382: it would leave the buffer as it was; the other form is named."""
    layer, library = recorded(build, version)
    x, logits = torch.randn(3, 128).bfloat16(), torch.randn(3, 16)
    replay = torch.empty(3, 2, dtype=torch.int16)
    with pytest.raises(UnsupportedRouting, match=r"does not write routing_replay_out"):
        layer(x, logits, routing_replay_out=replay)
    assert not library.calls
    before, _ = recorded(attrs.evolve(build, routing_form=RoutingForm.PRECOMPUTED), version)
    before(x, logits, routing_replay_out=replay)
    expected = oracle.route(oracle.RULES["RenormalizeNaive"], logits, None, 2)
    assert torch.equal(replay.long(), expected.ids)


def test_a_padded_kernels_output_is_copied() -> None:
    """Its own is wider, so it cannot be the caller's."""
    layer, library = recorded(attrs.evolve(WIDE, hidden_size=160, quant=Nvfp4()))
    x, logits = torch.randn(3, 160).bfloat16(), torch.randn(3, 16)
    output = torch.ones_like(x)
    assert layer(x, logits, output=output) is output
    assert not output.any()
    ((_, arguments),) = library.calls
    assert "output" not in arguments


X = torch.zeros(3, 16)


@pytest.mark.parametrize(
    "output",
    [torch.zeros(4, 16), torch.zeros(3, 16).bfloat16(), torch.zeros(16, 3).T, torch.zeros(3, 17)],
    ids=["rows", "dtype", "strides", "columns"],
)
def test_outputs_that_do_not_fit(output: Tensor) -> None:
    """What, got, allowed."""
    layer = layer_of(sized(find("Renormalize"), 8, 2), None)
    with pytest.raises(ValueError, match=r"output is .*; allowed: contiguous, torch\.float32"):
        layer(X, torch.zeros(3, 8), output=output)


@pytest.mark.parametrize(
    "replay",
    [
        torch.zeros(2, 2, dtype=torch.int16),
        torch.zeros(3, 3, dtype=torch.int16),
        torch.zeros(3, 2, dtype=torch.int32),
        torch.zeros(2, 3, dtype=torch.int16).T,
    ],
    ids=["rows", "columns", "dtype", "strides"],
)
def test_replay_buffers_that_do_not_fit(replay: Tensor) -> None:
    """FlashInfer writes one row per token past the end of a short one."""
    layer = layer_of(sized(find("Renormalize"), 8, 2), None)
    with pytest.raises(ValueError, match=r"allowed: contiguous, torch\.int16 of shape \(3 or more"):
        layer(X, torch.zeros(3, 8), routing_replay_out=replay)


def test_several_weighted_inputs_and_an_output() -> None:
    """Rows of one token are added up before they are the caller's."""
    layer, library = recorded(
        attrs.evolve(WIDE, routing=Llama4(), top_k=1, quant=Bf16()), "0.7.2.post1"
    )
    x, logits = torch.randn(3, 128).bfloat16(), torch.randn(3, 16)
    output = torch.ones_like(x)
    assert layer(x, logits, output=output) is output
    ((_, arguments),) = library.calls
    assert arguments["top_k"] == 1
