"""The promises of the types, checked by mypy and pyright and counted as tests.

The files of tests/typing are never executed. Each checker reads all of them once, in one run,
together with a copy of each without its ignores:

* the files as they are must be free of errors, and of ignores that are not needed;
* in a copy, the lines that had an ignore, and no others, must show the error that it names.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import attrs
import pytest
from typing_extensions import override

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "tests" / "typing").glob("*.py"))
WITH_IGNORES = [file for file in FILES if "ignore[" in file.read_text()]
CHECKERS = ("mypy", "pyright")
IGNORE = {
    "mypy": re.compile(r"  # type: ignore\[(?P<codes>[\w, -]+)\]"),
    "pyright": re.compile(r"  # pyright: ignore\[(?P<codes>[\w, -]+)\]"),
}

# Both checkers run once, in whichever process gets these tests: all of them go to one.
pytestmark = pytest.mark.xdist_group("typing")


@attrs.frozen(kw_only=True)
class Finding:
    """One error that a checker reports; its code is mypy's error code or pyright's rule."""

    file: Path
    line: int
    code: str
    message: str

    @override
    def __str__(self) -> str:
        return f"{self.file.name}:{self.line}: {self.message} [{self.code}]"


Findings = Mapping[str, list[Finding]]
Lines = dict[int, set[str]]


def run_checker(checker: str, *arguments: str) -> str:
    """The report of a checker; both exit with 0 or 1 if they came to the end."""
    done = subprocess.run(
        [sys.executable, "-m", checker, *arguments],
        cwd=ROOT,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


def run_mypy(files: list[str]) -> list[Finding]:
    """With the project's mypy.ini and its cache."""
    report = run_checker("mypy", "--config-file", "mypy.ini", "--output", "json", *files)
    entries = [json.loads(line) for line in report.splitlines() if line.startswith("{")]
    return [
        Finding(
            file=(ROOT / entry["file"]).resolve(),
            line=entry["line"],
            code=entry["code"],
            message=entry["message"],
        )
        for entry in entries
        if entry["severity"] == "error"
    ]


def run_pyright(files: list[str]) -> list[Finding]:
    """With the settings of pyproject.toml, and this interpreter's packages."""
    report = run_checker("pyright", "--pythonpath", sys.executable, "--outputjson", *files)
    return [
        Finding(
            file=Path(entry["file"]).resolve(),
            line=entry["range"]["start"]["line"] + 1,
            code=entry.get("rule", "syntax"),
            message=entry["message"],
        )
        for entry in json.loads(report)["generalDiagnostics"]
        if entry["severity"] == "error"
    ]


def bare(file: Path, folder: Path) -> Path:
    """Where the copy of a file without its ignores lies."""
    return folder / f"bare_{file.name}"


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The copies without ignores."""
    made = tmp_path_factory.mktemp("bare").resolve()
    for file in WITH_IGNORES:
        text = file.read_text()
        for pattern in IGNORE.values():
            text = pattern.sub("", text)
        # mypy's cache knows a file by its text, and would report the last run's folder.
        bare(file, made).write_text(f"{text}# {made}\n")
    return made


@pytest.fixture(scope="session")
def findings(folder: Path) -> Findings:
    """What each checker reports over all files and all copies."""
    files = [str(file.relative_to(ROOT)) for file in FILES]
    files += [str(file) for file in sorted(folder.iterdir())]
    return {"mypy": run_mypy(files), "pyright": run_pyright(files)}


def errors_of(findings: list[Finding], file: Path) -> Lines:
    """The codes of the errors in a file, by line."""
    lines: Lines = {}
    for finding in findings:
        if finding.file == file:
            lines.setdefault(finding.line, set()).add(finding.code)
    return lines


def ignores_of(checker: str, file: Path) -> Lines:
    """The codes that a file's ignores name for a checker, by line."""
    return {
        number: set(found["codes"].split(", "))
        for number, line in enumerate(file.read_text().splitlines(), start=1)
        if (found := IGNORE[checker].search(line))
    }


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_promised_types_hold(file: Path, checker: str, findings: Findings) -> None:
    errors = [str(finding) for finding in findings[checker] if finding.file == file]

    assert errors == []


@pytest.mark.parametrize("checker", CHECKERS)
@pytest.mark.parametrize("file", WITH_IGNORES, ids=lambda file: file.stem)
def test_acceptance_34_wrong_calls_are_type_errors(
    file: Path, checker: str, findings: Findings, folder: Path
) -> None:
    """Without its ignores a file has exactly the errors that they name, line by line."""
    assert errors_of(findings[checker], bare(file, folder)) == ignores_of(checker, file)


@pytest.mark.parametrize("checker", CHECKERS)
def test_acceptance_34_covers_the_history(checker: str) -> None:
    """Each kind of mistake that was made in this field has its line in near_misses.py."""
    near_misses = ROOT / "tests" / "typing" / "near_misses.py"
    wrong = ignores_of(checker, near_misses)
    lines = near_misses.read_text().splitlines()
    wrong_lines = [lines[number - 1] for number in wrong]

    for mistake in (
        "routing=2,",  # a strategy given as an int
        "intermediate_size=768, quant=quant)",  # no strategy given
        "routing=None,",
        'routing="deepseek_v3",',
        "return ids, weights",  # results without names
        "Routed(weights, ids)",
        "takes_global(local)",  # local ids where global ids are expected, and the reverse
        "takes_local(routed.topk_ids)",
        "Routed(topk_ids=local,",
        "class Mine(Llama4):",  # a label inherited from a parent
    ):
        assert any(mistake in line for line in wrong_lines), mistake
