"""Write safetensors: a plan from file to file, or tensors from memory. Whole or not at all.

A plan is run row by row in the order of the source's bytes, without building the target. A row that only renames is
copied from file to file by the system; of all others one is in memory at a time. The file is written beside its place
and renamed into it when it is complete and on the disk.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

from surgery import checkpoint, dtypes
from surgery.checkpoint import Checkpoint, raw_bytes
from surgery.errors import CheckpointError, PlanError
from surgery.expr import Name, evaluate, evaluate_unrounded, kind
from surgery.ops.constant import cast_is_exact
from surgery.plan import Plan, Row
from surgery.reader import LocalFile, Span, TensorInfo
from surgery.safetensors_format import header_bytes

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 1 << 23
_SHOWN = 8


def write(
    source: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint,
    plan: Plan,
    out: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Run a plan from file to file and return the path of the file written, a .safetensors.

    Tied tensors are written under every name. Rows that the source does not fill (new, kept, constant) are taken from
    `base`: a checkpoint, or the target's own state dict. PlanError where the plan does not fit the source or the base;
    then, as after any error, nothing is left behind and a file that was there before is as it was.
    """
    path = _checked_out(out)
    opened = checkpoint.open(source)
    plan.check(opened, {row.target: _info(row) for row in plan.rows})
    own = None if base is None else checkpoint.open(base)
    _check_base(plan, own)
    pieces: dict[tuple[str, str], _Piece] = {}
    for row in plan.rows:
        origin = row if row.tied_to is None else plan[row.tied_to]
        key = (origin.target, row.dtype)
        if key in pieces:
            pieces[key].names.append(row.target)
        else:
            pieces[key] = _piece(row, origin, opened, own)
    _write(path, sorted(pieces.values(), key=lambda piece: piece.order), metadata)
    return path


def save(
    tensors: Mapping[str, Tensor], out: str | os.PathLike[str], *, metadata: Mapping[str, str] | None = None
) -> Path:
    """Write a state dict as .safetensors, tensors that share memory under every name, and return the file's path."""
    path = _checked_out(out)
    opened = checkpoint.open(tensors)
    left = [str(name) for name in tensors if name not in opened]
    if left:
        raise CheckpointError(f"not tensors: {_listed(left)}", hint="Save the tensors of a state dict, and no others.")
    pieces = [
        _Piece([name], info, None, partial(opened.read, name), (-_alignment(info), 0, 0))
        for name, info in opened.items()
    ]
    for piece in pieces:
        if piece.info.dtype not in dtypes.SAFETENSORS:
            raise CheckpointError(
                f"{piece.names[0]}: safetensors has no type for {piece.info.dtype}", hint="Convert it before saving."
            )
    _write(path, sorted(pieces, key=lambda piece: piece.order), metadata)
    return path


def row_value(row: Row, read: Callable[[str], Tensor], dtype_of: Callable[[str], str]) -> Tensor:
    """The value of a row with an expression, in the row's own type: relayouts bit for bit, arithmetic in float64 and
    rounded only when stored."""
    if row.expr is None:
        raise PlanError(f"{row.target}: a {row.status} tensor has no expression")
    if kind(row.expr, dtype_of) == "exact":
        return _stored(evaluate(row.expr, read), row)
    return _stored(evaluate_unrounded(row.expr, read, _lifted), row)


# --- what is written -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """One value, under one name or several: the bytes of `span`, or what `value` gives."""

    names: list[str]
    info: TensorInfo
    span: Span | None
    value: Callable[[], Tensor]
    order: tuple[int, int, int]


def _piece(row: Row, origin: Row, source: Checkpoint, base: Checkpoint | None) -> _Piece:
    info = _info(row)
    if origin.expr is None:
        if base is None:
            raise PlanError(f"{origin.target}: no base to take it from")
        span = base.span(origin.target) if _same_bytes(base[origin.target], info) else None
        place = base.span(origin.target)
        order = _order(info, place, len(source.files), base.files)
        return _Piece([row.target], info, span, lambda: _stored(_own(base, origin.target), row), order)
    single = origin.expr.name if isinstance(origin.expr, Name) else None
    span = source.span(single) if single is not None and _same_bytes(source[single], info) else None
    place = source.span(origin.sources[0]) if origin.sources else None
    order = _order(info, place, 0, source.files)

    def value() -> Tensor:
        typed = origin if origin.dtype == row.dtype else _retyped(origin, row)
        return row_value(typed, lambda name: _own(source, name), lambda name: source[name].dtype)

    return _Piece([row.target], info, span, value, order)


def _retyped(origin: Row, row: Row) -> Row:
    return Row(row.target, origin.status, origin.expr, row.shape, row.dtype)


def _order(info: TensorInfo, place: Span | None, first: int, files: Sequence[Path]) -> tuple[int, int, int]:
    """Large element types first, so that every tensor is aligned for its type; then as the bytes lie in the source."""
    if place is None:
        return -_alignment(info), first, 0
    return -_alignment(info), first + files.index(place.path), place.offset


def _alignment(info: TensorInfo) -> int:
    return dtypes.bits(info.dtype)


def _same_bytes(have: TensorInfo, wanted: TensorInfo) -> bool:
    return (have.dtype, have.shape) == (wanted.dtype, wanted.shape)


