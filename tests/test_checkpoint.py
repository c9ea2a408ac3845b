"""Opening a checkpoint folder: safetensors only, lazily, and with a sentence for what is wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from typed_moe import CheckpointError
from typed_moe import checkpoint as checkpoint_module
from typed_moe.checkpoint import open_checkpoint

TENSORS: Mapping[str, Tensor] = {
    "model.layers.0.mlp.experts.0.up_proj.weight": torch.arange(12.0).reshape(3, 4),
    "model.layers.0.mlp.experts.1.up_proj.weight": torch.ones(3, 4, dtype=torch.bfloat16),
    "model.layers.0.mlp.experts.1.up_proj.weight_scale_inv": torch.tensor([[2.0]]),
    "model.layers.0.mlp.experts_gate.weight": torch.zeros(2, 4),
    "model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(3, 4).to(torch.float8_e4m3fn),
}
EXPERTS = "model.layers.0.mlp.experts"


def _single(folder: Path, name: str = "model.safetensors") -> Path:
    save_file(dict(TENSORS), folder / name)
    return folder


def _sharded(folder: Path) -> Path:
    """Every tensor in a shard of its own."""
    names = list(TENSORS)
    weight_map = {}
    for number, name in enumerate(names, start=1):
        shard = f"model-{number:05}-of-{len(names):05}.safetensors"
        save_file({name: TENSORS[name]}, folder / shard)
        weight_map[name] = shard
    _index(folder, weight_map)
    return folder


def _index(folder: Path, weight_map: object) -> None:
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("write", [_single, _sharded])
def test_every_tensor_is_read_as_stored(tmp_path: Path, write: object) -> None:
    """Names, values, shapes and dtypes, from one file and from shards."""
    assert callable(write)
    checkpoint = open_checkpoint(write(tmp_path))

    assert sorted(checkpoint.names) == sorted(TENSORS)
    for name, tensor in TENSORS.items():
        found = checkpoint.tensor(name)
        assert found.dtype is tensor.dtype
        assert torch.equal(found.float(), tensor.float())


def test_one_file_of_another_name_will_do(tmp_path: Path) -> None:
    """As fine-tuning tools write it; a string is a path too."""
    checkpoint = open_checkpoint(str(_single(tmp_path, "consolidated.safetensors")))

    assert len(checkpoint.names) == len(TENSORS)


def test_under_a_prefix(tmp_path: Path) -> None:
    """Only what is below it, without the prefix; a name that merely begins so is not."""
    found = dict(open_checkpoint(_sharded(tmp_path)).under(EXPERTS))

    assert set(found) == {
        "0.up_proj.weight",
        "1.up_proj.weight",
        "1.up_proj.weight_scale_inv",
    }
    assert torch.equal(found["0.up_proj.weight"], TENSORS[f"{EXPERTS}.0.up_proj.weight"])


def test_shards_are_opened_when_they_are_read(tmp_path: Path) -> None:
    """A broken shard does not hinder the others, and is named when its turn comes."""
    _sharded(tmp_path)
    (tmp_path / "model-00002-of-00005.safetensors").write_bytes(b"broken")
    checkpoint = open_checkpoint(tmp_path)

    stream = checkpoint.under(EXPERTS)

    assert next(stream)[0] == "0.up_proj.weight"
    with pytest.raises(CheckpointError, match=r"model-00002-of-00005\.safetensors is 6 bytes"):
        next(stream)


def test_a_missing_tensor_is_named_with_its_nearest(tmp_path: Path) -> None:
    """By name and by prefix; the latter before anything is read."""
    checkpoint = open_checkpoint(_single(tmp_path))

    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.experts\.7"):
        checkpoint.tensor("model.layers.1.mlp.experts.7.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"nearest is model\.layers\.1\.mlp\.experts\.0"):
        checkpoint.tensor("model.layers.1.mlp.experts.7.up_proj.weight")
    with pytest.raises(CheckpointError, match=r"no tensor below model\.layers\.2\.mlp"):
        checkpoint.under("model.layers.2.mlp")


def test_an_empty_checkpoint(tmp_path: Path) -> None:
    """A file without tensors is opened, and has nothing."""
    save_file({}, tmp_path / "model.safetensors")

    with pytest.raises(CheckpointError, match="has none at all"):
        open_checkpoint(tmp_path).tensor("weight")


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_truncated_file(tmp_path: Path, cut: int) -> None:
    """Nothing, half a length, half a header, all but the last byte."""
    path = _single(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])

    with pytest.raises(CheckpointError, match="truncated or corrupt: download it again"):
        open_checkpoint(tmp_path)


def test_a_corrupt_header(tmp_path: Path) -> None:
    """A git-lfs pointer in place of the file, and a length beyond all reason."""
    path = tmp_path / "model.safetensors"
    for content in (b"version https://git-lfs.github.com/spec/v1\n" * 4, b"\xff" * 64):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no whole safetensors file"):
            open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickles_are_refused(tmp_path: Path, name: str) -> None:
    """By name, unopened: the file is no pickle at all."""
    (tmp_path / name).write_bytes(b"never opened")

    with pytest.raises(CheckpointError, match=f"has {name} and no safetensors"):
        open_checkpoint(tmp_path)


def test_a_pickle_beside_safetensors_does_not_matter(tmp_path: Path) -> None:
    """The safetensors are read."""
    (_single(tmp_path) / "pytorch_model.bin").write_bytes(b"never opened")

    assert len(open_checkpoint(tmp_path).names) == len(TENSORS)


def test_folders_that_are_none(tmp_path: Path) -> None:
    """Not there, a file, empty."""
    file = tmp_path / "file"
    file.touch()
    for path, said in (
        (tmp_path / "absent", "is not there"),
        (file, "is a file"),
        (tmp_path, "has no .safetensors file"),
    ):
        with pytest.raises(CheckpointError, match=said):
            open_checkpoint(path)


def test_several_files_without_an_index(tmp_path: Path) -> None:
    """Which holds what is not guessed."""
    _single(tmp_path, "one.safetensors")
    _single(tmp_path, "two.safetensors")

    with pytest.raises(CheckpointError, match=r"2 \.safetensors files and no model"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_absent_shards(tmp_path: Path) -> None:
    """The absent ones are listed, the first three of them."""
    _sharded(tmp_path)
    for number in (1, 2, 4, 5):
        (tmp_path / f"model-{number:05}-of-00005.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"model-00004-of-00005\.safetensors and 1 more"):
        open_checkpoint(tmp_path)


def test_an_index_that_names_the_wrong_shard(tmp_path: Path) -> None:
    """The shard is there and has not the tensor."""
    _single(tmp_path, "shard.safetensors")
    _index(tmp_path, {"model.norm.weight": "shard.safetensors"})

    with pytest.raises(CheckpointError, match="though the index"):
        open_checkpoint(tmp_path).tensor("model.norm.weight")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": []}', "has no weight_map"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "beside the index"),
        ('{"weight_map": {"a": "/etc/model.safetensors"}}', "beside the index"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "beside the index"),
        ('{"weight_map": {"a": 3}}', "beside the index"),
    ],
)
def test_a_broken_index(tmp_path: Path, content: str, said: str) -> None:
    """No JSON, no map, shards outside of the folder or of another kind."""
    (tmp_path / "model.safetensors.index.json").write_text(content)

    with pytest.raises(CheckpointError, match=said):
        open_checkpoint(tmp_path)


def test_a_dtype_that_torch_has_not(tmp_path: Path) -> None:
    """Six-bit floats are in the safetensors format, and in no tensor."""
    header = json.dumps({"x": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    content = len(header).to_bytes(8, "little") + header + bytes(3)
    (tmp_path / "model.safetensors").write_bytes(content)

    with pytest.raises(CheckpointError, match=r"x of .* cannot be read: .*F6_E2M3"):
        open_checkpoint(tmp_path).tensor("x")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's refusal, as a sentence."""

    def refuse(path: Path, framework: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    _single(tmp_path)
    monkeypatch.setattr(checkpoint_module, "safe_open", refuse)

    with pytest.raises(CheckpointError, match=r"cannot be opened: .*Permission denied"):
        open_checkpoint(tmp_path)
