"""Which format is this file, and which file of this folder is the checkpoint?

A file is known by its first bytes; its suffix only says whose error message fits a file that no format knows. Formats
are opened through import strings, so that one that needs torch or numpy costs nothing until a file of it is met.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import CheckpointError, SurgeryError
from surgery.reader import LocalFile, Reader, unreadable

HEAD = 4096
"""How many of the first bytes `Format.sniff` is given."""


@dataclass(frozen=True)
class Format:
    """A checkpoint format.

    `sniff(path, head)` is true for its files; `head` is the first `HEAD` bytes, fewer in a short file.
    `open(path)` gives a `Reader`, or simply a Mapping[str, Tensor]; an import string "package.module:function" is
    imported only when a file of the format is opened.
    """

    name: str
    suffixes: tuple[str, ...]
    sniff: Callable[[Path, bytes], bool]
    open: str | Callable[[Path], Reader | Mapping[str, Any]]


def _is_safetensors(path: Path, head: bytes) -> bool:
    """A header length within the format's limit, then the brace that opens the header."""
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= 100_000_000


def _is_index(path: Path, head: bytes) -> bool:
    return path.name.endswith(".index.json") and head.lstrip()[:1] == b"{"


def _is_torch(path: Path, head: bytes) -> bool:
    """A zip with a data.pkl in it, or a binary pickle."""
    if head[:4] == _ZIP:
        from surgery.archive import is_pickle_record, zip_names

        return any(is_pickle_record(name) for name in zip_names(path))
    return head[:1] == b"\x80" and len(head) > 1 and head[1] <= 5


def _is_npz(path: Path, head: bytes) -> bool:
    """A zip with arrays in it."""
    if head[:4] != _ZIP:
        return False
    from surgery.archive import zip_names

    return any(name.endswith(".npy") for name in zip_names(path))


_ZIP = b"PK\x03\x04"
_TORCH = "torch"
_BUILT_IN = (
    Format("safetensors", (".safetensors",), _is_safetensors, "surgery.safetensors_format:open"),
    Format("sharded", (".index.json",), _is_index, "surgery.shards:open"),
    Format(_TORCH, (".bin", ".pt", ".pth", ".ckpt"), _is_torch, "surgery.torch_format:open"),
    Format("npz", (".npz",), _is_npz, "surgery.numpy_format:open"),
)
_registered: dict[str, Format] = {}


def register(format_or_op: object) -> None:
    """Make a plugin's checkpoint format or op known to every caller of surgery. An import string is resolved first.
    Registering the same object twice changes nothing; another one of the same name is an error."""
    thing = _resolve(format_or_op) if isinstance(format_or_op, str) else format_or_op
    if not isinstance(thing, Format):
        from surgery import ops

        if not isinstance(thing, ops.Op):
            raise SurgeryError(
                f"a {type(thing).__name__} is neither a checkpoint format nor an op",
                hint="Register a surgery.Format or a surgery.ops.Op.",
            )
        ops.register(thing)
        return
    known = {format.name: format for format in formats()}.get(thing.name)
    if known is not None and known != thing:
        raise SurgeryError(
            f"a checkpoint format named {thing.name!r} is registered already",
            hint="Give the format a name of its own, or switch one of the two plugins off.",
        )
    if known is None:
        _registered[thing.name] = thing


def formats() -> tuple[Format, ...]:
    """All formats, in the order in which they are asked; the built-in ones first, so that none can be taken over."""
    return (*_BUILT_IN, *_registered.values())


def open_path(path: Path, key: str | None = None) -> Reader:
    """The reader of a checkpoint file, or of the one checkpoint in a folder."""
    if "\0" in str(path):
        raise CheckpointError(f"{str(path)!r}: not a path: it has a null byte in it", hint="Check the path.")
    if not os.path.isdir(path):  # Path.is_dir would raise for a name that is too long
        return open_file(path, key)
    chosen, passed = _in_folder(path)
    reader = open_file(chosen, key)
    if passed:
        reader.notes = (*reader.notes, f"Of {path}, {chosen.name} was read, not {', '.join(sorted(passed))}.")
    return reader


