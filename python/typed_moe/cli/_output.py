"""How the commands print: columns for people, one JSON object for programs."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from typed_moe.runners import Plan

Fact = tuple[str, str]
"""What, and what about it."""

_INDENT = 2
_VERDICTS = {"taken": "green", "pass": "green", "FAIL": "bold red"}


def stdout() -> Console:
    """The terminal or file behind stdout; markup and emoji in data are left as they are."""
    return Console(markup=False, emoji=False, highlight=False)


def print_json(data: Mapping[str, object]) -> None:
    """One JSON object on stdout."""
    sys.stdout.write(json.dumps(data, indent=2, allow_nan=False) + "\n")


def print_title(console: Console, name: str, about: str) -> None:
    """The first line of an output or of one of its parts, folded where it is too long."""
    lines = textwrap.wrap(f"{name}  {about}".rstrip(), console.width, subsequent_indent="    ")
    text = Text("\n".join(lines))
    text.stylize("bold", 0, len(name))
    console.print(text, soft_wrap=True)


def print_heading(console: Console, text: str) -> None:
    """The title of a block, after an empty line."""
    console.print(Text(f"\n{text}", style="bold"), soft_wrap=True)


def print_facts(console: Console, rows: Sequence[Fact], indent: int = _INDENT) -> None:
    """Two columns, the second folded under itself, without padding on the right."""
    first = max((len(what) for what, _ in rows), default=0)
    at = indent + first + 2
    for what, value in rows:
        folded = textwrap.wrap(value, max(20, console.width - at)) or [""]
        line = Text(" " * indent)
        line.append(what.ljust(first + 2), style=_VERDICTS.get(what, "dim"))
        line.append(("\n" + " " * at).join(folded))
        for word in ("pass", "FAIL"):
            line.highlight_words([f": {word}"], style=_VERDICTS[word])
        console.print(line, soft_wrap=True)


def print_paragraph(console: Console, text: str, indent: int = _INDENT) -> None:
    """Text folded at the console's width."""
    edge = " " * indent
    console.print(
        Text(textwrap.fill(text, console.width, initial_indent=edge, subsequent_indent=edge)),
        soft_wrap=True,
    )


def print_plan(console: Console, plan: Plan) -> None:
    """A plan, and every kernel that was considered with the reason for its verdict."""
    print_heading(console, "Plan")
    remarks = [("kernel differs", text) for text in plan.differences]
    remarks += [("degraded", text) for text in plan.degraded]
    print_facts(console, [*plan.rows(), *remarks])
    print_heading(console, "Kernels considered")
    print_facts(
        console,
        [
            (
                "taken" if one.taken else "refused",
                f"{one.kernel}, {one.form.value} routing: {one.reason}",
            )
            for one in plan.candidates
        ],
    )


def plan_json(plan: Plan) -> dict[str, object]:
    """A plan as plain values."""
    return {
        **{what.replace(", ", "_").replace(" ", "_"): value for what, value in plan.rows()},
        "kernel_differs": list(plan.differences),
        "degraded": list(plan.degraded),
        "kernels_considered": [
            {
                "kernel": one.kernel,
                "routing": one.form.value,
                "taken": one.taken,
                "reason": one.reason,
            }
            for one in plan.candidates
        ],
    }
