"""The command line as a fixture."""

from __future__ import annotations

import pytest

from tests.cli.calls import Cli, Done
from typed_moe.cli import main


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process, on a terminal of 80 columns that is none."""
    monkeypatch.setenv("COLUMNS", "80")

    def call(*argv: str) -> Done:
        status = main(argv)
        out, err = capsys.readouterr()
        return Done(status=status, out=out, err=err)

    return call
