"""What torch.save writes: a zip whose tensors are mapped, and the older pickle stream. Only tensors are ever built.

Such a file is a pickle, and a pickle can hold code. It is loaded with weights_only=True; where that refuses names that
the pickle holds, it is read as data (`surgery.pickled`), and so is a program of TorchScript's (`surgery.torchscript`).
"""

from __future__ import annotations

import pickletools
import zipfile
from pathlib import Path
from typing import IO

from surgery import pickled, torchscript
from surgery.archive import DAMAGE, is_pickle_record, reason, zip_names
from surgery.errors import CheckpointError
from surgery.memory import MemoryReader
from surgery.reader import LocalFile, Reader

_MAGIC = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the number that torch.save's stream begins with, pickled
_HARMLESS = frozenset({"collections.OrderedDict", "collections.Counter", "_codecs.encode"})


def open(path: Path, key: str | None = None) -> Reader:
    """The tensors of a file; under `key` where it holds a dict of several dicts of tensors."""
    file = LocalFile(path)
    head = file.bytes(0, min(file.size, 64))
    if head[:4] == b"PK\x03\x04":
        names = zip_names(path)
        if not names:
            raise CheckpointError(
                f"{path}: truncated: a zip archive without its list of contents, which lies at the end",
                hint="The file is incomplete or damaged. Download or copy it again.",
            )
        if torchscript.is_archive(names):
            if key is not None:
                raise CheckpointError(
                    f"{path}: a TorchScript archive, which has no entry {key!r}", hint="Leave it out."
                )
            return torchscript.open(path)
        if not any(is_pickle_record(name) for name in names):
            raise CheckpointError(
                f"{path}: a zip archive without a data.pkl, so not written by torch.save",
                hint="If it is an archive of checkpoints, unpack it: python -m zipfile -e FILE FOLDER.",
            )
        return _load(path, key, mapped=True)
    if head[:1] != b"\x80" or _MAGIC not in head[:32]:
        refused = _names_in(path)
        if refused:
            raise _refusal(path, refused)
        raise CheckpointError(
            f"{path}: not written by torch.save, though its name says so",
            hint=f"Look at what it is: file {path}",
        )
    return _load(path, key, mapped=False)


def _load(path: Path, key: str | None, *, mapped: bool) -> Reader:
    import torch

    try:
        content = torch.load(str(path), map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch lets anything through: RuntimeError, KeyError, UnpicklingError, struct.error ...
        refused = _names_in(path)
        if refused and not isinstance(error, (MemoryError, OSError)):
            return pickled.open(path, zipped=mapped, key=key)
        raise CheckpointError(
            f"{path}: torch cannot load it: {reason(error)}",
            hint="The file may be incomplete. Download or copy it again.",
        ) from error
    return MemoryReader(content, source=str(path), files=(path,), holder=f'surgery.open("{path}", key=KEY)', key=key)


def _refusal(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        f"{path}: holds more than tensors: unpickling it would call {', '.join(names)}. Nothing of it was run",
        hint="Do not load it anywhere. Look for the same weights as safetensors.",
    )


def _names_in(path: Path) -> list[str]:
    """The importable names that unpickling would look up and torch does not allow; read, not run."""
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                record = next((name for name in archive.namelist() if is_pickle_record(name)), None)
                if record is None:
                    return []
                with archive.open(record) as stream:
                    found = _scan(stream)
        else:
            with path.open("rb") as stream:
                found = _scan(stream)
    except DAMAGE:
        return []
    return sorted(found - _allowed())


def _allowed() -> set[str]:
    from torch._weights_only_unpickler import _get_allowed_globals

    return set(_get_allowed_globals()) | _HARMLESS


def _scan(stream: IO[bytes]) -> set[str]:
    """The importable names in the pickles of a file; torch's older files are five pickles, then raw storages."""
    found: set[str] = set()
    for _ in range(5):
        memo: dict[int, str] = {}
        memoized = 0
        strings: list[str] = []
        top: str | None = None  # the text that was pushed last, while nothing lies upon it
        try:
            for opcode, argument, _ in pickletools.genops(stream):
                name = opcode.name
                if "PUT" in name or name == "MEMOIZE":
                    if top is not None:
                        memo[memoized if argument is None else int(str(argument))] = top
                    memoized += 1
                    continue
                top = None
                if name in ("GLOBAL", "INST"):
                    found.add(str(argument).replace(" ", ".", 1))
                elif name == "STACK_GLOBAL" and len(strings) >= 2:
                    found.add(".".join(strings[-2:]))
                elif "UNICODE" in name or "STRING" in name:
                    top = str(argument)
                elif "GET" in name and argument in memo:
                    top = memo[argument]
                if top is not None:
                    strings.append(top)
        except DAMAGE:  # the pickle is cut or damaged: what was found until here counts
            break
    return {name for name in found if _is_dotted(name)}


def _is_dotted(name: str) -> bool:
    return all(part.isidentifier() for part in name.split("."))
