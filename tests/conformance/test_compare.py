"""That the comparison sees what it is there to see, with kernels that run on a CPU in its place."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import pytest
import torch
from torch import Tensor

from tests import oracle
from tests.acceptance.cases import Case, find
from tests.conformance import differences, inputs, report, runs, sizes
from tests.conformance.compare import compare
from tests.conformance.kernels import Chosen, Kernel
from typed_moe import InKernel
from typed_moe.routing import BrokenRows

CPU = torch.device("cpu")


def exact(case: Case) -> Kernel:
    """A kernel that does what the rule says, in float64, and rounds its weights to bfloat16."""

    def kernel(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        del told
        wide = None if bias is None else bias.float()
        routing = oracle.route(case.rule, logits, wide, top_k)
        return Chosen(ids=routing.ids.int(), weights=routing.weights.bfloat16())

    return kernel


def _higher_id_wins(case: Case, logits: Tensor, chosen: Chosen) -> Chosen:
    flipped = oracle.route(case.rule, logits.flip(1), None, chosen.ids.shape[1])
    return Chosen(ids=(case.num_experts - 1 - flipped.ids).int(), weights=chosen.weights)


def _zeros_beat_negative_logits(case: Case, logits: Tensor, chosen: Chosen) -> Chosen:
    best = logits.gather(1, chosen.ids.long())
    return Chosen(ids=torch.where(best > 0, chosen.ids, 0), weights=chosen.weights)


def _capped(case: Case, logits: Tensor, chosen: Chosen) -> Chosen:
    del case, logits
    return Chosen(ids=chosen.ids.clamp(max=255), weights=chosen.weights)


def _doubled(case: Case, logits: Tensor, chosen: Chosen) -> Chosen:
    del case, logits
    return Chosen(ids=chosen.ids, weights=chosen.weights * 2)


def _one_step_off(case: Case, logits: Tensor, chosen: Chosen) -> Chosen:
    del case, logits
    bits = chosen.weights.view(torch.int16) + 2
    return Chosen(ids=chosen.ids, weights=bits.view(torch.bfloat16))


Fault = Callable[[Case, Tensor, Chosen], Chosen]
FAULTS: tuple[tuple[Fault, str, tuple[int, int], str], ...] = (
    (_higher_id_wins, "Renormalize", (256, 8), "04"),
    (_higher_id_wins, "Sigmoid", (256, 8), "05"),
    (_zeros_beat_negative_logits, "Renormalize", (128, 8), "01"),
    (_zeros_beat_negative_logits, "Default", (128, 8), "02"),
    (_capped, "Renormalize", (512, 10), "09"),
    (_doubled, "SigmoidRenorm", (256, 8), "normal"),
    (_one_step_off, "TopKSigmoid", (256, 8), "normal"),
)


def _planned(case_id: str, size: tuple[int, int]) -> sizes.Planned:
    case = find(case_id)
    return next(
        plan
        for plan in sizes.planned()
        if plan.case.id == case.id and (plan.case.num_experts, plan.case.top_k) == size
    )


@pytest.fixture(autouse=True)
def _few_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs, "TOKENS", (5, 64))
    monkeypatch.setattr(runs, "FEW_TOKENS", (30,))


@pytest.mark.parametrize(
    ("case_id", "size"),
    [
        *((name, (128, 8)) for name in ("Default", "Renormalize", "TopK", "Sigmoid")),
        *((name, (256, 8)) for name in ("SigmoidRenorm", "TopKSigmoid", "MiniMax2")),
        ("DeepSeekV3-Kimi", (385, 9)),
        ("DeepSeekV3-8of4", (256, 8)),
        ("Llama4", (128, 1)),
        ("RenormalizeNaive", (400, 9)),
    ],
)
def test_a_right_kernel_agrees(case_id: str, size: tuple[int, int]) -> None:
    """Nothing is found in float64's own answer, over every input and both dtypes."""
    plan = _planned(case_id, size)
    found = list(runs.agreements(exact(plan.case), plan, CPU))

    assert {one.inputs for one in found} >= {"normal", "01", "02", "03", "04", "05", "06", "09"}
    assert report.failures(report.Found(agreements=found)) == []
    for one in found:
        # Saturated scores are undecided; a gate's own inputs are not.
        least = 0.8 if one.inputs in ("normal", "01", "02", "09") else 0.0
        assert one.counts.decided >= least * one.counts.rows, one.inputs
        assert one.counts.weight_error <= 0.51


