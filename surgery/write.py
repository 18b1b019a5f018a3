"""Write safetensors: a plan from file to file, or tensors from memory. Whole or not at all.

A plan is run row by row in the order of the source's bytes, without building the target. A row that only renames is
copied from file to file by the system; of all others one is in memory at a time. Each file is written beside its place
and renamed into it when all are complete and on the disk.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from surgery import checkpoint, dtypes, shards
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
    order: Literal["source", "rows"] = "source",
    like: str | os.PathLike[str] | Checkpoint | None = None,
    shard_size: int | str | None = None,
) -> Path:
    """Run a plan from file to file and return the path of the file written, a .safetensors.

    Tied tensors are written under every name. Rows that the source does not fill (new, kept, constant) are taken from
    `base`: a checkpoint, or the target's own state dict. An adapter that a rule of the plan merges, or a donor that one
    names, is read beside the source. PlanError where the plan does not fit the source or the base; then, as after any
    error, nothing is left behind and a file that was there before is as it was.

    `order` is that of the tensors in the file: as their bytes lie in the source, or as the plan has its rows; in both,
    larger types come first, so that every tensor is aligned. `like` is a .safetensors with the same names: the order
    of its tensors and its metadata are taken as they are, so that a plan's inverse writes the very file that the plan
    read, byte for byte. A safetensors file holds nothing else but names, shapes, types and bytes.

    `shard_size`, in bytes or as in "2GB" (10^9 bytes), splits the result as huggingface_hub does: OUT-00001-of-0000N
    and so on, and OUT.safetensors.index.json, whose path is returned. What fits into one file is written as one.
    """
    path = _checked_out(out)
    opened = _with_others(checkpoint.open(source), plan)
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
    ordered = sorted(pieces.values(), key=lambda piece: piece.order)
    model = None if like is None else checkpoint.open(like)
    if model is not None:
        names = _names_of(model, plan)
    elif order == "rows":
        # stable: within a type as the rows stand
        names = [row.target for row in sorted(plan.rows, key=lambda row: -dtypes.bits(row.dtype))]
    else:
        names = [name for piece in ordered for name in piece.names]
    # "pt": loaders refuse a file that does not say for which library its layout is.
    said = {"format": "pt"} if model is None else dict(model.metadata)
    limit = None if shard_size is None else shards.parse_size(shard_size)
    return _write(path, ordered, names, {**said, **(metadata or {})}, limit)


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
    ordered = sorted(pieces, key=lambda piece: piece.order)
    names = [piece.names[0] for piece in ordered]
    return _write(path, ordered, names, {"format": "pt", **(metadata or {})}, None)


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


def _with_others(source: Checkpoint, plan: Plan) -> Checkpoint:
    """The source with what the plan's rules read beside it."""
    if not plan.rules:
        return source
    from surgery.beside import joined_by

    return joined_by(source, plan.rules)


def _names_of(model: Checkpoint, plan: Plan) -> list[str]:
    strange = [name for name in model if name not in plan.by_target]
    absent = [name for name in plan.by_target if name not in model]
    if strange or absent:
        said = "; ".join(
            f"{what} {_listed(names)}" for what, names in (("it has", strange), ("it lacks", absent)) if names
        )
        raise PlanError(
            f"{model.source} does not have the tensors that the plan makes: {said}",
            hint="Give as `like` a file of the very names that are to be written.",
        )
    return list(model)


def _piece(row: Row, origin: Row, source: Checkpoint, base: Checkpoint | None) -> _Piece:
    info = _info(row)
    if origin.expr is None:
        if base is None:
            raise PlanError(f"{origin.target}: no base to take it from")
        span = base.span(origin.target) if _same_bytes(base[origin.target], info) else None
        place = base.span(origin.target)
        order = _order(info, place, len(source.files), base.files)
        return _Piece([row.target], info, span, lambda: _stored(loaded(base, origin.target), row), order)
    single = origin.expr.name if isinstance(origin.expr, Name) else None
    span = source.span(single) if single is not None and _same_bytes(source[single], info) else None
    place = source.span(origin.sources[0]) if origin.sources else None
    order = _order(info, place, 0, source.files)

    def value() -> Tensor:
        typed = origin if origin.dtype == row.dtype else _retyped(origin, row)
        return row_value(typed, lambda name: loaded(source, name), lambda name: source[name].dtype)

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


