"""The reference kernel over the six records, against float64 on what the stored values are worth."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from tests import oracle
from tests.kernels.build import (
    EXPERTS,
    TOKENS,
    RecordName,
    from_logits,
    precomputed,
    record,
)
from tests.layer.build import relative_error
from typed_moe.kernels import ReferenceKernel, Routing, entry_point

NAMES: tuple[RecordName, ...] = get_args(RecordName)
GATED = oracle.Act()
UNGATED = oracle.Act(kind="relu2")
CLAMPED = oracle.Act(alpha=1.702, beta=1.0, limit=0.8)

# An intermediate value on the border between two stored values may fall to either side, by one
# step of the format. Leaving the rounding out altogether would show as 10 times these figures.
TOLERANCE: dict[RecordName, float] = {
    "bf16": 4e-4,
    "fp8_per_tensor": 2e-3,
    "fp8_per_channel": 2e-3,
    "fp8_block": 2e-3,
    "mxfp8": 2e-3,
    "nvfp4": 8e-3,
    "mxfp4_bf16": 4e-4,
    "mxfp4_mxfp8": 2e-3,
    "mxint4": 4e-4,
}


@pytest.mark.parametrize("mode", ["from-logits", "precomputed"])
@pytest.mark.parametrize("act", [GATED, UNGATED, CLAMPED], ids=["silu-gated", "relu2", "clamped"])
@pytest.mark.parametrize("name", NAMES)
def test_a_record_means_what_its_values_are_worth(
    name: RecordName, act: oracle.Act, mode: str
) -> None:
    """Every record, in both modes, with the intermediate rounded as its format says."""
    made = record(name, act)
    logits = torch.randn(TOKENS, EXPERTS)
    chosen = oracle.route(oracle.RULES["Renormalize"], logits, None, 2)
    routing: Routing = (
        from_logits(logits) if mode == "from-logits" else precomputed(chosen.ids, chosen.weights)
    )
    expected = oracle.moe(
        made.experts, made.x, chosen.ids, chosen.weights, act, rounding=made.rounding
    )
    output = ReferenceKernel()(made.make(routing))

    assert output.dtype is torch.float32
    assert relative_error(output, expected) < TOLERANCE[name]


@pytest.mark.parametrize("name", NAMES)
def test_a_record_without_its_rounding_would_not_pass(name: RecordName) -> None:
    """The tolerance above is tight enough to see the intermediate's rounding."""
    made = record(name, GATED)
    chosen = oracle.route(oracle.RULES["Renormalize"], torch.randn(TOKENS, EXPERTS), None, 2)
    expected = oracle.moe(made.experts, made.x, chosen.ids, chosen.weights, GATED)
    output = ReferenceKernel()(made.make(precomputed(chosen.ids, chosen.weights)))

    assert relative_error(output, expected) > 2 * TOLERANCE[name]


@pytest.mark.parametrize("name", NAMES)
def test_weight_on_the_input_of_every_record(name: RecordName) -> None:
    """The flag multiplies the input, and the output then has no weight."""
    made = record(name, GATED)
    logits = torch.randn(TOKENS, EXPERTS)
    chosen = oracle.route(oracle.RULES["TopKSigmoid"], logits, None, 2)
    expected = oracle.moe(
        made.experts,
        made.x,
        chosen.ids,
        chosen.weights,
        GATED,
        on_input=True,
        rounding=made.rounding,
    )
    args = made.make(from_logits(logits, "TopKSigmoid", on_input=True))

    assert relative_error(ReferenceKernel()(args), expected) < TOLERANCE[name]


@pytest.mark.parametrize("name", NAMES)
def test_skipped_slots_of_every_record(name: RecordName) -> None:
    """Acceptance 44: an id of -1 adds exactly nothing, whatever its weight."""
    made = record(name, GATED)
    ids = torch.randint(0, EXPERTS, (TOKENS, 3))
    ids[:, 1] = -1
    ids[5] = -1
    weights = torch.rand(TOKENS, 3)
    full = ReferenceKernel()(made.make(precomputed(ids, weights)))
    weights[:, 1] = 1e30
    other = ReferenceKernel()(made.make(precomputed(ids, weights)))
    kept = precomputed(ids[:, [0, 2]], weights[:, [0, 2]])

    assert torch.equal(full, other)
    assert bool((full[5] == 0).all())
    torch.testing.assert_close(full, ReferenceKernel()(made.make(kept)))


def test_entry_points_have_flashinfers_names() -> None:
    """A record names the function it is for, in either mode."""
    made = record("fp8_block", GATED)
    args = made.make(from_logits(torch.randn(TOKENS, EXPERTS)))

    assert entry_point(args.family, type(args.routing)) == "trtllm_fp8_block_scale_moe"
    routed = made.make(precomputed(torch.zeros(TOKENS, 1), torch.ones(TOKENS, 1)))
    assert entry_point(routed.family, type(routed.routing)) == "trtllm_fp8_block_scale_routed_moe"
