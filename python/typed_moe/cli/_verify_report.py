"""What `typed-moe verify` prints."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
from rich.console import Console
from rich.text import Text

from typed_moe.cli._machine import machine_json, machine_rows
from typed_moe.cli._output import print_facts, print_heading, print_paragraph, print_title
from typed_moe.cli._verify import GAIN_BOUND, Row, VerifyReport
from typed_moe.cli._verify_cases import EXPERTS, HIDDEN, INTERMEDIATE, PLACEMENTS, TOKENS

_SHOWN = 12  # characters of a column of errors
_STYLES = {"FAIL": "bold red", "pass": "green"}


def verify_json(report: VerifyReport) -> dict[str, object]:
    """The report as plain values."""
    return {
        "machine": machine_json(report.device),
        "sizes": {
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "tokens": TOKENS,
        },
        "oracle": "float64, on the dequantised stored weights",
        "gain_bound": GAIN_BOUND,
        "counts": {
            "run": report.run,
            "passed": report.count("pass"),
            "failed": report.count("FAIL"),
            "refused": report.count("refused"),
        },
        "passed": report.passed,
        "absent": [{"kernel": name, "reason": reason} for name, reason in report.absent],
        "rows": [attrs.asdict(row) for row in report.rows],
        "seconds": report.seconds,
    }


def print_verify(report: VerifyReport, console: Console) -> None:
    """The report for people, in columns that stay columns where they are pasted."""
    print_title(console, "typed-moe verify", _counts(report))
    print_facts(
        console,
        [
            *machine_rows(report.device),
            (
                "layers",
                f"hidden {HIDDEN}, intermediate {INTERMEDIATE}, {EXPERTS} experts, {TOKENS} tokens",
            ),
            (
                "error",
                (
                    "||output - oracle|| / ||oracle||; the oracle is float64 on the dequantised "
                    f"stored weights. In size the two may differ by {GAIN_BOUND:.0%}."
                ),
            ),
            *((f"no {name}", reason) for name, reason in report.absent),
        ],
    )
    ran = [row for row in report.rows if row.verdict != "refused"]
    blocks: dict[str, list[Row]] = {}
    for row in ran:
        title = f"{row.kernel}: {row.format}, {row.form}, {row.entry_point}"
        blocks.setdefault(title, []).append(row)
    for title, rows in blocks.items():
        _print_block(console, title, rows)
    _print_refused(console, [row for row in report.rows if row.verdict == "refused"])
    _print_failed(console, [row for row in report.rows if row.verdict == "FAIL"])
    print_heading(console, _counts(report))


def _counts(report: VerifyReport) -> str:
    verdict = "pass" if report.passed else "FAIL"
    nothing = "" if report.run else "; nothing ran, so nothing was verified"
    return (
        f"{report.run} run, {report.count('FAIL')} failed, {report.count('refused')} refused in "
        f"{report.seconds:.0f} s{nothing}: {verdict}"
    )


def _print_block(console: Console, title: str, rows: list[Row]) -> None:
    """A line for each strategy, a column for each placement."""
    print_heading(console, title)
    first = rows[0]
    print_paragraph(console, f"activation {first.activation}, error up to {first.bound:.4f}")
    names = list(dict.fromkeys(row.strategy for row in rows))
    width = max(len(name) for name in names) + 2
    header = "".join(name.ljust(_SHOWN) for name in PLACEMENTS)
    console.print(Text(f"  {'':<{width}}{header}".rstrip(), style="dim"), soft_wrap=True)
    for name in names:
        mine = {row.placement: row for row in rows if row.strategy == name}
        cells = "".join(_cell(mine.get(placement)).ljust(_SHOWN) for placement in PLACEMENTS)
        verdict = "FAIL" if any(row.verdict == "FAIL" for row in mine.values()) else "pass"
        line = Text(f"  {name:<{width}}{cells}")
        line.append(verdict, style=_STYLES[verdict])
        console.print(line, soft_wrap=True)
    for note in dict.fromkeys(row.reason for row in rows if row.verdict == "pass" and row.reason):
        whose = dict.fromkeys(row.strategy for row in rows if row.reason == note)
        print_paragraph(console, f"{note} ({_listed(whose, len(names))})")


def _cell(row: Row | None) -> str:
    if row is None:
        return "refused"
    return "no number" if row.error is None else f"{row.error:.5f}"


def _listed(names: Iterable[str], total: int) -> str:
    found = list(names)
    return "every strategy" if len(found) == total else ", ".join(found)


def _print_refused(console: Console, rows: list[Row]) -> None:
    """By reason, with what it was said to."""
    if not rows:
        return
    print_heading(console, f"Refused, {len(rows)}")
    reasons: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        reasons.setdefault((row.kernel, row.reason), []).append(row)
    for (kernel, reason), found in reasons.items():
        formats = dict.fromkeys(f"{row.format} {row.form}" for row in found)
        strategies = dict.fromkeys(row.strategy for row in found)
        print_facts(
            console,
            [
                (
                    f"{len(found):>3}",
                    f"{kernel}: {reason} [{', '.join(formats)}; {', '.join(strategies)}]",
                )
            ],
        )


def _print_failed(console: Console, rows: list[Row]) -> None:
    """Each in full."""
    if not rows:
        return
    print_heading(console, f"Failed, {len(rows)}")
    for row in rows:
        what = f"{row.kernel}, {row.entry_point}: {row.strategy}, {row.format}, {row.form}"
        print_facts(console, [("FAIL", f"{what}, {row.placement}: {row.reason}")])