def loaded(opened: Checkpoint, name: str) -> Tensor:
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


def _write(
    path: Path, pieces: Sequence[_Piece], names: Sequence[str], metadata: Mapping[str, str], limit: int | None
) -> Path:
    """Write the pieces, in the order of their sources, to where `names` has them; and give the path of what to open."""
    infos = {name: piece.info for piece in pieces for name in piece.names}
    groups = shards.split({name: infos[name].nbytes for name in names}, limit)
    paths = shards.paths(path, len(groups))
    places: dict[str, tuple[int, int]] = {}
    headers = []
    for number, group in enumerate(groups):
        headers.append(header_bytes([(name, infos[name]) for name in group], metadata))
        offset = len(headers[-1])
        for name in group:
            places[name] = number, offset
            offset += infos[name].nbytes
    with _beside(paths) as files:
        for file, header in zip(files[: len(headers)], headers, strict=True):  # the index, where there is one, has none
            _put(file, memoryview(header))
        for piece in pieces:
            data = None if piece.span is not None else _bytes_of(piece)
            for name in piece.names:
                number, offset = places[name]
                files[number].seek(offset)
                if data is not None:
                    _put(files[number], data)
                elif piece.span is not None:
                    _copy(piece.span, files[number])
            del data  # no more than one value is held
        if len(groups) > 1:
            _put(files[-1], memoryview(shards.index(groups, infos, paths)))
    return paths[-1]


def _bytes_of(piece: _Piece) -> memoryview:
    data = raw_bytes(piece.value(), piece.names[0])
    if len(data) != piece.info.nbytes:
        raise PlanError(f"{piece.names[0]}: its value takes {len(data):,} bytes, the plan gives {piece.info.nbytes:,}")
    return data


@contextmanager
def _beside(paths: Sequence[Path]) -> Iterator[list[FileIO]]:
    """New files beside `paths`, which they replace on success, all or none; gone after any error, an interrupt too."""
    fresh = [path.with_name(f".{path.name[:80]}.{secrets.token_hex(6)}.part") for path in paths]
    # Not tempfile, which would deny others the reading of what comes to be an ordinary file.
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        with ExitStack() as stack:
            files = [stack.enter_context(FileIO(os.open(new, flags, 0o666), "wb")) for new in fresh]
            yield files
            for file in files:
                os.fsync(file.fileno())
        _replace(fresh, paths)
    except BaseException as error:
        for new in fresh:
            with suppress(OSError):  # it is not there, or the path cannot be at all
                new.unlink()
        if isinstance(error, OSError):
            raise _unwritable(paths[-1], error) from error
        raise
    _sync_folder(paths[-1].parent)


def _replace(fresh: Sequence[Path], paths: Sequence[Path]) -> None:
    """Rename all, or none: of several, those that were there before are moved aside until the last is in its place."""
    done: list[tuple[Path, Path | None]] = []
    try:
        for new, path in zip(fresh, paths, strict=True):
            old = new.with_suffix(".old") if len(paths) > 1 and path.exists() else None
            if old is not None:
                os.replace(path, old)
            try:
                os.replace(new, path)
            except BaseException:
                if old is not None:
                    os.replace(old, path)
                raise
            done.append((path, old))
    except BaseException:
        for path, old in reversed(done):
            if old is None:
                path.unlink()
            else:
                os.replace(old, path)
        raise
    for _, old in done:
        if old is not None:
            old.unlink()


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
