"""Processes that stay: real ranks over gloo, given one job after the other.

Starting a process costs seconds and a job milliseconds, so a module starts its ranks once. They
find each other through a file, not a port. Every wait has an end.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final, Protocol, TypeVar, cast, final

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup

SIZES: Final = (2, 4)
"""The groups that there are: the first two ranks, and all."""
START_SECONDS: Final = 90.0
JOB_SECONDS: Final = 40.0
# The ranks are on this machine, whatever its name resolves to.
LOOPBACK: Final = "lo0" if sys.platform == "darwin" else "lo"

_groups: dict[int, ProcessGroup] = {}


class _Pipe(Protocol):
    """One end of multiprocessing's."""

    def send(self, obj: object, /) -> None: ...
    def recv(self) -> object: ...
    def poll(self, timeout: float, /) -> bool: ...
    def close(self) -> None: ...


_T = TypeVar("_T")
Job = Callable[[ProcessGroup, str], _T]
"""Called on every rank of a group with the group and a word that says which case it is."""


@final
class Ranks:
    """Four processes, one per rank."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[_Pipe] = []
        self._processes: list[BaseProcess] = []
        for rank in range(SIZES[-1]):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, (folder / "store").as_uri(), theirs)
            )
            process.daemon = True
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        self._answers(SIZES[-1], START_SECONDS)

    def run(self, job: Job[_T], case: str, size: int) -> list[_T]:
        """What the job returned on each of `size` ranks, in rank order.

        Raises:
            AssertionError: it raised on one, with the tracebacks; or the time is over, and then
                all ranks are gone.
        """
        assert all(process.is_alive() for process in self._processes), "the ranks are gone"
        for pipe in self._pipes[:size]:
            pipe.send((job, case, size))
        # What a job returns is what it is annotated with; a pipe cannot say so.
        return cast("list[_T]", self._answers(size, JOB_SECONDS))

    def _answers(self, size: int, seconds: float) -> list[object]:
        end = time.monotonic() + seconds
        answers: list[object] = []
        failures: list[str] = []
        for rank, pipe in enumerate(self._pipes[:size]):
            try:
                if not pipe.poll(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"no answer in {seconds} seconds")
                failure, answer = cast("tuple[str, object]", pipe.recv())
            except (EOFError, TimeoutError) as error:
                self.close()
                raise AssertionError(f"rank {rank}: {error!r}; earlier: {failures}") from error
            answers.append(answer)
            if failure:
                failures.append(f"rank {rank}: {failure}")
        assert not failures, "\n".join(failures)
        return answers

    def close(self) -> None:
        """End the processes. They hold nothing to be saved, and a stuck one would not listen."""
        for process in self._processes:
            process.kill()
            process.join(10.0)
        for pipe in self._pipes:
            pipe.close()


def _serve(rank: int, store: str, pipe: _Pipe) -> None:
    """One rank's life: answer one job after the other."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=store,
        rank=rank,
        world_size=SIZES[-1],
        timeout=timedelta(seconds=JOB_SECONDS / 2),
    )
    for size in SIZES:
        group = dist.new_group(list(range(size)))
        if rank < size:
            _groups[size] = group
    pipe.send(("", None))
    while True:
        job, case, size = cast("tuple[Job[object], str, int]", pipe.recv())
        pipe.send(_answer(job, case, size))


def _answer(job: Job[object], case: str, size: int) -> tuple[str, object]:
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            return "", job(_groups[size], case)
    except Exception:  # noqa: BLE001 - told to the test that sent the job
        return traceback.format_exc(), None
