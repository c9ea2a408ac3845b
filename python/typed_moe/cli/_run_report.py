"""What `typed-moe run` prints."""

from __future__ import annotations

import math
from typing import final

import attrs
import torch
from rich.console import Console
from rich.text import Text

from typed_moe.cli._compare import Comparison
from typed_moe.cli._output import (
    Fact,
    plan_json,
    print_facts,
    print_heading,
    print_plan,
    print_title,
)
from typed_moe.cli._run import RunReport

_BARS = 16
_BAR_WIDTH = 40


@final
@attrs.frozen(kw_only=True)
class Load:
    """How the tokens spread over the routed experts.

    Attributes:
        slots: per expert, the tokens that chose it.
    """

    slots: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Tokens per expert."""
        return sum(self.slots) / len(self.slots)

    @property
    def unused(self) -> int:
        """Experts without a token."""
        return sum(count == 0 for count in self.slots)

    @property
    def imbalance(self) -> float | None:
        """max over mean; 1 is even. None without tokens."""
        return max(self.slots) / self.mean if self.mean else None

    def buckets(self) -> list[tuple[int, int, int]]:
        """(first expert, last expert, tokens), at most 16 of them, of equal width but the last."""
        width = math.ceil(len(self.slots) / _BARS)
        starts = range(0, len(self.slots), width)
        ends = [min(start + width, len(self.slots)) for start in starts]
        return [
            (start, end - 1, sum(self.slots[start:end]))
            for start, end in zip(starts, ends, strict=True)
        ]


def run_json(report: RunReport) -> dict[str, object]:
    """The report as plain values."""
    spec, result, load = report.spec, report.comparison, Load(slots=report.slots)
    error = result.relative_error
    return {
        "model": report.model.name,
        "source": report.model.source,
        "model_type": spec.model_type,
        "layer": spec.layer_id,
        "weights": report.weights,
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "hidden_size": report.widths.hidden_size,
        "intermediate_size": report.widths.intermediate_size,
        "layer_scale": report.layer_scale,
        "tokens": result.rows,
        "format": report.plan.request.quant.name,
        "plan": plan_json(report.plan),
        "accuracy": {
            "oracle": "float64, unquantised weights",
            "relative_error": error if error is None or math.isfinite(error) else None,
            "bound": result.bound,
            "passed": result.passed,
            "rows_with_other_experts": result.rows_with_other_experts,
            "undecided_rows": result.undecided_rows,
        },
        "expert_load": {
            "tokens_per_expert": list(load.slots),
            "min": min(load.slots),
            "mean": load.mean,
            "max": max(load.slots),
            "unused": load.unused,
            "imbalance": load.imbalance,
        },
        "milliseconds": {
            **{name.replace(" ", "_"): 1e3 * value for name, value in report.seconds.items()},
            "run": 1e3 * report.run_seconds,
        },
        "tokens_per_second": _rate(report),
        "calls": report.calls,
        "peak_bytes": report.peak_bytes,
        "device": str(report.plan.request.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "notes": list(report.notes),
    }


def print_run(report: RunReport, console: Console) -> None:
    """The report for people."""
    spec, plan = report.spec, report.plan
    print_title(console, report.model.name, _title(report))
    print_facts(
        console,
        [
            ("config", f"{report.model.source}, model_type {spec.model_type}"),
            ("weights", report.weights),
            ("tokens", f"{report.comparison.rows} drawn, standard normal, bfloat16"),
            *(("note", note) for note in report.notes),
        ],
    )
    print_plan(console, plan)
    print_heading(console, "Accuracy, against float64 on the unquantised weights")
    print_facts(console, _accuracy(report.comparison, plan.request.quant.name))
    print_heading(console, f"Expert load, tokens by expert, top_k {spec.top_k}")
    _print_load(Load(slots=report.slots), console)
    print_heading(console, "Time")
    print_facts(console, _times(report))


def _title(report: RunReport) -> str:
    if report.layer_scale == 1.0:
        return f"layer {report.spec.layer_id}"
    return f"layer {report.spec.layer_id}, widths scaled by {report.layer_scale:g}"


def _accuracy(result: Comparison, quant: str) -> list[Fact]:
    if result.relative_error is None:
        return [("output error", "no tokens, nothing to compare")]
    error = (
        f"{_percent(result.relative_error)} relative, {quant} allows {_percent(result.bound)}: "
        + ("pass" if result.passed else "FAIL")
    )
    return [("output error", error), ("routing", _routing(result))]


def _routing(result: Comparison) -> str:
    if result.rows_with_other_experts is None:
        return "not checked: the oracle does not know this strategy and took its experts over"
    text = f"{result.rows_with_other_experts} of {result.rows} tokens go to other experts"
    if result.undecided_rows:
        text += f"; {result.undecided_rows} of these are ties that float32 cannot decide"
    return text


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _print_load(load: Load, console: Console) -> None:
    buckets = load.buckets()
    most = max(count for _, _, count in buckets)
    digits = len(str(buckets[-1][1]))
    several = any(first != last for first, last, _ in buckets)
    for first, last, count in buckets if most else ():
        label = f"{first:>{digits}}" + (f"-{last:<{digits}}" if several else "")
        bar = "█" * max(round(_BAR_WIDTH * count / most), 1 if count else 0)
        console.print(
            Text(f"  {label}  ", style="dim"), Text(bar, style="cyan"), f" {count}", sep=""
        )
    spread = "" if load.imbalance is None else f", imbalance {load.imbalance:.2f} (max over mean)"
    console.print(
        f"  min {min(load.slots)}, mean {load.mean:.3g}, max {max(load.slots)}, "
        f"unused {load.unused} of {len(load.slots)}{spread}"
    )


def _times(report: RunReport) -> list[Fact]:
    rate = _rate(report)
    speed = "" if rate is None else f", {rate:.4g} tokens/s"
    calls = f"median of {report.calls} calls" if report.calls > 1 else "one call"
    steps = {name: _duration(value) for name, value in report.seconds.items()}
    steps["run"] = f"{_duration(report.run_seconds)} ({calls}){speed}"
    machine = (
        f"{report.plan.request.device}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, peak memory {report.peak_bytes / 2**30:.1f} GiB"
    )
    return [*steps.items(), ("machine", machine)]


def _rate(report: RunReport) -> float | None:
    return report.comparison.rows / report.run_seconds if report.comparison.rows else None


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 10 else f"{1e3 * seconds:.0f} ms"
