"""SGLang in this process, once; skipped where it is not installed."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.calls import Cli, Done
from typed_moe.cli import main
from typed_moe.sglang import Plugin, active_plugin
from typed_moe.sglang._observe import Observer
from typed_moe.sglang._plugin import installed_flashinfer

INSTALLED = importlib.util.find_spec("sglang") is not None

if INSTALLED:
    # SGLang reads these when it is imported. Its CPU engine is a build of its own, which is not on
    # PyPI; compiling the grouped top-k takes half a minute and a C compiler.
    os.environ.setdefault("SGLANG_USE_CPU_ENGINE", "0")
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    from tests.sglang import stand_ins

    stand_ins.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs SGLang where it is not installed."""
    if INSTALLED:
        return
    skip = pytest.mark.skip(reason="sglang is not installed here; `make test-sglang` has it")
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and item.get_closest_marker("sglang"):
            item.add_marker(skip)


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run a command in this process."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*argv: str) -> Done:
        status = main(argv)
        out, err = capsys.readouterr()
        return Done(status=status, out=out, err=err)

    return call


@pytest.fixture(scope="session")
def sglang_host() -> None:
    """Server arguments and process groups, as SGLang's start-up makes them."""
    from tests.sglang import host

    host.publish()


@pytest.fixture
def trtllm(sglang_host: None) -> Iterator[Plugin]:
    """Backend flashinfer_trtllm and the plugin, loaded as SGLang does it; nothing is seen yet."""
    import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm  # noqa: F401 - registers its functions
    from sglang.srt.plugins import load_plugins

    from tests.sglang import capture, host

    load_plugins()
    plugin = active_plugin()
    assert plugin is not None, "the entry point is not found: is the package installed here?"
    plugin.observer = Observer(lambda: "TinyForCausalLM", installed_flashinfer)
    host.publish("flashinfer_trtllm")
    with capture.kernels_on_cpu():
        yield plugin
    host.publish()


@pytest.fixture
def typed_moe(sglang_host: None) -> Iterator[Plugin]:
    """`--moe-runner-backend typed_moe`, and the plugin, loaded as SGLang does it."""
    from sglang.srt.plugins import load_plugins

    from tests.sglang import host

    load_plugins()
    plugin = active_plugin()
    assert plugin is not None, "the entry point is not found: is the package installed here?"
    host.publish("typed_moe")
    yield plugin
    host.publish()
