"""The safetensors format: a checked header, and tensors as byte ranges behind it. Reading structure imports no torch.

The header is read here rather than by the safetensors library, because the library does not tell where a tensor's
bytes lie, and says of a broken file only that it is broken. What it refuses is refused here too: the two are tested
against each other. The format: https://huggingface.co/docs/safetensors (8 bytes little-endian header length, JSON
header, data without holes).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery import dtypes
from surgery.errors import CheckpointError
from surgery.reader import LocalFile, Reader, Span, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # the format's own limit
_AGAIN = "The file is incomplete or damaged. Download or copy it again."


def open(path: Path) -> Reader:
    return SafetensorsReader(path)


class SafetensorsReader(Reader):
    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.files = (path,)
        self._file = LocalFile(path)
        self._start, header = _read_header(self._file)
        self.metadata = _metadata(path, header.pop("__metadata__", None))
        self.infos, self._offsets = _entries(path, header, self._file.size - self._start)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        return self.span(name).tensor(self.infos[name], slices)

    def span(self, name: str) -> Span:
        return Span(self._file, self._start + self._offsets[name], self.infos[name].nbytes)


def header_bytes(entries: Iterable[tuple[str, TensorInfo]], metadata: Mapping[str, str]) -> bytes:
    """Length and header of a file whose tensors lie in the order given, padded so that the data is 8-aligned."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, info in entries:
        end = offset + info.nbytes
        header[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"a header of {len(text):,} bytes is more than safetensors allows ({MAX_HEADER:,})")
    return len(text).to_bytes(8, "little") + text


def _read_header(file: LocalFile) -> tuple[int, dict[str, Any]]:
    path = file.path
    if file.size < 8:
        raise CheckpointError(f"{path}: {file.size} bytes are too few for a safetensors file", hint=_AGAIN)
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_HEADER:
        raise CheckpointError(
            f"{path}: not a safetensors file: its first 8 bytes give a header of {length:,} bytes, "
            f"and the format allows {MAX_HEADER:,}",
            hint="Look at its beginning with: head -c 64 FILE | xxd; then download or convert it again.",
        )
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path}: truncated: the header takes {length:,} bytes, the file has {file.size - 8:,} after the length",
            hint=_AGAIN,
        )
    raw = file.bytes(8, length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except DuplicateKey as error:
        raise CheckpointError(f"{path}: the header names {error.args[0]!r} twice", hint=_AGAIN) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"{path}: the header is not JSON: {error}", hint=_AGAIN) from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is not a JSON object", hint=_AGAIN)
    return 8 + length, header


class DuplicateKey(ValueError):
    """A JSON object names a key twice; a plain parser would silently keep the last."""


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        raise DuplicateKey(next(key for key, _ in pairs if key in seen or seen.add(key)))  # type: ignore[func-returns-value]
    return found


def _metadata(path: Path, value: object) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise CheckpointError(f"{path}: __metadata__ in the header is not a map from text to text", hint=_AGAIN)
    return value


def _entries(path: Path, header: dict[str, Any], size: int) -> tuple[dict[str, TensorInfo], dict[str, int]]:
    infos: dict[str, TensorInfo] = {}
    ranges: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        info, begin, end = _entry(path, name, entry)
        infos[name] = info
        ranges.append((begin, end, name))
    ranges.sort()
    expected, before = 0, ""
    for begin, end, name in ranges:
        if end > size:
            raise CheckpointError(
                f"{path}: truncated: {name!r} ends at byte {end:,} of the data, the file has {size:,}", hint=_AGAIN
            )
        if begin < expected:
            raise CheckpointError(f"{path}: the bytes of {name!r} overlap those of {before!r}", hint=_AGAIN)
        if begin > expected:
            raise CheckpointError(
                f"{path}: {begin - expected:,} bytes before {name!r} belong to no tensor", hint=_AGAIN
            )
        expected, before = end, name
    if expected != size:
        raise CheckpointError(
            f"{path}: {size - expected:,} bytes after the last tensor belong to no tensor", hint=_AGAIN
        )
    return infos, {name: begin for begin, _, name in ranges}


def _entry(path: Path, name: str, entry: object) -> tuple[TensorInfo, int, int]:
    def wrong(reason: str) -> CheckpointError:
        return CheckpointError(f"{path}: header entry {name!r}: {reason}", hint=_AGAIN)

    if not isinstance(entry, dict):
        raise wrong("not a JSON object")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in dtypes.SAFETENSORS:
        raise wrong(f"unknown dtype {dtype!r}; known are {', '.join(sorted(dtypes.SAFETENSORS))}")
    if not isinstance(shape, list) or not all(type(item) is int and item >= 0 for item in shape):
        raise wrong(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(item) is int for item in offsets):
        raise wrong(f"data_offsets {offsets!r} is not a pair of numbers")
    begin, end = offsets
    if not 0 <= begin <= end:
        raise wrong(f"data_offsets {offsets!r} is not a range")
    needed = dtypes.nbytes(dtype, shape)
    if needed != end - begin:
        raise wrong(f"{dtype} of shape {tuple(shape)} takes {needed} bytes, its data_offsets give {end - begin}")
    return TensorInfo(tuple(shape), dtype, end - begin), begin, end
