"""A checkpoint in several files: an index names the file of each tensor.

Reading, every promise of the index is checked. Writing, files are filled, named and indexed as huggingface_hub does it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from surgery.errors import CheckpointError
from surgery.memory import as_in_file, wrapped_by
from surgery.reader import Reader, Span, TensorInfo, unreadable
from surgery.safetensors_format import DuplicateKey, unique_keys

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = 5


def open(path: Path) -> Reader:
    from surgery.formats import open_file

    return ShardedReader(path, open_file)


class ShardedReader(Reader):
    def __init__(self, path: Path, open_shard: Callable[[Path], Reader]) -> None:
        self.source = str(path)
        weight_map = _weight_map(path)
        shards = {file: path.parent / file for file in sorted(set(weight_map.values()))}
        missing = [file for file, where in shards.items() if not where.is_file()]
        if missing:
            raise CheckpointError(
                f"{path}: {len(missing)} of {len(shards)} files of the checkpoint are missing: {_listed(missing)}",
                hint=f"Download them into {path.parent}.",
            )
        # Whether a prefix is of the model or of a wrapper only all shards together tell.
        readers = {file: as_in_file(open_shard(where)) for file, where in shards.items()}
        absent = [f"{name} ({file})" for name, file in weight_map.items() if name not in readers[file].infos]
        if absent:
            raise CheckpointError(
                f"{path}: {len(absent)} tensors are not in the file that the index names: {_listed(absent)}",
                hint="Index and files are of different versions. Download them again, together.",
            )
        pickled = any(not file.endswith(".safetensors") for file in shards)
        self.prefix, said = wrapped_by(weight_map) if pickled else ("", [])
        self._readers = {name.removeprefix(self.prefix): readers[file] for name, file in weight_map.items()}
        self.infos = {name: reader.infos[self.prefix + name] for name, reader in self._readers.items()}
        self.files = (path, *shards.values())
        self.metadata = {key: value for reader in readers.values() for key, value in reader.metadata.items()}
        extra = [f"{name} ({file})" for file, reader in readers.items() for name in reader.infos
                 if weight_map.get(name) != file]  # fmt: skip
        notes = [f"{file}: {note}" for file, reader in readers.items() for note in reader.notes]
        if extra:
            notes.append(f"In a file but not in the index, and left out: {_listed(extra)}.")
        self.notes = (*notes, *said)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        return self._readers[name].read(self.prefix + name, slices)

    def span(self, name: str) -> Span | None:
        return self._readers[name].span(self.prefix + name)


def _weight_map(path: Path) -> dict[str, str]:
    hint = "Download the index again."
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise unreadable(path, error) from error
    except DuplicateKey as error:
        raise CheckpointError(f"{path}: the index names {error.args[0]!r} twice", hint=hint) from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the index is not JSON: {error}", hint=hint) from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: the index has no weight_map", hint=hint)
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise CheckpointError(f"{path}: the index gives {file!r} as the file of {name!r}", hint=hint)
        # An index is data from elsewhere: it may name files beside itself, and no others. Links are not followed to
        # decide this, since caches keep every file as a link out of the folder.
        parts = PurePosixPath(file).parts
        if file.startswith("/") or ".." in parts or "\\" in file or ":" in file or "\0" in file:
            raise CheckpointError(
                f"{path}: the index names a file outside its folder: {file!r}; it was not opened",
                hint="Do not trust this checkpoint; get it from where it was published.",
            )
        if file.endswith(".index.json"):
            raise CheckpointError(f"{path}: the index names another index: {file!r}", hint=hint)
    return weight_map


def _listed(items: list[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


# -- writing ----------------------------------------------------------------------------------------------------------
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]B)", re.ASCII | re.IGNORECASE)
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(size: int | str) -> int:
    """Bytes, of a number or of a text as in "2GB"; units are powers of ten, as huggingface_hub has them.

    >>> parse_size("1.5MB")
    1500000
    """
    if isinstance(size, str):
        found = _SIZE.fullmatch(size.strip())
        size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    if size < 1:
        raise CheckpointError(
            "the size of a file has to be a number of bytes, 1 or more", hint='as in "2GB" or "500MB"'
        )
    return size


def split(sizes: Mapping[str, int], limit: int | None) -> list[list[str]]:
    """The names file by file, in their order: a file is closed when the next tensor would take it over `limit` bytes,
    and a tensor that alone takes more has a file of its own (the rule of huggingface_hub's
    split_state_dict_into_shards_factory; the two are tested against each other)."""
    if limit is None:
        return [list(sizes)]
    closed: list[list[str]] = []
    current: list[str] = []
    used = 0
    for name, size in sizes.items():
        if size > limit:
            closed.append([name])
            continue
        if used + size > limit:
            closed.append(current)
            current, used = [], 0
        current.append(name)
        used += size
    return [*closed, current] if current or not closed else closed


def paths(path: Path, count: int) -> list[Path]:
    """model.safetensors; or model-00001-of-00002.safetensors, ... and, last, model.safetensors.index.json."""
    if count == 1:
        return [path]
    several = [path.with_name(f"{path.stem}-{n:05d}-of-{count:05d}{path.suffix}") for n in range(1, count + 1)]
    return [*several, path.with_name(f"{path.name}.index.json")]


def index(groups: Sequence[Sequence[str]], infos: Mapping[str, TensorInfo], files: Sequence[Path]) -> bytes:
    """The index, as huggingface_hub and transformers write it: where each tensor is, and the bytes of all. `files`: one
    for each group, and then perhaps the index itself (see `paths`)."""
    held = {
        "metadata": {"total_size": sum(infos[name].nbytes for group in groups for name in group)},
        "weight_map": {
            name: file.name for group, file in zip(groups, files[: len(groups)], strict=True) for name in group
        },
    }
    return (json.dumps(held, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