def open_file(path: Path, key: str | None = None) -> Reader:
    """The reader of one file, by its first bytes."""
    if not os.path.exists(path):
        raise _absent(path)
    file = LocalFile(path)
    head = file.bytes(0, min(file.size, HEAD))
    if not head:
        raise CheckpointError(f"{path}: the file is empty", hint="Download or copy it again.")
    for format in formats():
        if format.sniff(path, head):
            return _opened(format, path, key)
    _raise_if_foreign(path, head)
    for format in formats():
        if path.name.endswith(format.suffixes):
            return _opened(format, path, key)
    raise CheckpointError(
        f"{path}: not a checkpoint in any format known here ({', '.join(format.name for format in formats())})",
        hint=f"Look at what it is: file {path}",
    )


def _opened(format: Format, path: Path, key: str | None) -> Reader:
    opener: Any = _resolve(format.open) if isinstance(format.open, str) else format.open
    if key is not None and format.name != _TORCH:
        raise CheckpointError(f"{path}: a {format.name} file, which has no entry {key!r}", hint="Leave the key out.")
    opened = opener(path) if key is None else opener(path, key)
    if isinstance(opened, Reader):
        return opened
    if isinstance(opened, Mapping):
        from surgery.memory import MemoryReader

        return MemoryReader(opened, source=str(path), files=(path,))
    raise SurgeryError(
        f"the format {format.name!r} gave a {type(opened).__name__} for {path}, not a Reader or a mapping of tensors",
        hint="Report it to the plugin that brought the format.",
    )


def _resolve(target: str) -> Any:
    module, colon, name = target.partition(":")
    if not (module and colon and name):
        raise SurgeryError(f"{target!r} is not an import string", hint='Write it as "package.module:name".')
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise SurgeryError(f"{target!r} cannot be imported: {error}", hint="Install what it needs.") from error
    return found


# --- folders ---------------------------------------------------------------------------------------------------------

# Files that trainers leave beside the weights.
_NOT_WEIGHTS = re.compile(r"(training_args|optimizer|scheduler|scaler|random_states.*|rng_state.*)\.(bin|pt|pth)$")
_SHARD = re.compile(r"-\d+-of-\d+\.(safetensors|bin)$")
# Tiers, best first: the names the hub's libraries use, then the only file of a kind. Safetensors before pickles.
_TIERS: tuple[tuple[str, ...], ...] = (
    ("model.safetensors",),
    ("model.safetensors.index.json",),
    ("*.safetensors.index.json",),
    ("*.safetensors",),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json",),
    ("*.bin.index.json",),
    ("*.bin", "*.pt", "*.pth", "*.ckpt"),
    ("*.npz",),
)


def _in_folder(folder: Path) -> tuple[Path, set[str]]:
    """The checkpoint of a folder, and the names of others in it. CheckpointError where it is none or a choice."""
    try:
        names = {item.name for item in folder.iterdir() if not item.is_dir() and not item.name.startswith(".")}
    except OSError as error:
        raise unreadable(folder, error) from error
    shards_found = {name for name in names if _SHARD.search(name)}
    weights = {name for name in names if not _NOT_WEIGHTS.match(name)} - shards_found
    suffixes = tuple(suffix for format in formats() for suffix in format.suffixes)
    every = {name for name in weights if name.endswith(suffixes)}
    tiers = [*_TIERS, *(tuple(f"*{suffix}" for suffix in format.suffixes) for format in _registered.values())]
    for patterns in tiers:
        found = {name for name in every for pattern in patterns if Path(name).match(pattern)}
        if len(found) > 1:
            raise CheckpointError(
                f"{folder}: {len(found)} checkpoints in it: {', '.join(sorted(found))}",
                hint=f"Name the one that is meant: {folder / min(found)}",
            )
        if found:
            (name,) = found
            return folder / name, every - found
    if shards_found:
        raise CheckpointError(
            f"{folder}: {len(shards_found)} parts of a sharded checkpoint, and no index (*.index.json) that joins them",
            hint="Download the index into the folder.",
        )
    what = f"it holds {', '.join(sorted(names)[:8])}" if names else "it holds no files"
    raise CheckpointError(f"{folder}: no checkpoint in this folder: {what}", hint="Give the path of the checkpoint.")