def _info(row: Row) -> TensorInfo:
    if row.dtype not in dtypes.SAFETENSORS:
        known = ", ".join(sorted(dtypes.SAFETENSORS))
        raise PlanError(f"{row.target}: safetensors has no type {row.dtype!r}", hint=f"It has {known}.")
    nbytes = dtypes.nbytes(row.dtype, row.shape)
    if nbytes is None:
        raise PlanError(f"{row.target}: {row.dtype} of shape {row.shape} does not fill whole bytes")
    return TensorInfo(row.shape, row.dtype, nbytes)


def _check_base(plan: Plan, base: Checkpoint | None) -> None:
    needed = [row for row in plan.rows if row.expr is None and row.tied_to is None]
    absent = [f"{row.target} ({row.status})" for row in needed if base is None or row.target not in base]
    if absent:
        where = "and no base was given" if base is None else f"and {base.source} does not have them"
        raise PlanError(
            f"{len(absent)} tensors do not come from the source, {where}: {_listed(absent)}",
            hint="Pass the target's own values: write(..., base=model.state_dict()), or a file of them.",
        )
    if base is not None:
        differing = [
            f"{row.target} {base[row.target].shape}, planned {row.shape}"
            for row in needed
            if base[row.target].shape != row.shape
        ]
        if differing:
            raise PlanError(
                f"{len(differing)} tensors have another shape in {base.source}: {_listed(differing)}",
                hint="Pass the values of the target that the plan was made for.",
            )


# --- values ----------------------------------------------------------------------------------------------------------


def _own(opened: Checkpoint, name: str) -> Tensor:
    """A tensor read for one use: not through the map, whose pages would stay with the process."""
    span = opened.span(name)
    return opened.read(name) if span is None else span.load(opened[name])


def _lifted(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _stored(value: Tensor, row: Row) -> Tensor:
    """The value in the row's type. Rounding a float is what storing means; any other loss must stand in the plan."""
    wanted = dtypes.torch_dtype(row.dtype)
    if value.dtype == wanted:
        return value
    have = dtypes.name_of(value.dtype)
    rounding = value.is_floating_point() and wanted.is_floating_point
    if not rounding and not cast_is_exact(have, row.dtype):
        raise PlanError(
            f"{row.target}: its value is {have}, and the target's {row.dtype} does not hold every {have}",
            hint=f'If that is meant, write it into the row: cast(..., dtype="{row.dtype}").',
        )
    return value.to(wanted)


# --- the file --------------------------------------------------------------------------------------------------------


def _write(path: Path, pieces: Sequence[_Piece], metadata: Mapping[str, str] | None) -> None:
    entries = [(name, piece.info) for piece in pieces for name in piece.names]
    with _beside(path) as file:
        # "pt": loaders refuse a file that does not say for which library its layout is.
        _put(file, memoryview(header_bytes(entries, {"format": "pt", **(metadata or {})})))
        for piece in pieces:
            if piece.span is not None:
                for _ in piece.names:
                    _copy(piece.span, file)
                continue
            # One name after the other, so that no more than this one value is held.
            data = raw_bytes(piece.value(), piece.names[0])
            if len(data) != piece.info.nbytes:
                raise PlanError(
                    f"{piece.names[0]}: its value takes {len(data):,} bytes, the plan gives {piece.info.nbytes:,}"
                )
            for _ in piece.names:
                _put(file, data)
            del data


@contextmanager
def _beside(path: Path) -> Iterator[FileIO]:
    """A new file beside `path`, which it replaces on success; gone after any error, an interrupt too."""
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.part")
    try:
        # Not tempfile, which would deny others the reading of what comes to be an ordinary file.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        file = FileIO(os.open(temporary, flags, 0o666), "wb")
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with file:
            yield file
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(FileNotFoundError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise _unwritable(path, error) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the system lets a folder be synced."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot; the file itself is complete
            os.fsync(fd)
    finally:
        os.close(fd)


def _copy(span: Span, file: FileIO) -> None:
    """Bytes from file to file, inside the kernel where it can: there they are shared, or moved at the disk's speed."""
    offset, left = span.offset, span.nbytes
    if hasattr(os, "copy_file_range"):
        # An error here says that these two file systems cannot, or is met again, and reported, by the plain copy.
        with suppress(OSError):
            while left:
                count = os.copy_file_range(span.file.fd, file.fileno(), left, offset_src=offset)
                if not count:
                    break
                offset, left = offset + count, left - count
    _copy_through_memory(span.file, offset, left, file)


def _copy_through_memory(source: LocalFile, offset: int, left: int, file: FileIO) -> None:
    buffer = memoryview(bytearray(min(_CHUNK, left)))
    while left:
        chunk = buffer[: min(_CHUNK, left)]
        source.read_into(chunk, offset)
        _put(file, chunk)
        offset, left = offset + len(chunk), left - len(chunk)


def _put(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _checked_out(out: str | os.PathLike[str]) -> Path:
    path = Path(out)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{path}: only safetensors are written", hint=f"Name it {path.with_suffix('.safetensors')}."
        )
    if os.path.isdir(path):  # Path.is_dir would raise for a name that is too long
        raise CheckpointError(f"{path}: a folder, not a file", hint="Give the path of the file to write.")
    if not os.path.isdir(path.parent):
        raise CheckpointError(f"{path}: its folder does not exist", hint=f"Make it first: mkdir -p {path.parent}")
    return path


def _unwritable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be written: {error.strerror or error}",
        hint=f"Nothing was left behind. See what room and rights there are: df -h {path.parent}; ls -ld {path.parent}",
    )


def _listed(items: Sequence[str]) -> str:
    more = len(items) - _SHOWN
    return ", ".join(items[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
