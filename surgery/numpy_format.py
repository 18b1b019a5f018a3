"""The .npz format: an archive of numpy arrays. Headers are read at once, arrays when asked for; pickles never.

Arrays that lie uncompressed, row-major and little endian in the archive are mapped where they lie.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from surgery import dtypes
from surgery.archive import DAMAGE, reason, stored_offset
from surgery.errors import CheckpointError
from surgery.reader import LocalFile, Reader, Span, TensorInfo, check_slices

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

_AGAIN = "The file is incomplete or damaged. Download or copy it again."
_BFLOAT16 = "V2"  # numpy has no bfloat16: np.save of one leaves two raw bytes, and everybody reads them back as such
_NAMES = {
    "b1": "BOOL", "u1": "U8", "u2": "U16", "u4": "U32", "u8": "U64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64",
    "f2": "F16", "f4": "F32", "f8": "F64", "c8": "C64", "c16": "C128", _BFLOAT16: "BF16",
}  # fmt: skip


def open(path: Path) -> Reader:
    return NpzReader(path)


class NpzReader(Reader):
    def __init__(self, path: Path) -> None:
        self.source = str(path)
        self.files = (path,)
        self._file = LocalFile(path)
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._spans: dict[str, Span] = {}
        infos: dict[str, TensorInfo] = {}
        left: list[str] = []
        halves: list[str] = []
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.infolist():
                    name = member.filename.removesuffix(".npy")
                    if name == member.filename:
                        left.append(f"{name} (not an array)")
                        continue
                    if name in infos:
                        raise CheckpointError(f"{path}: {name!r} is in the archive twice", hint=_AGAIN)
                    with archive.open(member) as stream:
                        shape, fortran, dtype = _array_header(stream)
                        start = stream.tell()
                    if dtype.hasobject:
                        raise CheckpointError(
                            f"{path}: {name!r} is an array of Python objects, a pickle, and is not unpickled",
                            hint="Save it again as an array of numbers: np.savez(FILE, **arrays).",
                        )
                    code = dtype.str.lstrip("<>|=")
                    if code not in _NAMES:
                        left.append(f"{name} ({dtype})")
                        continue
                    if code == _BFLOAT16:
                        halves.append(name)
                    info = infos[name] = _info(_NAMES[code], shape)
                    if member.file_size - start != info.nbytes:
                        raise CheckpointError(
                            f"{path}: {name!r} has {member.file_size - start:,} bytes, {info.dtype} of shape {shape} "
                            f"takes {info.nbytes:,}",
                            hint=_AGAIN,
                        )
                    self._members[name] = member
                    plain = dtype.str[0] != ">" and (not fortran or len(shape) < 2)
                    if plain and member.compress_type == zipfile.ZIP_STORED:
                        self._spans[name] = self._stored(member, start, info.nbytes)
        except DAMAGE as error:
            raise CheckpointError(f"{path}: not a readable .npz: {reason(error)}", hint=_AGAIN) from error
        if not infos:
            raise CheckpointError(f"{path}: no arrays of numbers in it", hint=_AGAIN)
        self.infos = infos
        notes = [f"Not tensors, and left out: {', '.join(left)}."] if left else []
        if halves:
            notes.append(f"Two raw bytes an element, read as BF16, which numpy does not have: {', '.join(halves)}.")
        self.notes = tuple(notes)

    def _stored(self, member: zipfile.ZipInfo, start: int, nbytes: int) -> Span:
        """The bytes of an uncompressed array."""
        begin = stored_offset(self._file, member)
        if begin + start + nbytes > self._file.size:
            raise ValueError(f"{member.filename} reaches beyond the end of the file")
        return Span(self._file, begin + start, nbytes)

    def span(self, name: str) -> Span | None:
        return self._spans.get(name)

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        info = self.infos[name]
        if name in self._spans:
            return self._spans[name].tensor(info, slices)
        import numpy as np
        import torch

        cuts = check_slices(slices, info.shape)
        try:
            with zipfile.ZipFile(self._file.path) as archive, archive.open(self._members[name]) as stream:
                array = np.lib.format.read_array(stream, allow_pickle=False)
        except DAMAGE as error:
            raise CheckpointError(f"{self.source}: {name!r} cannot be read: {reason(error)}", hint=_AGAIN) from error
        if array.dtype.str.endswith(_BFLOAT16):
            array = array.view(np.uint16)
        array = np.ascontiguousarray(array.astype(array.dtype.newbyteorder("="), copy=False)).reshape(array.shape)
        return torch.from_numpy(array).view(dtypes.torch_dtype(info.dtype))[cuts]


def _array_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    import numpy as np

    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        return np.lib.format.read_array_header_1_0(stream)
    if version == (2, 0):
        return np.lib.format.read_array_header_2_0(stream)
    raise ValueError(f"array format {version} is for tables with named columns, not for tensors")


def _info(dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    size = dtypes.nbytes(dtype, shape)
    if size is None or any(item < 0 for item in shape):
        raise ValueError(f"impossible shape {shape}")
    return TensorInfo(tuple(shape), dtype, size)
