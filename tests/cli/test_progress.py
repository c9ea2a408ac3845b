"""Progress bars: on a terminal, for steps that take long, on stderr."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from typed_moe.cli import _progress
from typed_moe.cli._progress import Steps


def _steps(*, terminal: bool) -> tuple[Steps, io.StringIO]:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=80, _environ={"TERM": "xterm"})
    return Steps(console=console), stream


def test_a_long_step_has_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """It shows the step's name, then what it becomes, and is taken away at the end."""
    monkeypatch.setattr(_progress, "SHOW_AFTER_SECONDS", 0.01)
    steps, stream = _steps(terminal=True)

    with steps.step("draw", total=4) as step:
        time.sleep(0.2)
        step.advance()
        step.becomes("quantise")
        time.sleep(0.2)

    assert "draw" in stream.getvalue()
    assert "quantise" in stream.getvalue()
    assert stream.getvalue().endswith("\x1b[2K")  # the line is erased
    assert steps.seconds["draw"] == pytest.approx(0.4, abs=0.3)


def test_a_short_step_has_none() -> None:
    """Nothing is written before the time is over."""
    steps, stream = _steps(terminal=True)

    with steps.step("draw", total=1) as step:
        step.advance()

    assert stream.getvalue() == ""
    assert "draw" in steps.seconds


def test_there_is_none_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A log gets no bars, however long it takes."""
    monkeypatch.setattr(_progress, "SHOW_AFTER_SECONDS", 0.0)
    steps, stream = _steps(terminal=False)

    with steps.step("draw", total=2) as step:
        time.sleep(0.05)
        step.advance()
        step.becomes("quantise")

    assert stream.getvalue() == ""
    assert steps.seconds["draw"] >= 0.05


def test_an_error_in_a_step_takes_the_bar_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cursor is shown again, and the error goes through."""
    monkeypatch.setattr(_progress, "SHOW_AFTER_SECONDS", 0.01)
    steps, stream = _steps(terminal=True)

    def breaks() -> None:
        with steps.step("draw"):
            time.sleep(0.1)
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        breaks()

    assert "\x1b[?25h" in stream.getvalue()
