"""The plugin in SGLang's own plugin loader: found, in place, and loud where it is not."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import cast
from unittest import mock

import pytest
import torch

import typed_moe
from tests.sglang.layers import Block, SglangBlock
from typed_moe import UnsupportedRouting
from typed_moe.kernels._flashinfer_library import FlashInferLibrary
from typed_moe.sglang import Mode, Plugin, plugin
from typed_moe.sglang._ahead import LEADING_THERE, EnforcedLayerLike
from typed_moe.sglang._enforce import Enforcer
from typed_moe.sglang._mode import read_mode
from typed_moe.sglang._observe import Observer
from typed_moe.sglang._plugin import KERNEL_FUNCTIONS
from typed_moe.sglang._watch import watch

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
    SglangBlock(BLOCK)  # the first layer that runs them: the kernels' functions are hooked
    assert [hook.target for hook in trtllm.kernels] == list(KERNEL_FUNCTIONS)
    assert all(hook.taken() for hook in (*trtllm.hooks, *trtllm.kernels))


@pytest.mark.sglang
def test_a_kernels_function_that_is_gone_is_an_error_at_the_first_layer(trtllm: Plugin) -> None:
    import sglang.srt.layers.moe.moe_runner.flashinfer_trtllm as functions

    name = "fused_experts_none_to_flashinfer_trtllm_fp4"
    hooked, trtllm.kernels = trtllm.kernels, ()
    gone = getattr(functions, name)
    delattr(functions, name)
    try:
        with pytest.raises(UnsupportedRouting, match=rf"not in place.*\(\S*{name}\)"):
            SglangBlock(BLOCK)
        assert trtllm.kernels == ()
    finally:
        setattr(functions, name, gone)
        trtllm.kernels = hooked


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


@pytest.mark.sglang
def test_observe_changes_no_call(trtllm: Plugin) -> None:
    """The kernel is given what it is given with no hook on the function that calls it."""
    made = SglangBlock(BLOCK)
    x, logits = torch.randn(3, 256).bfloat16(), torch.randn(3, BLOCK.num_experts)
    with watch() as calls:
        output = made(x, logits)
        with ExitStack() as stack:
            for hook in trtllm.kernels:
                module, name = hook.target.rsplit(".", 1)
                owner = sys.modules[module]
                original = getattr(owner, name).__wrapped__
                stack.enter_context(mock.patch.object(owner, name, original))
            plain = made(x, logits)
    assert len(trtllm.observer.compared) == 1, "the first call was the hook's"
    first, second = calls
    assert first.entry_point == second.entry_point
    assert first.arguments.keys() == second.arguments.keys()
    for name, value in first.arguments.items():
        assert _same(value, second.arguments[name]), name
    assert torch.equal(output, plain)


def _same(one: object, other: object) -> bool:
    """The very tensor, or one of the same values: outputs and quantised activations are new."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype is other.dtype and torch.equal(
            one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
        )
    return one == other


@pytest.mark.sglang
def test_after_the_first_call_observe_is_a_test_of_a_flag(trtllm: Plugin) -> None:
    """Python functions of ours that a call runs: the hook, and its question to the observer."""
    made = SglangBlock(BLOCK)
    x, logits = torch.randn(3, 256).bfloat16(), torch.randn(3, BLOCK.num_experts)
    names = [_ours(lambda: made(x, logits)) for _ in range(3)]
    assert len(names[0]) > 100
    assert {"observe", "_compare", "differences"} <= set(names[0])
    assert names[1:] == [["around", "hook", "wants"]] * 2


def _ours(call: Callable[[], object]) -> list[str]:
    """The functions of this package that a call runs, in order."""
    folder = str(Path(typed_moe.__file__).parent)
    found: list[str] = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(folder):
            found.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


