"""Files of torch.save that torch itself refuses to load as weights only: they are read as data, and nothing is run.

People's files hold an argparse.Namespace, a config of their own class, sometimes the whole module. Placeholders stand
in for all that; only tensors are read. A file that would reach for the system is refused all the same: nobody who
wants to give away weights writes that, and others load such files with less care.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.archive import DAMAGE, is_pickle_record, reason
from surgery.errors import CheckpointError
from surgery.memory import state_dict_in
from surgery.reader import LocalFile, Reader
from surgery.restricted import LARGEST, Content, Placeholder, read, read_bytes
from surgery.stored import Storages, StoredReader, StreamStorages, ZipStorages

_AGAIN = "The file is incomplete or damaged. Download or copy it again."
_PICKLES_BEFORE = 3  # the older stream: a magic number, the protocol and a word on the machine, then the content
_NAMES = 1_000_000  # parts of a module, each counted once for each way to it
_DEPTH = 200

# What runs commands, code, or the loader of either.
_SYSTEM = (
    "os.", "posix.", "nt.", "subprocess.", "pty.", "popen2.", "commands.", "socket.", "shutil.", "ctypes.", "sys.",
    "io.open", "_io.open", "io.FileIO", "_io.FileIO", "webbrowser.", "runpy.", "importlib.", "pydoc.", "timeit.",
    "code.interact", "code.Interactive", "cProfile.run", "profile.run", "pdb.", "bdb.", "asyncio.", "pip.", "imp.load",
    "pickle.", "_pickle.", "cPickle.", "marshal.", "types.FunctionType", "types.CodeType", "torch.load",
    "torch.serialization.", "torch.hub.", "torch.utils.cpp_extension.", "numpy.testing.",
)  # fmt: skip
_RUNNING = ("eval", "exec", "execfile", "compile", "open", "file", "input", "__import__", "breakpoint", "globals")
_BUILTINS = frozenset(f"builtins.{name}" for name in _RUNNING)


def open(path: Path, *, zipped: bool, key: str | None = None) -> Reader:
    """A reader of a zip of torch.save, or of the stream that it wrote before 1.6; `key` is the entry that is meant."""
    file = LocalFile(path)
    try:
        content, storages = _zip(path, file) if zipped else _stream(file)
        weights = simplified(content.value)
    except DAMAGE as error:
        raise CheckpointError(f"{path}: cannot be read: {reason(error)}", hint=_AGAIN) from error
    harmful = harmful_names(content.kinds)
    if harmful:
        raise CheckpointError(
            f"{path}: holds more than tensors: unpickling it would call {', '.join(harmful)}. Nothing of it was run",
            hint="Do not load it anywhere. Look for the same weights as safetensors, from where they were published.",
        )
    found = state_dict_in(weights, str(path), f'surgery.open("{path}", key=KEY)', key)
    reader = StoredReader(path, found.tensors, storages)
    reader.notes, reader.metadata = (*stood_in(content.kinds), *found.notes), found.metadata
    reader.prefix = found.prefix
    return reader


def harmful_names(names: Iterable[str]) -> list[str]:
    """Those by which code would be run or the system reached."""
    spelled = [(name, name.replace("__builtin__.", "builtins.", 1)) for name in names]
    return [name for name, path in spelled if path.startswith(_SYSTEM) or path in _BUILTINS]


def stood_in(kinds: tuple[str, ...]) -> list[str]:
    """A note on what else is in the file."""
    if not kinds:
        return []
    shown = ", ".join(kinds[:8]) + (f" and {len(kinds) - 8} more" if len(kinds) > 8 else "")
    what = "a name that is" if len(kinds) == 1 else f"{len(kinds)} names that are"
    return [f"Placeholders stand in for {what} more than tensors, and nothing of the file was run: {shown}."]


def pickle_of(archive: zipfile.ZipFile, name: str) -> Content:
    """The pickle in a member of an archive."""
    if archive.getinfo(name).file_size > LARGEST:
        raise ValueError(f"{name} is a pickle of {archive.getinfo(name).file_size:,} bytes")
    with archive.open(name) as stream:
        content = stream.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{name} is a pickle of more than {LARGEST:,} bytes")
    return read_bytes(content)


def folder_of(archive: zipfile.ZipFile) -> str:
    """The folder of an archive of torch, with its slash; ValueError where it is none, or of the other byte order."""
    record = next((name for name in archive.namelist() if is_pickle_record(name)), None)
    if record is None:
        raise ValueError("it has no data.pkl")
    folder = record.removesuffix("data.pkl")
    if f"{folder}byteorder" in archive.namelist() and archive.read(f"{folder}byteorder").strip() != b"little":
        raise ValueError("it was written on a machine of the other byte order")
    return folder


def _zip(path: Path, file: LocalFile) -> tuple[Content, Storages]:
    with zipfile.ZipFile(path) as archive:
        folder = folder_of(archive)
        return pickle_of(archive, f"{folder}data.pkl"), ZipStorages(file, archive, folder)


def _stream(file: LocalFile) -> tuple[Content, Storages]:
    stream: Any = file.map  # a map gives no more than there is, however many bytes a pickle claims to hold
    stream.seek(0)
    for _ in range(_PICKLES_BEFORE):
        read(stream)
    content, keys = read(stream), read(stream).value
    begin = stream.tell()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("the list of its storages is none")
    unknown = [key for key in keys if key not in content.storages]
    if unknown:
        raise ValueError(f"storage {unknown[0]!r:.40} is of no tensor")
    return content, StreamStorages(file, begin, [content.storages[key] for key in keys])


# ---------------------------------------------------------------------------------------------------- objects as dicts


def simplified(value: Any, levels: int = 6) -> Any:
    """The content with dicts where it has dicts of another class or whole modules, as far down as wrappers go."""
    return _Simplified().of(value, levels)


class _Simplified:
    """Remembers what it has met: a dict that lies in many places of another costs once."""

    def __init__(self) -> None:
        self.known: dict[tuple[int, int], Any] = {}

    def of(self, value: Any, levels: int) -> Any:
        at = (id(value), levels)
        if at not in self.known:
            self.known[at] = self._made(value, levels)
        return self.known[at]

    def _made(self, value: Any, levels: int) -> Any:
        if is_module(value):
            return state_dict_of(value)
        if isinstance(value, Placeholder) and value.entries:
            value = value.entries
        if not isinstance(value, dict) or not levels:
            return value
        return {key: self.of(item, levels - 1) for key, item in value.items()}


def is_module(value: Any) -> bool:
    """Whether a placeholder stands for a torch.nn.Module, by the attributes that every one of them has."""
    return isinstance(value, Placeholder) and {"_parameters", "_buffers", "_modules"} <= value.attributes.keys()


def state_dict_of(module: Placeholder) -> dict[str, Any]:
    """What the module's state_dict() would be: torch.nn.Module's own rule, by its attributes alone."""
    names = Names()
    _gather(module, names)
    return names.found


class Names:
    """Values by dotted names; and a bound, as parts that share parts that share parts have names without an end."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._path: list[str] = []
        self._left = _NAMES

    def add(self, name: str, value: Any) -> None:
        self.found[".".join([*self._path, name])] = value

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self._left -= 1
        if self._left < 0 or len(self._path) > _DEPTH:
            raise ValueError("modules within modules without an end")
        self._path.append(name)
        yield
        self._path.pop()


def _gather(module: Placeholder, names: Names) -> None:
    attributes = module.attributes
    passing = attributes.get("_non_persistent_buffers_set")
    for kind in ("_parameters", "_buffers"):
        for name, value in _items(attributes[kind]):
            if value is not None and not (kind == "_buffers" and isinstance(passing, list) and name in passing):
                names.add(name, value)
    for name, inner in _items(attributes["_modules"]):
        if is_module(inner):
            with names.inside(name):
                _gather(inner, names)


def _items(value: Any) -> list[tuple[str, Any]]:
    entries = value.entries if isinstance(value, Placeholder) else value
    if not isinstance(entries, dict):
        raise ValueError("a module whose tensors are in no dict")
    return [(name, item) for name, item in entries.items() if isinstance(name, str)]