@pytest.mark.parametrize(("fault", "case_id", "size", "drawn"), FAULTS)
def test_a_faulty_kernel_is_found(
    fault: Fault, case_id: str, size: tuple[int, int], drawn: str
) -> None:
    """Each fault is one that a kernel has had, and is seen on the inputs made for it."""
    plan = _planned(case_id, size)

    def kernel(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        chosen = exact(plan.case)(told, logits, bias, top_k)
        return fault(plan.case, logits, chosen)

    found = {one.inputs: one.counts for one in runs.agreements(kernel, plan, CPU)}

    assert not found[drawn].agrees


def test_a_limit_that_the_table_does_not_know_is_a_failure() -> None:
    """A refusal of a size that the table takes, and a run of one that it refuses."""
    taken, refused = _planned("Default", (256, 8)), _planned("Default", (257, 8))

    def throws(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        raise RuntimeError("\n  no compiled tier covers this\nat line 1")

    said = runs.refuses(throws, taken, CPU)
    assert said == "no compiled tier covers this"
    assert runs.refuses(exact(refused.case), refused, CPU) is None
    wrong = report.Found(limits=[(taken, said), (refused, None)])
    assert len(report.failures(wrong)) == 2
    assert report.failures(report.Found(limits=[(taken, None), (refused, said)])) == []


def test_the_sizes_lie_on_both_sides_of_every_limit() -> None:
    """Every method has sizes that are taken, and all but RenormalizeNaive's twin ones refused."""
    plans = sizes.planned()
    for name in {plan.case.strategy.name for plan in plans}:
        told = {isinstance(p.told, InKernel) for p in plans if p.case.strategy.name == name}
        assert told == {True, False}, name
    shapes = {(plan.case.num_experts, plan.case.top_k) for plan in plans}
    assert (400, 9) in shapes


def test_the_tables_have_the_counts() -> None:
    """Rows per method and input, a total, and what is refused."""
    plan, refused = _planned("Default", (128, 8)), _planned("Default", (128, 9))
    found = list(runs.agreements(exact(plan.case), plan, CPU))
    text = report.tables(
        report.Found(agreements=found, limits=[(refused, "no tier"), (plan, None)])
    )
    total, calls = (sum(getattr(one.counts, what) for one in found) for what in ("rows", "calls"))

    assert f"| Default | 128/8 | {calls} | {total} |" in text
    assert f"| all |  | {calls} | {total} |" in text
    assert "| normal |" in text
    assert "| Default | 128/9 | refuses | no tier |" in text


STATED = ("Default", "Renormalize", "TopK", "SigmoidRenorm", "Llama4", "MiniMax2")


@pytest.mark.parametrize("case_id", STATED)
def test_rows_that_are_no_numbers_are_held_to_the_table(case_id: str) -> None:
    """A kernel that gives the strategy's zeros is not what the table says of FlashInfer's."""
    size = (128, 1) if case_id == "Llama4" else (128, 8)
    plan = _planned(case_id, size)
    seen = differences.broken_rows(exact(plan.case), plan, CPU, 4)

    assert seen == differences.Broken(weights=BrokenRows(), valid=True, alone=True)
    assert len(report.failures(report.Found(broken=[(plan, seen)]))) == 1
    stated = attrs.evolve(seen, weights=plan.rules.broken_rows)
    assert report.failures(report.Found(broken=[(plan, stated)])) == []
    changed = attrs.evolve(stated, alone=False)
    assert len(report.failures(report.Found(broken=[(plan, changed)]))) == 1


def test_a_rounded_bias_changes_experts() -> None:
    """A kernel that rounds a float32 bias to bfloat16 chooses others; one that does not, none."""
    case = sizes.grouped(256, 8, 8, 4)

    def rounds(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        assert bias is not None
        return exact(case)(told, logits, bias.bfloat16(), top_k)

    rows, wrong = differences.rounded_bias(rounds, case, CPU)
    assert rows > 1000
    assert wrong > 0
    assert differences.rounded_bias(exact(case), case, CPU)[1] == 0


def test_a_missing_bias_is_held_to_the_table() -> None:
    """The ungrouped kernel is said to fault, the grouped one to read zeros."""
    grouped, plain = sizes.grouped(256, 8, 8, 4), find("DeepSeekV3-Kimi")

    def as_zeros(case: Case) -> Kernel:
        def kernel(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
            assert bias is None
            return exact(case)(told, logits, torch.zeros(case.num_experts), top_k)

        return kernel

    def faults(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        raise RuntimeError("Error in function 'launch' at /a/b.cuh:823: Got CUDA error.")

    assert differences.null_bias(as_zeros(grouped), grouped, CPU) == "zeros"
    assert differences.null_bias(faults, plain, CPU) == "Got CUDA error."
    as_stated = [(grouped, "zeros"), (plain, "Got CUDA error.")]
    assert report.failures(report.Found(null=as_stated)) == []
    assert len(report.failures(report.Found(null=[(grouped, "fault"), (plain, "zeros")]))) == 2


def tanh_sigmoid(case: Case) -> Kernel:
    """FlashInfer's sigmoid, in float32: 0.5 * tanh(x / 2) + 0.5."""

    def kernel(told: InKernel, logits: Tensor, bias: Tensor | None, top_k: int) -> Chosen:
        assert bias is not None
        scores = 0.5 * torch.tanh(0.5 * logits.float()) + 0.5
        ids = torch.sort(scores + bias.float(), dim=1, descending=True, stable=True).indices
        chosen = scores.gather(1, ids[:, :top_k])
        weights = case.rule.scale * chosen / (chosen.sum(dim=1, keepdim=True) + 1e-20)
        return Chosen(ids=ids[:, :top_k].int(), weights=weights.bfloat16())

    return kernel


def test_the_stated_error_of_a_score_is_needed_and_enough() -> None:
    """Sigmoids of 1e-8 through float32's tanh: outside a bfloat16's step, inside what is stated."""
    plan = _planned("MiniMax2", (256, 8))
    found = {one.inputs: one for one in runs.agreements(tanh_sigmoid(plan.case), plan, CPU)}
    assert report.failures(report.Found(agreements=list(found.values()))) == []
    assert found["15"].counts.coarse == found["15"].counts.rows
    assert found["normal"].counts.coarse == 0

    torch.manual_seed(0)
    logits, bias = inputs.large_bias(plan.case, 64)
    chosen = tanh_sigmoid(plan.case)(plan.anyway, logits, bias, 8)
    assert not compare(plan.case, chosen, logits, bias).agrees
    assert compare(plan.case, chosen, logits, bias, score_error=2.0**-24).agrees