_START = """
import logging, sys, time
logging.basicConfig(level=logging.INFO)
from tests.sglang import stand_ins
stand_ins.install()
import sglang.srt.layers.moe.fused_moe_triton.layer
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
    # A single start has taken half as long again as the others: up to three, until one is in time.
    starts = [_seconds(out)]
    while starts[-1] >= 0.5 and len(starts) < 3:
        starts.append(_seconds(_start(TYPED_MOE_SGLANG="observe")[0]))
    assert starts[-1] < 0.5, starts


def _seconds(out: str) -> float:
    return float(out.split("SECONDS")[1].split(maxsplit=1)[0])


_OFF = """
import logging, os, pkgutil
logging.basicConfig(level=logging.INFO)
os.environ["TYPED_MOE_SGLANG"] = "off"
from tests.sglang import host, stand_ins
stand_ins.install()
import torch
from sglang.srt.arg_groups.choices import MOE_RUNNER_BACKEND_CHOICES
from sglang.srt.plugins import load_plugins
from tests.sglang import capture
from tests.sglang.layers import Block, SglangBlock
from typed_moe.sglang import active_plugin
from typed_moe.sglang._plugin import HOOKED, KERNEL_FUNCTIONS
from typed_moe.sglang._watch import watch

def found():
    names = (target.rsplit(".", 1) for target in (*HOOKED, *KERNEL_FUNCTIONS))
    return [getattr(pkgutil.resolve_name(owner), name) for owner, name in names]

def forward():
    torch.manual_seed(0)
    made = SglangBlock(Block(method="RenormalizeNaive", quant="bf16"))
    with watch() as calls, torch.no_grad():
        output = made(torch.randn(3, 256).bfloat16(), torch.randn(3, 8))
    return calls[0], output

host.publish("flashinfer_trtllm")
before, choices = found(), list(MOE_RUNNER_BACKEND_CHOICES)
with capture.kernels_on_cpu():
    first, one = forward()
    load_plugins()
    second, other = forward()
print("OBJECTS", len(before), all(a is b for a, b in zip(before, found(), strict=True)))
print("CHOICES", choices == list(MOE_RUNNER_BACKEND_CHOICES), active_plugin() is None)
same = {
    name: torch.equal(value, second.arguments[name])
    if isinstance(value, torch.Tensor) else value == second.arguments[name]
    for name, value in first.arguments.items()
}
print("CALLS", first.entry_point == second.entry_point, all(same.values()), len(same) > 10)
print("OUTPUT", torch.equal(one, other))
"""


@pytest.mark.sglang
def test_off_hooks_nothing() -> None:
    """The same function objects, the same kernel with the same arguments, and no backend of ours."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _OFF],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    told = [line for line in done.stdout.splitlines() if line.split()[0].isupper()]
    assert told == ["OBJECTS 7 True", "CHOICES True True", "CALLS True True True", "OUTPUT True"]
    assert "TYPED_MOE_SGLANG=off; SGLang runs by itself" in done.stderr


@pytest.mark.sglang
def test_sglangs_whitelist_leaves_it_out() -> None:
    out, _ = _start(SGLANG_PLUGINS="another")
    assert "HOOKED False" in out


class PackedLater:
    """A layer of compressed-tensors' NVFP4 as SGLang has made it: no `w13_weight` yet."""

    layer_id, is_draft = 0, False
    runner_backend = SimpleNamespace(value="flashinfer_trtllm")
    quant_method = object()
    moe_runner_config = SimpleNamespace(top_k=2)


def _no_library() -> FlashInferLibrary:
    raise AssertionError("nothing here calls FlashInfer")


@pytest.mark.sglang
def test_every_backend_that_leads_to_those_functions_is_known() -> None:
    """By SGLang's own questions to its backends."""
    from sglang.srt.layers.moe.utils import MoeRunnerBackend

    leading = {
        backend.value
        for backend in MoeRunnerBackend
        if backend.is_flashinfer_trtllm()
        or backend.is_flashinfer_trtllm_routed()
        or backend.is_flashinfer_mxfp4()
    }
    assert leading == LEADING_THERE


def test_enforce_hooks_the_kernels_from_the_start() -> None:
    """Some models call them by themselves: no layer would tell."""
    observer = Observer(lambda: "m", _no_library)
    plugins = {mode: Plugin(mode, observer, Enforcer(_no_library)) for mode in Mode}
    at_start = {hook.target for hook in plugins[Mode.ENFORCE].hooks}
    assert set(KERNEL_FUNCTIONS) <= at_start
    assert not set(KERNEL_FUNCTIONS) & {hook.target for hook in plugins[Mode.OBSERVE].hooks}


def test_a_method_that_is_not_ours_is_left_to_its_first_call() -> None:
    """Its weights may have other names when the layer is made, or be packed later."""
    Enforcer(_no_library).ahead.made(cast("EnforcedLayerLike", PackedLater()))
