"""Progress bars on stderr, for steps that turn out to take more than two seconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import final

import attrs
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

SHOW_AFTER_SECONDS = 2.0


@final
@attrs.define(kw_only=True)
class Step:
    """A step under way."""

    _progress: Progress | None
    _task: TaskID

    def advance(self) -> None:
        """One unit done."""
        if self._progress is not None:
            self._progress.advance(self._task)

    def becomes(self, what: str) -> None:
        """The units are done and something without units goes on."""
        if self._progress is not None:
            # A task of its own: a finished one has stopped its clock.
            self._progress.remove_task(self._task)
            self._task = self._progress.add_task(what, total=None)


@final
@attrs.define(kw_only=True)
class Steps:
    """The steps of a command, timed, each with a bar where stderr is a terminal.

    Attributes:
        console: where the bars go.
        seconds: wall time of every step that has ended, by name.
    """

    console: Console = attrs.field(factory=lambda: Console(stderr=True))
    seconds: dict[str, float] = attrs.field(factory=dict)

    @contextmanager
    def step(self, what: str, total: int | None = None) -> Iterator[Step]:
        """Time a step; show a bar from its third second on.

        Args:
            what: its name, shown and timed.
            total: how often `advance` will be called; None: not known.
        """
        begin = time.perf_counter()
        if not self.console.is_terminal:
            yield Step(progress=None, task=TaskID(0))
            self.seconds[what] = time.perf_counter() - begin
            return
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        progress = Progress(*columns, console=self.console, transient=True)
        step = Step(progress=progress, task=progress.add_task(what, total=total))
        # A timer and not a look at the clock: a step may be one long call.
        timer = threading.Timer(SHOW_AFTER_SECONDS, progress.start)
        timer.daemon = True
        timer.start()
        try:
            yield step
        finally:
            timer.cancel()
            timer.join()
            progress.stop()
        self.seconds[what] = time.perf_counter() - begin
