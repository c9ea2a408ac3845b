"""The source files of SGLang's models: classes, who uses whom, which of them are models."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import final

import attrs

_PACKAGE = "sglang.srt.models"
ClassId = tuple[str, str]
"""Module below `sglang.srt.models`, and class."""


@final
@attrs.frozen(kw_only=True)
class Module:
    """One file, parsed.

    Attributes:
        name: below `sglang.srt.models`.
        tree: its syntax.
        imported: names that it has from another of SGLang's models, and where from.
        entry_classes: the model classes that SGLang registers from it.
    """

    name: str
    tree: ast.Module
    imported: Mapping[str, ClassId]
    entry_classes: tuple[str, ...]

    @property
    def classes(self) -> Iterator[ast.ClassDef]:
        """Its own."""
        return (one for one in self.tree.body if isinstance(one, ast.ClassDef))


@final
class Sources:
    """Every module below a folder of models."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @cached_property
    def modules(self) -> Mapping[str, Module]:
        """By name."""
        found = (_read(path, self._folder) for path in sorted(self._folder.rglob("*.py")))
        return {one.name: one for one in found}

    def model_classes(self, block: ClassId) -> tuple[str, ...]:
        """The registered models that build a class, through whatever is between."""
        users, found = self._users, {block}
        todo = [block]
        while todo:
            new = users.get(todo.pop(), frozenset()) - found
            found |= new
            todo += new
        return tuple(
            sorted(
                name
                for module in self.modules.values()
                for name in module.entry_classes
                if (module.name, name) in found
            )
        )

    def tensors(self, module: Module) -> Mapping[str, frozenset[str]]:
        """By class, of its own and imported ones: attributes always set to a tensor."""
        own = {one.name: _tensors(one) for one in module.classes}
        for alias, (other, name) in module.imported.items():
            for one in self.modules[other].classes if other in self.modules else ():
                if one.name == name:
                    own[alias] = _tensors(one)
        return own

    def _origin(self, found: ClassId) -> ClassId:
        """Where a class is from that a package hands on."""
        package = self.modules.get(f"{found[0]}.__init__")
        further = None if package is None else package.imported.get(found[1])
        return found if further is None else self._origin(further)

    @cached_property
    def _users(self) -> Mapping[ClassId, frozenset[ClassId]]:
        """Of each class, those that name it."""
        found: dict[ClassId, set[ClassId]] = {}
        for module in self.modules.values():
            here = {one.name: (module.name, one.name) for one in module.classes}
            known = {name: self._origin(one) for name, one in module.imported.items()} | here
            for one in module.classes:
                named = {node.id for node in ast.walk(one) if isinstance(node, ast.Name)}
                for name in named & known.keys():
                    found.setdefault(known[name], set()).add((module.name, one.name))
        return {used: frozenset(users) for used, users in found.items()}


def _read(path: Path, folder: Path) -> Module:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported: dict[str, ClassId] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{_PACKAGE}."):
            of = str(node.module).removeprefix(f"{_PACKAGE}.")
            imported |= {one.asname or one.name: (of, one.name) for one in node.names}
    name = ".".join(path.relative_to(folder).with_suffix("").parts)
    return Module(name=name, tree=tree, imported=imported, entry_classes=_entries(tree))


def _entries(tree: ast.Module) -> tuple[str, ...]:
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
            return tuple(one.id for one in ast.walk(node.value) if isinstance(one, ast.Name))
    return ()


def _tensors(block: ast.ClassDef) -> frozenset[str]:
    found: set[str] = set()
    for function in block.body:
        if not isinstance(function, ast.FunctionDef) or function.name != "__init__":
            continue
        for node in function.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                built = ast.unparse(node.value.func).split(".")[0]
                if built in {"nn", "torch"}:
                    found |= {one.attr for one in node.targets if isinstance(one, ast.Attribute)}
    return frozenset(found)
