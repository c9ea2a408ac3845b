"""The user's mistakes: one sentence on stderr, exit status 2, nothing on stdout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.calls import Cli, Done
from tests.cli.folders import Folder, model_folder
from typed_moe.cli import _app, _memory


def _refused(done: Done) -> str:
    """The sentence, after looking at its form."""
    assert done.status == 2
    assert done.out == ""
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    return done.err.removeprefix("error: ").rstrip()


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (("run", "qwen3-30b"), ("qwen3-30b is no shipped config", "did you mean qwen3-30b-a3b")),
        (("run", "zzzzzz"), ("zzzzzz is no shipped config", "allowed: a config.json")),
        (("explain", "deepseek-v9"), ("did you mean", "deepseek-v")),
        (("run", "qwen3-30b-a3b", "--quant", "nvfp"), ("'nvfp'", "did you mean nvfp4", "mxfp8")),
        (("explain", "qwen3-30b-a3b", "--quant", "int4"), ("'int4'", "allowed: unquantized")),
        (("run", "qwen3-30b-a3b", "--tokens", "-1"), ("--tokens is -1", "allowed: 0 or more")),
        (("run", "qwen3-30b-a3b", "--tokens", "many"), ("--tokens", "integer")),
        (("run", "qwen3-30b-a3b", "--layer-scale", "0"), ("--layer-scale is 0.0", "up to 1")),
        (("run", "qwen3-30b-a3b", "--layer-scale", "1.5"), ("--layer-scale is 1.5",)),
        (("run", "qwen3-30b-a3b", "--layer-scale", "nan"), ("--layer-scale is nan",)),
        (("run", "qwen3-30b-a3b", "--seed", "-3"), ("--seed is -3", "allowed: 0 to")),
        (("run", "qwen3-30b-a3b", "--layer", "48"), ("layer_id is 48", "= 47")),
        (("run", "deepseek-v3", "--layer", "0"), ("layer 0", "dense", "first_k_dense_replace")),
        (("run", "deepseek-v4-flash", "--layer", "1"), ("table of token ids",)),
        (("run", "qwen3-30b-a3b", "--checkpoint", "/no/such"), ("/no/such is not there",)),
        (
            ("run", "qwen3-30b-a3b", "--checkpoint", "/", "--layer-scale", "0.5"),
            ("--layer-scale is 0.5", "--checkpoint", "leave out one"),
        ),
        (("run",), ("Missing argument", "MODEL")),
        (("walk",), ("No such command 'walk'",)),
        (("run", "qwen3-30b-a3b", "--fast"), ("No such option: --fast",)),
    ],
)
def test_a_wrong_argument(cli: Cli, argv: tuple[str, ...], parts: tuple[str, ...]) -> None:
    """The sentence has what was given and what is allowed."""
    sentence = _refused(cli(*argv))

    for part in parts:
        assert part in sentence


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('{"model_type": ', ("is no JSON", "config.json")),
        ("[1, 2]", ("JSON list", "allowed: an object")),
        ('{"model_type": "llama", "hidden_size": 8}', ("not a mixture-of-experts config",)),
        ('{"hidden_size": 8}', ("model_type is None",)),
        ('{"model_type": "new_moe", "num_experts": 8}', ("'new_moe'", "is not known")),
        ('{"model_type": "qwen3_moe", "num_hidden_layers": 1}', ("is missing",)),
    ],
)
@pytest.mark.parametrize("command", ["run", "explain"])
def test_a_wrong_config(
    cli: Cli, tmp_path: Path, command: str, content: str, parts: tuple[str, ...]
) -> None:
    """Broken JSON, another JSON, a dense model, an unknown or an incomplete one."""
    path = tmp_path / "config.json"
    path.write_text(content)

    for given in (path, tmp_path):
        sentence = _refused(cli(command, str(given)))
        assert str(tmp_path) in sentence
        for part in parts:
            assert part in sentence


def test_a_config_that_is_no_text(cli: Cli, tmp_path: Path) -> None:
    """Bytes that are no UTF-8."""
    path = tmp_path / "config.json"
    path.write_bytes(b"\xff\xfe\x00\x80")

    assert "is no JSON" in _refused(cli("explain", str(path)))


def test_a_folder_without_a_config(cli: Cli, tmp_path: Path) -> None:
    """The folder is named."""
    assert f"{tmp_path} has no config.json" in _refused(cli("run", str(tmp_path)))


def test_a_width_that_the_format_cannot_hold(cli: Cli, tmp_path: Path) -> None:
    """MXFP4 has groups of 32 values; 24 is no multiple."""
    path = model_folder(tmp_path, "qwen3-30b-a3b", moe_intermediate_size=24).path

    for command in ("run", "explain"):
        sentence = _refused(cli(command, str(path), "--quant", "mxfp4"))
        assert "24, not a multiple of 32" in sentence


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """A small DeepSeek-V3 with a checkpoint."""
    return model_folder(tmp_path, "deepseek-v3")


def _run(cli: Cli, folder: Folder) -> str:
    return _refused(cli("run", str(folder.path), "--checkpoint", str(folder.path)))


def test_a_truncated_checkpoint(cli: Cli, folder: Folder) -> None:
    """Half a file."""
    path = folder.path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert "truncated or corrupt" in _run(cli, folder)


def test_a_pickle_is_refused(cli: Cli, folder: Folder) -> None:
    """A folder with a .bin alone."""
    (folder.path / "model.safetensors").rename(folder.path / "pytorch_model.bin")

    assert "pytorch_model.bin and no safetensors" in _run(cli, folder)


def test_a_checkpoint_of_another_model(cli: Cli, folder: Folder) -> None:
    """Names that are not the config's."""
    folder.write({f"other.{name}": tensor for name, tensor in folder.tensors.items()})

    assert f"has no tensor {folder.spec.gate_name}" in _run(cli, folder)


