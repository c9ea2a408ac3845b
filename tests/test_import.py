"""Importing the package is cheap, and brings no library that only some users have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import attrs
import pytest

LIMIT_SECONDS = 1.0
NEVER_LOADED = ("transformers", "flashinfer", "sglang", "matplotlib", "rich", "typer")

# torch first, so that the clock sees what the package adds to it.
PROBE = """
import json, sys, time
import torch
start = time.perf_counter()
import typed_moe
seconds = time.perf_counter() - start
print(json.dumps({"seconds": seconds, "modules": sorted(sys.modules)}))
"""


@attrs.frozen(kw_only=True)
class Import:
    """One import of the package in a process of its own."""

    seconds: float
    modules: frozenset[str]


def import_in_new_process(folder: Path) -> Import:
    """Run the probe away from the checkout, so that the installed package is what it finds."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROBE],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    )
    found = json.loads(done.stdout)
    return Import(seconds=found["seconds"], modules=frozenset(found["modules"]))


@pytest.fixture(scope="module")
def imports(tmp_path_factory: pytest.TempPathFactory) -> list[Import]:
    """Three imports; the first also writes the bytecode."""
    folder = tmp_path_factory.mktemp("elsewhere")
    return [import_in_new_process(folder) for _ in range(3)]


def test_import_adds_less_than_a_second_to_torchs_own(imports: list[Import]) -> None:
    best = min(run.seconds for run in imports)

    assert best < LIMIT_SECONDS, f"import typed_moe took {best:.2f} s beyond torch's own import"


@pytest.mark.parametrize("library", NEVER_LOADED)
def test_import_does_not_load(library: str, imports: list[Import]) -> None:
    assert library not in imports[0].modules