# --- files of other kinds --------------------------------------------------------------------------------------------

_FOREIGN: tuple[tuple[bytes, str, str], ...] = (
    (b"GGUF", "a GGUF file, quantized for llama.cpp", "Get the weights it was made from, as safetensors."),
    (b"\x89HDF\r\n", "an HDF5 file, of Keras or h5py", "Convert it: np.savez(FILE, **{name: array, ...})."),
    (b"\x93NUMPY", "a single numpy array, without a name", "Name it: np.savez(FILE, NAME=np.load(PATH))."),
    (b"\x1f\x8b", "gzip-compressed", "Unpack it first: gunzip -k PATH"),
    (b"\x28\xb5\x2f\xfd", "zstd-compressed", "Unpack it first: unzstd PATH"),
    (b"\xfd7zXZ", "xz-compressed", "Unpack it first: unxz -k PATH"),
    (b"7z\xbc\xaf", "a 7z archive", "Unpack it first: 7z x PATH"),
)


def _raise_if_foreign(path: Path, head: bytes) -> None:
    """CheckpointError for what people take for a checkpoint by mistake: pointers, error pages, archives."""
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CheckpointError(
            f"{path}: a git-lfs pointer, not the file itself", hint=f"Fetch it: cd {path.parent} && git lfs pull"
        )
    for magic, what, hint in _FOREIGN:
        if head.startswith(magic):
            raise CheckpointError(f"{path}: {what}", hint=hint.replace("PATH", str(path)))
    if head[257:262] == b"ustar":
        raise CheckpointError(f"{path}: a tar archive", hint=f"Unpack it first: tar xf {path}")
    text = _as_text(head)
    if text is None:
        return
    start = text.lstrip("\ufeff \t\r\n")[:200]
    again = "The download went wrong: get it again, from the address of the file itself."
    if re.match(r"<(!doctype|html|head|\?xml)", start, re.IGNORECASE):
        raise CheckpointError(f"{path}: a web page, not a checkpoint", hint=again)
    shown = start.splitlines()[0][:60] if start else ""
    if path.name.endswith(".json"):
        hint = "Give the weights, or the index (*.index.json), or their folder."
        raise CheckpointError(f"{path}: JSON, not a checkpoint", hint=hint)
    if _pickle_of_text(path, text):
        return
    raise CheckpointError(f"{path}: a text file, not a checkpoint; it begins: {shown!r}", hint=again)


def _as_text(head: bytes) -> str | None:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(head) < HEAD or error.start < HEAD - 3:  # anything but a character cut in half at the end of the head
            return None
        text = head[: error.start].decode("utf-8")
    return text if all(letter.isprintable() or letter in "\t\r\n\f\ufeff" for letter in text) else None


def _pickle_of_text(path: Path, text: str) -> bool:
    """Protocol 0 of pickle is text, and may hold code: the torch format says what is in it."""
    return (
        path.name.endswith((".bin", ".pt", ".pth", ".ckpt")) and text.rstrip("\0").endswith(".") and text[0] in "(cd}]i"
    )


def _absent(path: Path) -> CheckpointError:
    if re.match(r"[a-z][a-z0-9+.-]*:/", str(path)):
        return CheckpointError(f"{path}: an address, not a local file", hint="Download it first, then open the file.")
    try:
        path.lstat()
        return CheckpointError(f"{path}: a link to a file that is not there", hint=f"See where it points: ls -l {path}")
    except OSError:
        pass
    import difflib

    try:
        near = difflib.get_close_matches(path.name, [item.name for item in path.parent.iterdir()], n=3)
    except OSError:
        near = []
    hint = f"Did you mean {' or '.join(near)}?" if near else "Check the path."
    return CheckpointError(f"{path}: no such file or folder", hint=hint)
