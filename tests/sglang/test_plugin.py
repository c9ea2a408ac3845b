"""The plugin in SGLang's own plugin loader: found, in place, and loud where it is not."""

from __future__ import annotations

import dataclasses
import os
import statistics
import subprocess
import sys
from unittest import mock

import pytest
import torch

from tests.sglang.layers import Block, SglangBlock
from typed_moe import UnsupportedRouting
from typed_moe.sglang import Mode, Plugin, plugin
from typed_moe.sglang._mode import read_mode

BLOCK = Block(method="RenormalizeNaive", quant="bf16")


def test_the_mode_is_observe_if_nothing_is_asked() -> None:
    assert read_mode({}) is Mode.OBSERVE
    assert read_mode({"TYPED_MOE_SGLANG": "off"}) is Mode.OFF


def test_a_mode_that_there_is_not_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang logs an Exception of a plugin's and serves on; SystemExit it lets through."""
    monkeypatch.setenv("TYPED_MOE_SGLANG", "on")
    with pytest.raises(
        SystemExit, match="TYPED_MOE_SGLANG is 'on'; allowed: observe, enforce, off"
    ):
        plugin()


@pytest.mark.sglang
def test_every_hook_is_in_place(trtllm: Plugin) -> None:
    trtllm.check_hooks()


@pytest.mark.sglang
def test_a_hook_that_another_plugin_took_is_an_error_at_the_first_layer(trtllm: Plugin) -> None:
    from sglang.srt.layers.moe.topk import TopK

    def theirs(self: object, runner_backend: object, *, routing_method_type: object = None) -> None:
        del self, runner_backend, routing_method_type

    trtllm._checked = False
    with (
        mock.patch.object(TopK, "bind_runner_backend", theirs),
        pytest.raises(UnsupportedRouting, match=r"not in place.*TopK\.bind_runner_backend\)"),
    ):
        SglangBlock(BLOCK)
    SglangBlock(BLOCK)


@dataclasses.dataclass
class Newer:
    """A TopKConfig of a release that is not known."""

    top_k: int
    temperature: float = 1.0


@pytest.mark.sglang
def test_a_setting_that_is_gone_is_an_error_at_the_first_layer(trtllm: Plugin) -> None:
    import sglang.srt.layers.moe.topk as topk

    trtllm._checked = False
    with (
        mock.patch.object(topk, "TopKConfig", Newer),
        pytest.raises(UnsupportedRouting, match=r"has no \['apply_routed.*and has \['temperature"),
    ):
        SglangBlock(BLOCK)
    SglangBlock(BLOCK)


@pytest.mark.sglang
@pytest.mark.parametrize("mode", [Mode.OBSERVE, Mode.ENFORCE])
def test_a_setting_that_is_new(
    mode: Mode, trtllm: Plugin, caplog: pytest.LogCaptureFixture
) -> None:
    """Said where we only watch, refused where the calls are ours."""
    import sglang.srt.layers.moe.topk as topk

    newer = dataclasses.make_dataclass(
        "TopKConfig", [("temperature", float, 1.0)], bases=(topk.TopKConfig,)
    )
    trtllm.mode = mode
    try:
        with mock.patch.object(topk, "TopKConfig", newer):
            if mode is Mode.ENFORCE:
                with pytest.raises(UnsupportedRouting, match="temperature"):
                    trtllm.check_hooks()
            else:
                trtllm.check_hooks()
                assert "has ['temperature'], which is not read" in caplog.text
    finally:
        trtllm.mode = Mode.OBSERVE


@pytest.mark.sglang
def test_a_hook_around_ours_does_no_harm(trtllm: Plugin) -> None:
    """As SGLang's registry wraps: the attribute still leads to the hook."""
    import functools

    from sglang.srt.layers.moe.topk import TopK

    ours = TopK.bind_runner_backend

    @functools.wraps(ours)
    def around(*args: object, **kwargs: object) -> object:
        return ours(*args, **kwargs)

    with mock.patch.object(TopK, "bind_runner_backend", around):
        trtllm.check_hooks()


@pytest.mark.sglang
def test_a_number_without_a_name_is_an_error_at_construction(trtllm: Plugin) -> None:
    from sglang.srt.layers.moe.topk import TopK

    topk = TopK(2, layer_id=3)
    with pytest.raises(ValueError, match=r"routing_method_type is 77.*layer 3 computes Renormal"):
        topk.bind_runner_backend(None, routing_method_type=77)


@pytest.mark.sglang
def test_sglangs_result_is_handed_on(trtllm: Plugin) -> None:
    """The very tensor, and the same values as with nothing hooked."""
    made = SglangBlock(BLOCK)
    x, logits = torch.randn(3, 256).bfloat16(), torch.randn(3, BLOCK.num_experts)
    first, second = made(x, logits), made(x, logits)
    assert len(trtllm.observer.compared) == 1
    assert torch.equal(first, second)


_START = """
import logging, sys, time
logging.basicConfig(level=logging.INFO)
from tests.sglang import stand_ins
stand_ins.install()
import sglang.srt.layers.moe.fused_moe_triton.layer
import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm
from sglang.srt.plugins import load_plugins
start = time.process_time()
load_plugins()
print("SECONDS", time.process_time() - start)
from sglang.srt.layers.moe.topk import TopK
print("HOOKED", hasattr(TopK.bind_runner_backend, "__wrapped__"))
"""


def _start(**environment: str) -> tuple[str, str]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _START],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout, done.stderr


@pytest.mark.sglang
def test_the_start_up_log_and_time() -> None:
    """One line that says what is taken over; under half a second beyond SGLang's own imports."""
    out, log = _start(TYPED_MOE_SGLANG="observe")
    assert "HOOKED True" in out
    (line,) = (line for line in log.splitlines() if line.startswith("INFO:typed_moe.sglang:"))
    assert "TYPED_MOE_SGLANG=observe in SGLang 0.5.23" in line
    # The median of three: a single start has taken 0.62 s of CPU time where the others take 0.41.
    more = (_start(TYPED_MOE_SGLANG="observe")[0] for _ in range(2))
    seconds = statistics.median(_seconds(one) for one in (out, *more))
    assert seconds < 0.5


def _seconds(out: str) -> float:
    return float(out.split("SECONDS")[1].split(maxsplit=1)[0])


@pytest.mark.sglang
def test_off_hooks_nothing() -> None:
    out, log = _start(TYPED_MOE_SGLANG="off")
    assert "HOOKED False" in out
    assert "TYPED_MOE_SGLANG=off; SGLang runs by itself" in log


@pytest.mark.sglang
def test_sglangs_whitelist_leaves_it_out() -> None:
    out, _ = _start(SGLANG_PLUGINS="another")
    assert "HOOKED False" in out
