"""What every test shares: one seed, one hypothesis profile, and the `gpu` marker."""

from __future__ import annotations

import importlib.util
import os

import hypothesis
import pytest
import torch

# Triton's kernels run in its interpreter where there is no GPU to compile them for. Read when Triton
# is imported, which is later than this.
if importlib.util.find_spec("triton") is not None and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No deadline: a first call compiles or loads. In CI the same examples every time, so that a
# failure there is one that can be run again; elsewhere new ones, which is how they are found.
hypothesis.settings.register_profile(
    "typed-moe", deadline=None, derandomize="CI" in os.environ, print_blob=True
)
hypothesis.settings.load_profile("typed-moe")

# One thread per test process: several processes share the cores already.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` on a machine without one."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
