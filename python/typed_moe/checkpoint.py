"""A Hugging Face checkpoint folder, opened as safetensors only and read by name.

No pickle is ever loaded: a `.bin` or `.pt` file can run code, a `.safetensors` file cannot.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol, cast, final

import attrs
from safetensors import SafetensorError, safe_open
from torch import Tensor

from typed_moe.errors import CheckpointError

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


class _File(Protocol):
    """What we use of safetensors' handle, which its stub leaves untyped."""

    def keys(self) -> list[str]: ...

    def get_tensor(self, name: str) -> Tensor: ...


@final
@attrs.frozen(kw_only=True, eq=False)
class Checkpoint:
    """The tensors of a checkpoint by name. A file is opened when a tensor of it is first read.

    Attributes:
        folder: where it is.
        files: the file that holds each tensor, by the tensor's name.
    """

    folder: Path
    files: Mapping[str, Path] = attrs.field(repr=False)
    _open: dict[Path, _File] = attrs.field(factory=dict, init=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """Every tensor's name, in the checkpoint's order."""
        return tuple(self.files)

    def tensor(self, name: str) -> Tensor:
        """One tensor, as stored; its values stay in the mapped file until they are used.

        Args:
            name: out of `names`.

        Raises:
            CheckpointError: there is no such tensor, or the file that should have it is missing,
                broken, or has it not.
        """
        path = self.files.get(name)
        if path is None:
            raise CheckpointError(
                f"{self.folder} has no tensor {name}; {self._nearest(name)}. Is it this model's "
                "checkpoint?"
            )
        if path not in self._open:
            self._open[path] = _open_file(path)
        file = self._open[path]
        if name not in file.keys():  # noqa: SIM118 - a handle, which is no container
            raise CheckpointError(
                f"{path} has no tensor {name}, though the index of {self.folder} says so; "
                "download the shard and its index again, from one revision"
            )
        try:
            return file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{name} of {path} cannot be read: {error}") from error

    def under(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The tensors below a prefix, lazily, named without it.

        Args:
            prefix: such as `model.layers.0.mlp.experts`, without a dot at the end.

        Returns:
            (relative name, tensor), in the checkpoint's order.

        Raises:
            CheckpointError: at once, there are none; on the way, as for `tensor`.
        """
        start = f"{prefix}."
        names = [name for name in self.files if name.startswith(start)]
        if not names:
            raise CheckpointError(
                f"{self.folder} has no tensor below {prefix}; {self._nearest(prefix)}. Is it this "
                "model's checkpoint, and this layer's shard?"
            )
        return ((name.removeprefix(start), self.tensor(name)) for name in names)

    def _nearest(self, name: str) -> str:
        """What the checkpoint has that begins most like a name."""
        if not self.files:
            return "it has none at all"
        nearest = max(self.files, key=lambda known: _common(known, name))
        return f"among its {len(self.files)} tensors the nearest is {nearest}"


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder; reads its index or one file's header, no tensor.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its shards, or
            one file `*.safetensors` of any other name.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: no such folder, no safetensors in it, an index that is broken or that
            names files which are not there, or a file that is truncated or corrupt.
    """
    folder = Path(folder)
    if not folder.is_dir():
        what = "a file" if folder.exists() else "not there"
        raise CheckpointError(
            f"the checkpoint folder {folder} is {what}; allowed: a folder with {_SINGLE}, or "
            f"with {_INDEX} and its shards"
        )
    single = folder / _SINGLE
    if single.is_file():
        return _from_file(folder, single)
    if (folder / _INDEX).is_file():
        return _from_index(folder, folder / _INDEX)
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return _from_file(folder, found[0])
    raise _no_checkpoint(folder, found)


def _no_checkpoint(folder: Path, found: list[Path]) -> CheckpointError:
    if found:
        return CheckpointError(
            f"{folder} has {len(found)} .safetensors files and no {_INDEX} that says which holds "
            "what; add the index of the same revision"
        )
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        return CheckpointError(
            f"{folder} has {pickles[0]} and no safetensors; allowed: safetensors only, because "
            "a pickle runs code when it is opened. Convert it with safetensors, or download the "
            "model's safetensors revision"
        )
    return CheckpointError(
        f"{folder} has no .safetensors file; allowed: {_SINGLE}, or {_INDEX} and its shards"
    )


def _from_file(folder: Path, path: Path) -> Checkpoint:
    return Checkpoint(folder=folder, files=dict.fromkeys(_open_file(path).keys(), path))


def _from_index(folder: Path, index: Path) -> Checkpoint:
    shards = {name: folder / shard for name, shard in _weight_map(index).items()}
    absent = sorted({path.name for path in shards.values() if not path.is_file()})
    if absent:
        raise CheckpointError(
            f"{index} names {_some(absent)}, which {folder} does not have; download the missing "
            "shards"
        )
    return Checkpoint(folder=folder, files=shards)


def _weight_map(index: Path) -> dict[str, str]:
    """The index's tensor name -> shard's file name."""
    try:
        data: object = json.loads(index.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{index} is no JSON: {error}; download it again") from error
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict):
        raise CheckpointError(
            f"{index} has no weight_map; allowed: a JSON object with weight_map, from each "
            "tensor's name to its shard"
        )
    for name, shard in weight_map.items():
        # A path could lead out of the folder.
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or _is_path(shard):
            raise CheckpointError(
                f"{index} has {name} in {shard!r}; allowed: the name of a .safetensors file "
                "beside the index"
            )
    return {str(name): str(shard) for name, shard in weight_map.items()}


def _common(one: str, other: str) -> int:
    """How many characters two names have in common from the left."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (left, right) in pairs if left != right), min(len(one), len(other)))


def _is_path(name: str) -> bool:
    return Path(name).name != name or "\\" in name


def _open_file(path: Path) -> _File:
    try:
        handle = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(
            f"{path} is {path.stat().st_size} bytes and no whole safetensors file ({error}); "
            "truncated or corrupt: download it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened: {error}") from error
    return cast("_File", handle)


def _some(names: list[str]) -> str:
    """The first three of them."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