@pytest.mark.parametrize("missing", ["gate", "bias", "expert", "projection"])
def test_a_missing_tensor(cli: Cli, folder: Folder, missing: str) -> None:
    """The router's weight, the correction bias, a whole expert, one of its projections."""
    spec = folder.spec
    start, said = {
        "gate": (spec.gate_name, spec.gate_name),
        "bias": (spec.correction_bias_name or "", "e_score_correction_bias"),
        "expert": (f"{spec.experts_prefix}.5.", "experts 5 are missing"),
        "projection": (f"{spec.experts_prefix}.5.up_proj", "up_proj is missing"),
    }[missing]
    folder.write({n: t for n, t in folder.tensors.items() if not n.startswith(start)})

    assert said in _run(cli, folder)


def test_a_wrong_shape(cli: Cli, folder: Folder) -> None:
    """A projection and a router of other sizes than the config says."""
    name = f"{folder.spec.experts_prefix}.2.gate_proj.weight"
    folder.write({**folder.tensors, name: folder.tensors[name][:, :32]})
    assert "(32, 32); allowed: (32, 64)" in _run(cli, folder)

    folder.write({**folder.tensors, folder.spec.gate_name: folder.gate[:4]})
    assert "shape (4, 64); allowed" in _run(cli, folder)


def test_a_wrong_dtype(cli: Cli, folder: Folder) -> None:
    """An expert in int32 and a correction bias in int64."""
    name = f"{folder.spec.experts_prefix}.2.gate_proj.weight"
    folder.write({**folder.tensors, name: folder.tensors[name].int()})
    assert "torch.int32" in _run(cli, folder)

    bias_name, bias = folder.spec.correction_bias_name, folder.bias
    assert bias_name is not None
    assert bias is not None
    folder.write({**folder.tensors, bias_name: bias.long()})
    assert "torch.int64" in _run(cli, folder)


@pytest.mark.parametrize("where", ["gate", "bias", "expert"])
def test_nan_in_a_checkpoint(cli: Cli, folder: Folder, where: str) -> None:
    """A NaN in the router, the correction bias or an expert."""
    spec = folder.spec
    name = {
        "gate": spec.gate_name,
        "bias": spec.correction_bias_name or "",
        "expert": f"{spec.experts_prefix}.2.down_proj.weight",
    }[where]
    tensor = folder.tensors[name].clone()
    tensor.flatten()[3] = float("nan")
    folder.write({**folder.tensors, name: tensor})

    assert "NaN" in _run(cli, folder)


def test_no_shared_expert_to_fuse_in_the_checkpoint(cli: Cli, folder: Folder) -> None:
    """The config has one and the checkpoint has not."""
    done = cli("run", str(folder.path), "--checkpoint", str(folder.path), "--fused-shared")

    assert "has no shared expert" in _refused(done)


def test_more_than_the_memory_holds(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before anything is drawn, with a scale that fits."""
    monkeypatch.setattr(_memory, "available_bytes", lambda: 8 << 30)

    sentence = _refused(cli("run", "deepseek-v3", "--quant", "fp8_block"))

    assert "8 GiB free" in sentence
    scale = float(sentence.rpartition("--layer-scale ")[2])
    widths = [max(1, round(width * scale / 128)) * 128 for width in (7168, 2048)]
    stored_and_drawn = 256 * 3 * widths[0] * widths[1] * (1 + 2)
    assert stored_and_drawn < 7 << 30
    assert stored_and_drawn > 3 << 30


def test_available_memory_is_what_the_system_says() -> None:
    """Of this machine: more than nothing, not more than there is."""
    whole = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())[
        "MemTotal"
    ]

    found = _memory.available_bytes()

    assert found is not None
    assert 0 < found <= int(whole.split()[0]) * 1024


def test_memory_is_not_guessed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The smaller of the machine's and the container's; None, and no refusal, where neither says."""
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    monkeypatch.setattr(_memory, "_MEMINFO", meminfo)
    monkeypatch.setattr(_memory, "_CGROUP", limit)

    assert _memory.available_bytes() is None
    _memory.check_memory("model", 1 << 60, 1.0)

    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:  70 kB\n")
    assert _memory.available_bytes() == 70 * 1024
    limit.write_text("max\n")
    assert _memory.available_bytes() == 70 * 1024
    limit.write_text("2048\n")
    assert _memory.available_bytes() == 2048


def test_an_interrupted_command(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C ends it without a traceback, with the shell's status for it."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_app, "configs", interrupted)

    done = cli("configs")

    assert (done.status, done.out, done.err) == (130, "", "")


def _process(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "typed_moe", *argv],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_exit_status_and_streams_of_a_process() -> None:
    """0 with JSON alone on stdout; 2 with one sentence on stderr."""
    good = _process("run", "mixtral-8x7b", "--layer-scale", "0.01", "--tokens", "2", "--json")
    bad = _process("run", "mixtral-8x7", "--json")

    assert (good.returncode, good.stderr) == (0, "")
    assert json.loads(good.stdout)["accuracy"]["passed"] is True
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("error: mixtral-8x7 is no shipped config")
    assert bad.stderr.count("\n") == 1
