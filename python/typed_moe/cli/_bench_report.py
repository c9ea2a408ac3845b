"""What `typed-moe bench overhead` prints."""

from __future__ import annotations

import attrs
import torch
from rich.console import Console
from rich.text import Text

from typed_moe.cli._bench import TOKENS, BenchReport
from typed_moe.cli._bench_by_hand import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K
from typed_moe.cli._machine import machine_json, machine_rows
from typed_moe.cli._output import print_facts, print_heading, print_title

_CPU = torch.device("cpu")
_ABOUT = (
    "host time of one call through the runner over the same call written out by hand, into a "
    "function that does nothing; the median of the rounds' ratios"
)


def bench_json(report: BenchReport) -> dict[str, object]:
    """The report as plain values."""
    formats = dict.fromkeys(one.format for one in report.measured)
    return {
        "machine": machine_json(_CPU),
        "about": _ABOUT,
        "sizes": {
            "hidden_size": HIDDEN,
            "intermediate_size": INTERMEDIATE,
            "num_experts": EXPERTS,
            "top_k": TOP_K,
        },
        "ratio": report.ratio(),
        "ratio_by_tokens": {str(tokens): report.ratio_at(tokens) for tokens in TOKENS},
        "ratio_by_format": {name: report.ratio(name) for name in formats},
        "difference_us": report.difference_us,
        "rows": [
            {**attrs.asdict(one), "difference_us": one.difference_us} for one in report.measured
        ],
    }


def print_bench(report: BenchReport, console: Console) -> None:
    """The report for people."""
    print_title(
        console,
        "typed-moe bench overhead",
        f"ratio {report.ratio():.2f}, {report.difference_us:.0f} µs per call, both medians",
    )
    print_facts(
        console,
        [
            *machine_rows(_CPU),
            ("layers", f"hidden {HIDDEN}, {EXPERTS} experts, top_k {TOP_K}, RenormalizeNaive"),
            ("ratio", _ABOUT),
        ],
    )
    header = f"{'format':<12}{'routing':<14}{'T':>5}{'runner':>12}{'by hand':>12}{'ratio':>8}"
    print_heading(console, "Microseconds per call")
    console.print(Text("  " + header, style="dim"), soft_wrap=True)
    for one in report.measured:
        console.print(
            f"  {one.format:<12}{one.form:<14}{one.tokens:>5}{one.runner_us:>12.1f}"
            f"{one.by_hand_us:>12.1f}{one.ratio:>8.2f}",
            soft_wrap=True,
        )
    print_heading(console, "Median ratio")
    formats = dict.fromkeys(one.format for one in report.measured)
    rows = [(f"T = {tokens}", f"{report.ratio_at(tokens):.2f}") for tokens in TOKENS]
    rows += [(name, f"{report.ratio(name):.2f}") for name in formats]
    print_facts(console, [*rows, ("all", f"{report.ratio():.2f}")])
