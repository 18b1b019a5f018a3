"""What every checkpoint stands on: a reader that knows names, shapes and types, and where each tensor's bytes lie.

A reader answers from headers alone until `read` is called. Where a tensor's bytes lie in a row in a local file, `span`
says so, and they can be mapped, hashed or copied without an interpreter of values in between. Nothing above this
module knows whether bytes come from a file, an archive or memory.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery import dtypes
from surgery.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of a tensor. `dtype` is spelled as safetensors does: "F32", "BF16", "I64" ..."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


class LocalFile:
    """A file held open for as long as something refers to it: what was checked is what is read, even if the path is
    replaced meanwhile. Mapped privately, so that writing into a tensor read from it never reaches the disk."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # O_NONBLOCK: a named pipe is refused below, rather than waited for.
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
        except OSError as error:
            raise unreadable(path, error) from error
        self._finalizer = weakref.finalize(self, os.close, fd)
        self.fd = fd
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path}: not a regular file", hint="Give the path of a checkpoint file or folder.")
        self.size = status.st_size
        self._map: mmap.mmap | None = None

    @property
    def map(self) -> mmap.mmap:
        if self._map is None:
            if os.name == "nt":
                self._map = mmap.mmap(self.fd, 0, access=mmap.ACCESS_COPY)
            else:
                # NORESERVE: a private map of a file larger than memory is no promise to write all of it.
                flags = mmap.MAP_PRIVATE | getattr(mmap, "MAP_NORESERVE", 0)
                self._map = mmap.mmap(self.fd, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        return self._map

    def unmap(self) -> None:
        """Let go of the map: its pages leave the process with the last tensor that is a view of it, and the next one
        that is read is a view of another map."""
        self._map = None

    def bytes(self, offset: int, length: int) -> bytes:
        """An own copy of a range. CheckpointError where the file ends before it."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill the buffer from the file. CheckpointError where the file ends before that."""
        done = 0
        while done < len(buffer):
            try:
                count = _read_at(self.fd, buffer[done:], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not count:
                raise CheckpointError(
                    f"{self.path}: ends {len(buffer) - done:,} bytes too early; it changed while it was read",
                    hint="Download or copy it again.",
                )
            done += count


def _read_at(fd: int, buffer: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [buffer], offset)
    # No positioned read into a buffer (Windows, old macOS), and no thread of ours shares the descriptor.
    os.lseek(fd, offset, os.SEEK_SET)
    part = os.read(fd, min(len(buffer), 1 << 24))
    buffer[: len(part)] = part
    return len(part)


CHUNK = 1 << 21  # bytes that are compared at once: they stay in the processor's cache


@dataclass(frozen=True, slots=True)
class Span:
    """A tensor's bytes, row-major and little endian, in one piece of a local file."""

    file: LocalFile
    offset: int
    nbytes: int

    @property
    def path(self) -> Path:
        return self.file.path

    def tensor(self, info: TensorInfo, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor as a view of the map: only the pages that are touched are read. Bytes that lie unaligned for
        their type are copied, and of these only the rows asked for."""
        import torch

        dtype, shape = dtypes.torch_dtype(info.dtype), dtypes.torch_shape(info.dtype, info.shape)
        cuts = check_slices(slices, shape)
        if 0 in shape:
            return torch.empty(shape, dtype=dtype)[cuts]
        offset = self.offset
        if cuts and cuts[0].step == 1:
            start, stop = cuts[0].start, max(cuts[0].start, cuts[0].stop)
            offset += start * (self.nbytes // shape[0])
            shape = (stop - start, *shape[1:])
            cuts = (slice(None), *cuts[1:])
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)[cuts]
        if offset % dtype.itemsize:
            flat = torch.frombuffer(bytearray(self.file.bytes(offset, count * dtype.itemsize)), dtype=dtype)
        else:
            flat = torch.frombuffer(self.file.map, dtype=dtype, count=count, offset=offset)
        return flat.view(shape)[cuts]

    def load(self, info: TensorInfo) -> Tensor:
        """The tensor in memory of its own, read past the map: what is let go is gone from the process at once, so that
        a pass over a whole file takes no more memory than its largest tensor."""
        import torch

        dtype, shape = dtypes.torch_dtype(info.dtype), dtypes.torch_shape(info.dtype, info.shape)
        if not self.nbytes:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(self.nbytes)
        self.file.read_into(memoryview(buffer), self.offset)
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def equals(self, info: TensorInfo, other: Tensor) -> bool:
        """Does another tensor hold the same bytes once it is cast to this type? Read past the map, in chunks."""
        import torch

        dtype, shape = dtypes.torch_dtype(info.dtype), dtypes.torch_shape(info.dtype, info.shape)
        if tuple(other.shape) != tuple(shape):
            return False
        flat = other.detach().reshape(-1)
        buffer = bytearray(min(self.nbytes, CHUNK))
        for at in range(0, self.nbytes, CHUNK):
            size = min(CHUNK, self.nbytes - at)
            if size < len(buffer):
                buffer = bytearray(size)
            self.file.read_into(memoryview(buffer), self.offset + at)
            part = flat[at // dtype.itemsize : (at + size) // dtype.itemsize].to(device="cpu", dtype=dtype)
            if buffer != part.contiguous().view(torch.uint8).numpy():  # a bytearray compares bytes, in one go
                return False
        return True


class Reader(ABC):
    """Base of all readers, also of a plugin's. Attributes are filled at construction, from headers only."""

    source: str
    """Where it came from, for messages: a path, or "<mapping>"."""
    infos: Mapping[str, TensorInfo]
    files: tuple[Path, ...] = ()
    metadata: Mapping[str, str] = {}
    notes: tuple[str, ...] = ()
    """What was unwrapped, left out or taken to mean something: one sentence each."""
    prefix: str = ""
    """What every name had before it in the file, and has not here; the last of the notes are about it."""

    @abstractmethod
    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """The tensor, or a slice of it. `name` is one of `infos`."""

    def span(self, name: str) -> Span | None:
        """Where the tensor's bytes lie, if they lie in one piece, row-major and little endian, in a local file."""
        return None


class Renamed(Reader):
    """Tensors of another reader, under the names that are the keys of `names`."""

    def __init__(self, reader: Reader, names: Mapping[str, str]) -> None:
        self._reader, self._names = reader, names
        self.source, self.files = reader.source, reader.files
        self.metadata, self.notes = reader.metadata, reader.notes
        self.infos = {new: reader.infos[name] for new, name in names.items()}

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        return self._reader.read(self._names[name], slices)

    def span(self, name: str) -> Span | None:
        return self._reader.span(self._names[name])


def check_slices(slices: tuple[slice, ...] | None, shape: Sequence[int]) -> tuple[slice, ...]:
    """Slices with explicit bounds, or CheckpointError."""
    if slices is None:
        return ()
    if not isinstance(slices, tuple) or not all(isinstance(cut, slice) for cut in slices):
        raise CheckpointError(f"slices must be a tuple of slice objects, got {slices!r}")
    if len(slices) > len(shape):
        raise CheckpointError(f"{len(slices)} slices for a tensor of shape {tuple(shape)}")
    if any(cut.step is not None and cut.step < 1 for cut in slices):
        raise CheckpointError(f"slices must have a positive step, got {slices!r}", hint="Read it, then flip it.")
    bounds = (cut.indices(size) for cut, size in zip(slices, shape[: len(slices)], strict=True))
    return tuple(slice(start, stop, step) for start, stop, step in bounds)


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """The CheckpointError for a path that the system would not open."""
    if isinstance(error, FileNotFoundError):
        return CheckpointError(f"{path}: no such file or folder", hint="Check the path.")
    if isinstance(error, PermissionError):
        return CheckpointError(f"{path}: no permission to read it", hint=f"Look with: ls -l {path}")
    return CheckpointError(f"{path}: cannot be read: {error.strerror or error}", hint="Check the path and the disk.")
