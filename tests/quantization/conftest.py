"""One thread for these tests: their tensors are small, and threads that wait for each other cost
more than they bring (12 s on one thread, up to 60 s on two of a busy two-core machine)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
