"""Tensors as a pickle of torch describes them: a type, a shape, strides, and a place in a storage. Nothing is read yet.

`StoredReader` reads them from where the storages lie: members of a zip, or the tail of the stream that torch.save wrote
before 1.6. Opening takes the description only, and imports no torch.
"""

from __future__ import annotations

import math
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from surgery import dtypes
from surgery.archive import DAMAGE, reason, stored_offset
from surgery.errors import CheckpointError
from surgery.reader import LocalFile, Reader, Span, TensorInfo, check_slices

if TYPE_CHECKING:
    from torch import Tensor

# torch's classes of storages, and the type of their elements. One without a type counts bytes.
STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128", "UntypedStorage": "U8",
}  # fmt: skip
_AGAIN = "The file is incomplete or damaged. Download or copy it again."
_MOST = 2**63 - 1  # bytes: torch counts no further
_AXES = 64


@dataclass(frozen=True, eq=False, slots=True)
class Storage:
    """A row of `count` elements, kept under `key`."""

    key: str
    dtype: str
    count: int

    @property
    def nbytes(self) -> int:
        return self.count * dtypes.bits(self.dtype) // 8


@dataclass(frozen=True, eq=False, slots=True)
class StoredTensor:
    """A view of a storage: `offset` and `stride` count elements of its own type."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __post_init__(self) -> None:
        """ValueError where it reaches beyond its storage, or no tensor can be so."""
        numbers = (self.offset, *self.shape, *self.stride)
        if len(self.shape) != len(self.stride) or len(self.shape) > _AXES or min(numbers) < 0:
            raise ValueError(f"a tensor of shape {self.shape} and strides {self.stride} from {self.offset}")
        if max(numbers) > _MOST or self.info.nbytes > _MOST:
            raise ValueError(f"a tensor of shape {self.shape} takes more bytes than there can be")
        if self.info.nbytes and (self.offset + self.extent) * self.itemsize > self.storage.nbytes:
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its {self.storage.nbytes:,} bytes")

    @property
    def itemsize(self) -> int:
        return dtypes.bits(self.dtype) // 8

    @property
    def extent(self) -> int:
        """How many elements lie between its first and its last, both counted."""
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def info(self) -> TensorInfo:
        return TensorInfo(self.shape, self.dtype, math.prod(self.shape) * self.itemsize)

    @property
    def contiguous(self) -> bool:
        """Whether its elements lie row-major and without holes."""
        expected = 1
        for size, step in zip(reversed(self.shape), reversed(self.stride), strict=True):
            if size != 1 and step != expected:
                return False
            expected *= size
        return True


class Storages(ABC):
    """Where the storages of a file lie."""

    file: LocalFile

    @abstractmethod
    def span(self, storage: Storage) -> Span | None:
        """The bytes of a storage in the file; None where they are compressed. ValueError where they are not there."""

    def load(self, storage: Storage) -> bytes:
        """The bytes of a storage that has no span."""
        raise ValueError(f"storage {storage.key} has no bytes")


class ZipStorages(Storages):
    """Members `FOLDER/data/KEY` of a zip. torch stores them uncompressed; an archive that was packed again may not."""

    def __init__(self, file: LocalFile, archive: zipfile.ZipFile, folder: str) -> None:
        self.file = file
        self._folder = folder
        self._members = {member.filename: member for member in archive.infolist()}

    def span(self, storage: Storage) -> Span | None:
        member = self._member(storage)
        if member.compress_type != zipfile.ZIP_STORED:
            return None
        begin = stored_offset(self.file, member)
        if begin + storage.nbytes > self.file.size:
            raise ValueError(f"{member.filename} reaches beyond the end of the file")
        return Span(self.file, begin, storage.nbytes)

    def load(self, storage: Storage) -> bytes:
        member = self._member(storage)
        with zipfile.ZipFile(self.file.path) as archive, archive.open(member) as stream:
            found = stream.read(storage.nbytes)
        if len(found) != storage.nbytes:
            raise ValueError(f"{member.filename} has {len(found):,} bytes and not {storage.nbytes:,}")
        return found

    def _member(self, storage: Storage) -> zipfile.ZipInfo:
        name = f"{self._folder}data/{storage.key}"
        if name not in self._members:
            raise ValueError(f"{name} is not in the archive")
        if self._members[name].file_size < storage.nbytes:
            raise ValueError(f"{name} has {self._members[name].file_size:,} bytes and not {storage.nbytes:,}")
        return self._members[name]


class StreamStorages(Storages):
    """Storages that follow each other in a file, each behind the count of its elements (8 bytes, little endian)."""

    def __init__(self, file: LocalFile, begin: int, storages: list[Storage]) -> None:
        self.file = file
        self._spans: dict[str, Span] = {}
        for storage in storages:
            if begin + 8 + storage.nbytes > file.size:
                raise ValueError(f"the file ends before storage {storage.key}")
            count = int.from_bytes(file.bytes(begin, 8), "little")
            if count != storage.count:
                raise ValueError(f"storage {storage.key} has {count:,} elements and not {storage.count:,}")
            self._spans[storage.key] = Span(file, begin + 8, storage.nbytes)
            begin += 8 + storage.nbytes

    def span(self, storage: Storage) -> Span:
        found = self._spans.get(storage.key)
        if found is None or found.nbytes < storage.nbytes:
            raise ValueError(f"storage {storage.key} is not in the file")
        return found


class StoredReader(Reader):
    """Raises CheckpointError at once where the bytes of a tensor are not in the file."""

    def __init__(self, path: Path, tensors: Mapping[str, StoredTensor], storages: Storages) -> None:
        self.source = str(path)
        self.files = (path,)
        self._tensors, self._storages = tensors, storages
        self._places: dict[str, Span | None] = {}
        for name, tensor in tensors.items():
            try:
                self._places[name] = storages.span(tensor.storage)
            except DAMAGE as error:
                raise CheckpointError(f"{path}: {name!r}: {reason(error)}", hint=_AGAIN) from error
        self.infos = {name: tensor.info for name, tensor in tensors.items()}

    def span(self, name: str) -> Span | None:
        tensor, place = self._tensors[name], self._places[name]
        if place is None or not tensor.contiguous:
            return None
        return Span(place.file, place.offset + tensor.offset * tensor.itemsize, tensor.info.nbytes)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        import torch

        span, tensor = self.span(name), self._tensors[name]
        if span is not None:
            return span.tensor(tensor.info, slices)
        cuts = check_slices(slices, tensor.shape)
        dtype = dtypes.torch_dtype(tensor.dtype)
        if not tensor.info.nbytes:
            return torch.empty(tensor.shape, dtype=dtype)[cuts]
        start, length = tensor.offset * tensor.itemsize, tensor.extent * tensor.itemsize
        place = self._places[name]
        if place is not None:
            flat = Span(place.file, place.offset + start, length).tensor(
                TensorInfo((tensor.extent,), tensor.dtype, length)
            )
        else:
            try:
                content = bytearray(self._storages.load(tensor.storage))
            except DAMAGE as error:
                raise CheckpointError(
                    f"{self.source}: {name!r} cannot be read: {reason(error)}", hint=_AGAIN
                ) from error
            flat = torch.frombuffer(content, dtype=dtype, count=tensor.extent, offset=start)
        return flat.as_strided(tensor.shape, tensor.stride)[cuts]
