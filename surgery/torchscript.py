"""TorchScript archives: the weights of a program, under the names that torch.jit.load(FILE).state_dict() gives them.

Nothing of the program is compiled or run. data.pkl holds the modules as objects with their attributes, and is read as
data. Which attributes are parameters and which are buffers only the program says, in the heads of its classes, which
are read as text. As in torch (csrc/jit/api/module.h), a buffer is listed as one and has the type Tensor; where a class
lists none, as before the lists were introduced, every attribute of that type is one, which is how torch had it then.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from surgery.archive import DAMAGE, reason
from surgery.errors import CheckpointError
from surgery.pickled import Names, folder_of, pickle_of
from surgery.reader import LocalFile, Reader
from surgery.restricted import LARGEST, Placeholder
from surgery.stored import StoredReader, StoredTensor, ZipStorages

_AGAIN = "The file is incomplete or damaged. Download or copy it again."
_CLASS = re.compile(r"class (\w+)\((\w*)\):")
_LISTED = re.compile(r"  __(parameters|buffers)__ = \[(.*)\]")
_ATTRIBUTE = re.compile(r'  (?:__annotations__\["(?P<odd>.*)"\] =|(?P<name>\w+) :) (?P<type>\S.*)')
_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')


@dataclass
class _Class:
    """The head of a class. `types` are of its attributes, in order; no `buffers` where it does not list them."""

    module: bool
    parameters: frozenset[str] = frozenset()
    buffers: frozenset[str] | None = None
    types: dict[str, str] = field(default_factory=dict)


def is_archive(names: list[str]) -> bool:
    """Whether a zip with these members is a program of TorchScript's; torch tells it by the same."""
    return any(name == "constants.pkl" or name.endswith("/constants.pkl") for name in names)


def open(path: Path) -> Reader:
    file = LocalFile(path)
    try:
        with zipfile.ZipFile(path) as archive:
            folder = folder_of(archive)
            root = pickle_of(archive, f"{folder}data.pkl").value
            names = Names()
            odd: list[str] = []
            _gather(root, _Program(archive, folder), names, odd)
            storages = ZipStorages(file, archive, folder)
            constants = sum(name.startswith(f"{folder}constants/") for name in archive.namelist())
    except DAMAGE as error:
        raise CheckpointError(
            f"{path}: a TorchScript archive that cannot be read: {reason(error)}", hint=_AGAIN
        ) from error
    if not names.found:
        raise CheckpointError(
            f"{path}: a TorchScript archive without parameters or buffers",
            hint="It may have been frozen, so that its weights are constants of the program. Get the one before that.",
        )
    reader = StoredReader(path, names.found, storages)
    notes = ["A TorchScript archive: its weights were read, and its program was neither compiled nor run."]
    if constants:
        notes.append(f"{constants} constants of the program are not among the weights, and are left out.")
    if odd:
        notes.append(f"Weights packed in a way of their own, and left out: {', '.join(odd[:8])}.")
    reader.notes = tuple(notes)
    return reader


def _gather(module: object, program: _Program, names: Names, odd: list[str]) -> None:
    if not isinstance(module, Placeholder):
        raise ValueError("its root is no module")
    head = program.head(module.kind)
    attributes = module.attributes
    tensors = [name for name in attributes if head.types.get(name) == "Tensor"]
    parameters = [name for name in tensors if name in head.parameters]
    listed = tensors if head.buffers is None else head.buffers
    buffers = [name for name in tensors if name in listed and name not in head.parameters]
    for name in (*parameters, *buffers):
        if isinstance(attributes[name], StoredTensor):
            names.add(name, attributes[name])
        elif attributes[name] is not None:
            odd.append(name)
    for name, value in attributes.items():
        if isinstance(value, Placeholder) and isinstance(name, str):
            if value.kind.startswith("__torch__.torch.classes."):
                odd.append(f"{name} ({value.kind.removeprefix('__torch__.torch.classes.')})")
            elif value.kind.startswith("__torch__") and program.head(value.kind).module:
                with names.inside(name):
                    _gather(value, program, names, odd)


class _Program:
    """The heads of the classes of an archive, each read when it is asked for."""

    def __init__(self, archive: zipfile.ZipFile, folder: str) -> None:
        self._archive, self._folder = archive, folder
        self._heads: dict[str, Mapping[str, _Class]] = {}

    def head(self, kind: str) -> _Class:
        """Of a class by its qualified name: "__torch__.package.Class" is in code/__torch__/package.py."""
        module, _, name = kind.rpartition(".")
        if module not in self._heads:
            member = f"{self._folder}code/{module.replace('.', '/')}.py"
            if self._archive.getinfo(member).file_size > LARGEST:
                raise ValueError(f"{member} is a program of {self._archive.getinfo(member).file_size:,} bytes")
            self._heads[module] = _classes(self._archive.read(member).decode())
        return self._heads[module][name]


def _classes(text: str) -> dict[str, _Class]:
    """The heads of the classes in a source file, which TorchScript prints one statement a line."""
    found: dict[str, _Class] = {}
    head: _Class | None = None
    for line in text.splitlines():
        if opened := _CLASS.match(line):
            head = found[opened[1]] = _Class(opened[2] == "Module")
        elif head is None or line.startswith("  def "):
            head = None
        elif listed := _LISTED.match(line):
            setattr(head, listed[1], frozenset(_QUOTED.findall(listed[2])))
        elif declared := _ATTRIBUTE.match(line):
            name = declared["name"] or declared["odd"]
            head.types.setdefault(name, declared["type"])
    return found
