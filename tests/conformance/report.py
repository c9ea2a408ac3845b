"""The tables of docs/conformance.md, and what is not as stated."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import attrs

from tests.acceptance.cases import Case
from tests.conformance.compare import Counts
from tests.conformance.differences import Broken
from tests.conformance.runs import Agreement
from tests.conformance.sizes import Planned, plan
from typed_moe import InKernel

COUNTED = ("calls", "rows", "decided", "wrong", "apart", "other", "broken", "coarse", "weight")


@attrs.frozen(kw_only=True)
class Found:
    """Everything that was run.

    Attributes:
        agreements: by case and kind of input.
        limits: each size with what the kernel's own check says of it, None where it runs.
        broken: each case with what rows that are no numbers gave.
        rounded: (decided rows, of these those with other experts) with float32 biases in the
            grouped kernel.
        null: each biased case with what a missing bias was.
    """

    agreements: Sequence[Agreement] = ()
    limits: Sequence[tuple[Planned, str | None]] = ()
    broken: Sequence[tuple[Planned, Broken]] = ()
    rounded: tuple[int, int] = (0, 0)
    null: Sequence[tuple[Case, str]] = ()


def tables(found: Found) -> str:
    """All tables, one below the other."""
    decided, wrong = found.rounded
    parts = (
        _methods(found.agreements),
        _inputs(found.agreements),
        _limits(found.limits),
        _broken(found.broken),
        _table(("method", "no bias"), ((case.id, said) for case, said in found.null)),
        f"float32 biases in the grouped kernel: {wrong} of {decided} decided rows differ\n",
    )
    return "\n".join(parts)


def failures(found: Found) -> list[str]:
    """What the kernels do that strategies and capability table do not say."""
    failed = [
        f"{_name(one.case)}, inputs {one.inputs}: {one.counts}"
        for one in found.agreements
        if not one.counts.agrees
    ]
    failed += [
        f"{_name(planned.case)}: the table {_verdict(planned)} it, the kernel says {said}"
        for planned, said in found.limits
        if isinstance(planned.told, InKernel) != (said is None)
    ]
    failed += [
        f"{_name(planned.case)}, rows that are no numbers: {seen}"
        for planned, seen in found.broken
        if seen != Broken(weights=planned.rules.broken_rows, valid=True, alone=True)
    ]
    failed += [
        f"{_name(case)}, no bias: {said}"
        for case, said in found.null
        if (said == "zeros") != (plan(case).no_bias == "zeros")
    ]
    return failed


def _name(case: Case) -> str:
    return f"{case.id} {case.num_experts} / {case.top_k}"


def _verdict(planned: Planned) -> str:
    return "takes" if isinstance(planned.told, InKernel) else "refuses"


def _table(head: Sequence[str], rows: Iterable[tuple[object, ...]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _cells(counts: Counts) -> tuple[object, ...]:
    return (
        *(counts.calls, counts.rows, counts.decided, counts.wrong, counts.apart, counts.other),
        *(counts.broken, counts.coarse, f"{counts.weight_error:.2f}"),
    )


def _methods(agreements: Sequence[Agreement]) -> str:
    """A row for every method, with the sizes that were run."""
    totals: dict[str, Counts] = {}
    sizes: dict[str, list[str]] = {}
    for one in agreements:
        size, run = f"{one.case.num_experts}/{one.case.top_k}", sizes.setdefault(one.case.id, [])
        if size not in run:
            run.append(size)
        totals[one.case.id] = totals.get(one.case.id, Counts()) + one.counts
    rows = [(name, " ".join(sizes[name]), *_cells(counts)) for name, counts in totals.items()]
    rows.append(("all", "", *_cells(sum(totals.values(), Counts()))))
    return _table(("method", "E/top_k", *COUNTED), rows)


def _inputs(agreements: Sequence[Agreement]) -> str:
    """A row for every kind of input, over all methods and sizes."""
    totals: dict[str, Counts] = {}
    for one in agreements:
        totals[one.inputs] = totals.get(one.inputs, Counts()) + one.counts
    return _table(("inputs", *COUNTED), ((name, *_cells(c)) for name, c in totals.items()))


def _limits(limits: Sequence[tuple[Planned, str | None]]) -> str:
    """Sizes that the kernel refuses, by what it says, beside the capability table's verdict."""
    sizes: dict[tuple[str, str, str], list[str]] = {}
    for planned, said in limits:
        if said is None and isinstance(planned.told, InKernel):
            continue
        key = (planned.case.id, _verdict(planned), _short(said or "runs"))
        sizes.setdefault(key, []).append(f"{planned.case.num_experts}/{planned.case.top_k}")
    rows = ((key[0], " ".join(run), *key[1:]) for key, run in sizes.items())
    return _table(("method", "E/top_k", "table", "kernel"), rows)


def _short(said: str) -> str:
    """Without the size and the advice, so that sizes refused alike share a row."""
    said = re.sub(r" numExperts=.*", " it", said).removeprefix("routingCustom::run: ")
    return said.replace("%d ", "").replace("(%d)", "")


def _broken(broken: Sequence[tuple[Planned, Broken]]) -> str:
    """A row for every method and outcome, with how many runs had it."""
    runs: dict[tuple[str, Broken], int] = {}
    for planned, seen in broken:
        key = (planned.case.id, seen)
        runs[key] = runs.get(key, 0) + 1
    head = ("method", "runs", "NaN", "-inf", "one NaN", "ids", "a row beside them")
    return _table(
        head,
        (
            (
                *(name, count, seen.weights.nan, seen.weights.minus_infinity),
                *(seen.weights.one_nan, "valid" if seen.valid else "not valid"),
                "as alone" if seen.alone else "changed",
            )
            for (name, seen), count in runs.items()
        ),
    )
