"""`typed-moe bench overhead`: both sides do the same, and the numbers are where they should be."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from tests.cli.calls import Cli, items, number, part
from typed_moe.cli import _app_bench, _bench
from typed_moe.cli._bench_calls import Pair, open_library, pairs

pytest.importorskip("flashinfer", reason="the calls are calls to it")


@pytest.fixture(scope="module")
def made() -> tuple[Pair, ...]:
    return pairs(open_library())


def _same(mine: object, theirs: object) -> bool:
    """Equal, tensors also in dtype and layout, and bit for bit."""
    if isinstance(mine, tuple) and isinstance(theirs, tuple):
        return len(mine) == len(theirs) and all(map(_same, mine, theirs))
    if isinstance(mine, Tensor) and isinstance(theirs, Tensor):
        layout = [(one.dtype, one.shape, one.stride()) for one in (mine, theirs)]
        return layout[0] == layout[1] and torch.equal(_bits(mine), _bits(theirs))
    return type(mine) is type(theirs) and mine == theirs


def _bits(tensor: Tensor) -> Tensor:
    """FP8 has no comparison of its own."""
    return tensor.reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("tokens", _bench.TOKENS)
def test_both_sides_make_the_same_call(made: tuple[Pair, ...], tokens: int) -> None:
    """One call each, to one entry point, with the same keywords and values."""
    entries: set[str] = set()
    for pair in made:
        mine, theirs = (_bench.recorded(pair, call, tokens) for call in (pair.runner, pair.by_hand))
        ((entry, keywords),) = mine
        ((entry_by_hand, keywords_by_hand),) = theirs
        assert entry == entry_by_hand
        entries.add(entry)
        _compare(entry, keywords, keywords_by_hand)
    assert len(entries) == 6


def _compare(entry: str, mine: Mapping[str, object], theirs: Mapping[str, object]) -> None:
    assert mine.keys() == theirs.keys(), entry
    different = [name for name in mine if not _same(mine[name], theirs[name])]
    assert not different, entry


def test_json(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every format, form and T, and medians of them."""
    monkeypatch.setattr(_bench, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(_app_bench, "bench_overhead", lambda steps: _bench.bench_overhead(steps, 3))
    done = cli("bench", "overhead", "--json")
    data = done.json()

    assert done.status == 0
    rows = items(data, "rows")
    assert {(row["format"], row["form"], row["tokens"]) for row in rows} == {
        (quant, form, tokens)
        for quant in ("bf16", "fp8_block", "nvfp4")
        for form in ("in-kernel", "precomputed")
        for tokens in (1, 8, 32, 256)
    }
    assert set(part(data, "ratio_by_tokens")) == {"1", "8", "32", "256"}
    assert set(part(data, "ratio_by_format")) == {"bf16", "fp8_block", "nvfp4"}
    ratios = sorted(number(row, "ratio") for row in rows)
    assert ratios[0] > 0
    assert number(data, "ratio") == pytest.approx(sum(ratios[11:13]) / 2)
    for row in rows:
        difference = number(row, "runner_us") - number(row, "by_hand_us")
        assert number(row, "difference_us") == pytest.approx(difference)


def test_table(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_bench, "_ROUND_SECONDS", 0.0)
    monkeypatch.setattr(_app_bench, "bench_overhead", lambda steps: _bench.bench_overhead(steps, 2))
    done = cli("bench", "overhead")

    assert done.status == 0
    assert (
        sum(
            line.startswith(("  bf16 ", "  fp8_block ", "  nvfp4 "))
            for line in done.out.splitlines()
        )
        == 24 + 3
    )


def test_without_flashinfer(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sentence that says what to install."""
    monkeypatch.setitem(sys.modules, "typed_moe.kernels._flashinfer", None)
    done = cli("bench", "overhead")

    assert done.status == 2
    assert "pip install typed-moe[flashinfer]" in done.err
    assert done.err.count("\n") == 1
