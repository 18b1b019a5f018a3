"""What two checkpoints have in common, tensor by tensor: same, renamed, changed, or on one side only.

Headers come first: names, types, sizes and shapes decide what has to be read. Tensors of one name are compared as
bytes, and measured only where these differ. For the others a few bytes from both ends choose candidates, and sha256
decides. All reading goes through chunks of fixed size; only where an order of axes is tried, or where a format has no
plain bytes (a compressed archive), is one whole tensor held.
"""

from __future__ import annotations

import itertools
import math
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from surgery import dtypes
from surgery.checkpoint import Checkpoint, TensorInfo, raw_bytes
from surgery.checkpoint import open as open_checkpoint

if TYPE_CHECKING:
    from torch import Tensor

Status = Literal["same", "renamed", "changed", "left", "right"]
STATUSES: tuple[Status, ...] = ("same", "renamed", "changed", "left", "right")

_CHUNK = 1 << 22  # bytes
_END = 64  # bytes from either end of a tensor that choose candidates
_CORNERS = 16  # elements that are compared before an axis order is tried on all


@dataclass(frozen=True)
class Difference:
    """One tensor of either side, or a pair of them. `left` and `right` are names, None where that side has none.

    "renamed" holds the same bytes under another name, in another shape perhaps, or the same values in another order of
    axes (`axes`, as torch.permute takes it). Of a changed one with equal shapes, `relative` is |right - left| / |left|
    in the l2 norm and `largest` the largest absolute difference, both in float64 (infinite where one side is not a
    number, and relative where the left is zero), and `elements` the number of elements whose values differ. They are
    None where nothing could be measured: other shapes, or a type without arithmetic.
    """

    status: Status
    left: str | None
    right: str | None
    left_info: TensorInfo | None
    right_info: TensorInfo | None
    relative: float | None = None
    largest: float | None = None
    elements: int | None = None
    axes: tuple[int, ...] | None = None
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The left one's name; the right one's where the left has none."""
        return self.left if self.left is not None else str(self.right)

    @property
    def retyped(self) -> bool:
        """Whether both sides have it, in different types."""
        return (
            self.left_info is not None and self.right_info is not None and self.left_info.dtype != self.right_info.dtype
        )

    @property
    def reshaped(self) -> bool:
        """Whether both sides have it, in different shapes."""
        return (
            self.left_info is not None and self.right_info is not None and self.left_info.shape != self.right_info.shape
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where infinity does not exist: a measure that is not finite is null."""

        def side(name: str | None, info: TensorInfo | None) -> dict[str, Any] | None:
            return None if info is None else {"name": name, "dtype": info.dtype, "shape": list(info.shape)}

        return {
            "status": self.status,
            "left": side(self.left, self.left_info),
            "right": side(self.right, self.right_info),
            "relative": _finite(self.relative),
            "largest": _finite(self.largest),
            "elements": self.elements,
            "axes": list(self.axes) if self.axes is not None else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Diff:
    """All that two checkpoints have. `rows` are in the left one's order, then what is only on the right.

    `ties` are sets of names of one side whose floating-point tensors are one tensor, or hold the same bytes; tensors of
    one repeated number (zero biases) are not counted as tied.
    """

    left: str
    right: str
    rows: tuple[Difference, ...]
    left_ties: tuple[tuple[str, ...], ...] = ()
    right_ties: tuple[tuple[str, ...], ...] = ()

    @property
    def same(self) -> bool:
        """Whether both have the same names, types, shapes and bytes. Metadata and order do not count."""
        return all(row.status == "same" for row in self.rows)

    @property
    def counts(self) -> dict[Status, int]:
        """How many rows ended in which way, those that occur."""
        found = Counter(row.status for row in self.rows)
        return {status: found[status] for status in STATUSES if found[status]}

    def of(self, status: Status) -> list[Difference]:
        """The rows that ended so."""
        return [row for row in self.rows if row.status == status]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "left": self.left,
            "right": self.right,
            "same": self.same,
            "counts": self.counts,
            "rows": [row.as_dict() for row in self.rows],
            "ties": {"left": [list(names) for names in self.left_ties], "right": [list(n) for n in self.right_ties]},
        }


def diff(
    left: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint,
    right: str | os.PathLike[str] | Mapping[str, Tensor] | Checkpoint,
) -> Diff:
    """Compare two checkpoints (anything that surgery.open takes). CheckpointError where one cannot be read.

    Same-named tensors pair first. Of the rest, equal bytes pair; where several hold the same bytes (zero biases), those
    whose names end alike pair first, and a note says that others would have done as well.
    """
    a, b = _Side(open_checkpoint(left)), _Side(open_checkpoint(right))
    common = {name: _compared(a, b, name) for name in a.checkpoint if name in b.checkpoint}
    gone = [name for name in a.checkpoint if name not in b.checkpoint]
    come = [name for name in b.checkpoint if name not in a.checkpoint]
    renamed = _renamed(a, b, gone, come)
    left_ties, right_ties = a.ties(), b.ties()
    rows: list[Difference] = []
    for name, info in a.checkpoint.items():
        if name in common:
            rows.append(common[name])
        elif name in renamed:
            rows.append(renamed[name])
        else:
            notes = _still_there(name, left_ties, b.checkpoint)
            rows.append(Difference("left", name, None, info, None, notes=notes))
    taken = {row.right for row in renamed.values()}
    for name in come:
        if name not in taken:
            notes = _still_there(name, right_ties, a.checkpoint)
            rows.append(Difference("right", None, name, None, b.checkpoint[name], notes=notes))
    rows = _moved(a, b, rows)
    return Diff(a.checkpoint.source, b.checkpoint.source, tuple(rows), left_ties, right_ties)


# -- one side ---------------------------------------------------------------------------------------------------------
@dataclass
class _Side:
    """A checkpoint, with what was read of it."""

    checkpoint: Checkpoint
    hashes: dict[str, str] = field(default_factory=dict)
    ends_of: dict[str, bytes] = field(default_factory=dict)

    def bytes_of(self, name: str) -> Callable[[int, int], memoryview]:
        """A function from (start, length) to bytes of the tensor, row-major; what it gave before is overwritten."""
        span = self.checkpoint.span(name)
        if span is None:
            whole = raw_bytes(self.checkpoint.read(name), f"{self.checkpoint.source}: {name!r}")
            return lambda start, length: whole[start : start + length]
        buffer = memoryview(bytearray(min(_CHUNK, span.nbytes)))

        def read(start: int, length: int) -> memoryview:
            span.file.read_into(buffer[:length], span.offset + start)
            return buffer[:length]

        return read

    def hash(self, name: str) -> str:
        if name not in self.hashes:
            self.hashes[name] = self.checkpoint.content_hash(name)
        return self.hashes[name]

    def ends(self, name: str) -> bytes:
        """The first and the last bytes of a tensor."""
        if name not in self.ends_of:
            read, nbytes = self.bytes_of(name), self.checkpoint[name].nbytes
            some = min(_END, nbytes)
            self.ends_of[name] = bytes(read(0, some)) + bytes(read(nbytes - some, some)) if some else b""
        return self.ends_of[name]

    def key(self, name: str) -> Hashable:
        """What must be equal for two tensors to be worth hashing."""
        info = self.checkpoint[name]
        return info.dtype, info.nbytes, self.ends(name)

    def one_number(self, name: str) -> bool:
        """Whether both ends hold one number, repeated."""
        width = max(1, dtypes.bits(self.checkpoint[name].dtype) // 8)
        ends = self.ends(name)
        return ends == ends[:width] * (len(ends) // width)

    def place(self, name: str) -> Hashable:
        """Where the bytes lie; equal for two names of one tensor. None where that is not known."""
        span = self.checkpoint.span(name)
        if span is not None:
            status = os.fstat(span.file.fd)
            return status.st_dev, status.st_ino, span.offset, span.nbytes
        tensor = self.checkpoint.read(name)
        return tensor.data_ptr() if tensor.numel() else None

    def ties(self) -> tuple[tuple[str, ...], ...]:
        alike: dict[Hashable, list[str]] = {}
        for name, info in self.checkpoint.items():
            if info.dtype.startswith(("F", "BF", "C")) and info.numel > 1:
                alike.setdefault((info.dtype, info.shape), []).append(name)
        found: dict[Hashable, list[str]] = {}
        for same_ends in _groups((n for names in alike.values() if len(names) > 1 for n in names), self.key):
            for equal in _groups(same_ends, self.hash):
                if self.one_number(equal[0]):
                    for tied in _groups(equal, self.place):
                        found[tied[0]] = tied
                else:
                    found[equal[0]] = equal
        return tuple(tuple(names) for names in found.values())


def _groups(names: Iterable[str], key: Callable[[str], Hashable]) -> list[list[str]]:
    """Those that share a key with another one."""
    found: dict[Hashable, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return [group for k, group in found.items() if len(group) > 1 and k is not None]


def _still_there(name: str, ties: Sequence[tuple[str, ...]], other: Mapping[str, TensorInfo]) -> tuple[str, ...]:
    partner = next((n for names in ties if name in names for n in names if n in other), None)
    return (f"tied to {partner}, which both have",) if partner is not None else ()


# -- one name ---------------------------------------------------------------------------------------------------------
def _compared(a: _Side, b: _Side, name: str) -> Difference:
    """The tensors that both sides call so."""
    one, two = a.checkpoint[name], b.checkpoint[name]
    if (one.dtype, one.shape) == (two.dtype, two.shape) and _equal(a, b, name):
        return Difference("same", name, name, one, two)
    found = Difference("changed", name, name, one, two)
    if one.dtype == two.dtype and (axes := _axes(a, name, b, name)) is not None:
        return replace(found, axes=axes)
    if one.shape == two.shape:
        return _measured(a, b, found)
    if (one.dtype, one.nbytes) == (two.dtype, two.nbytes) and a.hash(name) == b.hash(name):
        return replace(found, notes=("the same bytes in another shape",))
    return found


def _equal(a: _Side, b: _Side, name: str) -> bool:
    span, other = a.checkpoint.span(name), b.checkpoint.span(name)
    if span is not None and other is not None and a.place(name) == b.place(name):
        return True  # one file
    ours, theirs, nbytes = a.bytes_of(name), b.bytes_of(name), a.checkpoint[name].nbytes
    for start in range(0, nbytes, _CHUNK):
        length = min(_CHUNK, nbytes - start)
        # As bytes: a memoryview is compared element by element.
        if bytes(ours(start, length)) != bytes(theirs(start, length)):
            return False
    return True


def _measured(a: _Side, b: _Side, found: Difference) -> Difference:
    """By how much the values differ, in float64."""
    one, two = found.left_info, found.right_info
    assert one is not None
    assert two is not None
    left, right = str(found.left), str(found.right)
    packed = [info.dtype for info in (one, two) if info.dtype.startswith(("F4", "F6_"))]
    if packed:
        return replace(found, notes=(f"{packed[0]} has no arithmetic, so that nothing was measured",))
    ours, theirs = a.bytes_of(left), b.bytes_of(right)
    widths = [dtypes.bits(info.dtype) // 8 for info in (one, two)]
    step = _CHUNK // 16
    square = norm = largest = 0.0
    differing = unbounded = 0
    for start in range(0, one.numel, step):
        count = min(step, one.numel - start)
        x = _floats(ours(start * widths[0], count * widths[0]), one.dtype)
        y = _floats(theirs(start * widths[1], count * widths[1]), two.dtype)
        delta = y - x
        delta[(x == y) | (x.isnan() & y.isnan())] = 0.0  # infinity less itself is not a number
        unlike = delta != 0
        differing += int((unlike.view(count, -1)).any(1).sum())
        size = delta.abs()
        size[size.isnan()] = math.inf
        unbounded += int(size.isinf().sum())
        largest = max(largest, float(size.max()))
        square += float(size.square().sum())
        norm += float(x.square().nansum())
    notes = () if differing or found.retyped else ("only signs of zeros or kinds of NaN differ",)
    if unbounded:
        notes = (f"{unbounded} {'are' if unbounded > 1 else 'is'} not finite on one side",)
    known = norm and math.isfinite(norm)
    relative = 0.0 if square == 0.0 else math.sqrt(square / norm) if known else math.inf
    return replace(found, relative=relative, largest=largest, elements=differing, notes=notes)


def _floats(raw: memoryview, dtype: str) -> Tensor:
    """Bytes as float64 values; of complex numbers both parts, one after the other."""
    import torch

    values = torch.frombuffer(bytearray(raw), dtype=dtypes.torch_dtype(dtype))
    if values.is_complex():
        values = torch.view_as_real(values).flatten()
    return values.to(torch.float64)


# -- other names ------------------------------------------------------------------------------------------------------
def _renamed(a: _Side, b: _Side, gone: Sequence[str], come: Sequence[str]) -> dict[str, Difference]:
    """Pairs of one tensor under two names, by the left one's."""
    sizes = {(info.dtype, info.nbytes) for info in map(b.checkpoint.__getitem__, come)}
    left = [name for name in gone if (a.checkpoint[name].dtype, a.checkpoint[name].nbytes) in sizes]
    keys = {a.key(name) for name in left}
    right: dict[str, list[str]] = {}
    met: set[Hashable] = set()
    for name in come:
        if b.key(name) in keys:
            met.add(b.key(name))
            right.setdefault(b.hash(name), []).append(name)
    ours: dict[str, list[str]] = {}
    for name in left:
        if a.key(name) in met:
            ours.setdefault(a.hash(name), []).append(name)
    found: dict[str, Difference] = {}
    for digest, names in ours.items():
        candidates = [name for name in right.get(digest, ()) if b.key(name) == a.key(names[0])]
        for name, other in _pairs(names, candidates, a, b):
            alike = max(len(names), len(candidates))
            notes = (f"one of {alike} with these bytes",) if alike > 1 else ()
            one, two = a.checkpoint[name], b.checkpoint[other]
            if one.shape != two.shape:
                notes = (*notes, "the same bytes in another shape")
            found[name] = Difference("renamed", name, other, one, two, notes=notes)
    taken = {row.right for row in found.values()}
    found |= _permuted(a, b, [n for n in gone if n not in found], [n for n in come if n not in taken])
    return found


def _pairs(left: Sequence[str], right: Sequence[str], a: _Side, b: _Side) -> Iterator[tuple[str, str]]:
    """Names of equal contents: equal shapes first, then names that end alike, then in order."""
    free = list(right)
    for name in left:
        if not free:
            return

        def fit(other: str, name: str = name) -> tuple[bool, int]:
            return a.checkpoint[name].shape == b.checkpoint[other].shape, _common_end(name, other)

        best = max(free, key=fit)
        free.remove(best)
        yield name, best


def _common_end(one: str, two: str) -> int:
    """How many words the names share at their end."""
    words = [name.split(".")[::-1] for name in (one, two)]
    return len(os.path.commonprefix(words))  # noqa: RUF071  of lists it compares word by word


def _permuted(a: _Side, b: _Side, gone: Sequence[str], come: Sequence[str]) -> dict[str, Difference]:
    """Pairs that hold the same values in another order of axes. Any order keeps the first and the last element."""

    def corner(side: _Side, name: str) -> Hashable:
        info, ends = side.checkpoint[name], side.ends(name)
        width = max(1, dtypes.bits(info.dtype) // 8)
        return info.dtype, tuple(sorted(info.shape)), ends[:width], ends[-width:]

    def matrices(side: _Side, names: Sequence[str]) -> list[str]:
        return [n for n in names if len(side.checkpoint[n].shape) > 1 and side.checkpoint[n].nbytes > _END]

    shapes = {tuple(sorted(b.checkpoint[name].shape)) for name in matrices(b, come)}
    free: dict[Hashable, list[str]] = {}
    wanted = [name for name in matrices(a, gone) if tuple(sorted(a.checkpoint[name].shape)) in shapes]
    for name in matrices(b, come) if wanted else ():
        free.setdefault(corner(b, name), []).append(name)
    found: dict[str, Difference] = {}
    for name in wanted:
        others = free.get(corner(a, name), [])
        for other in others:
            axes = _axes(a, name, b, other)
            if axes is not None:
                one, two = a.checkpoint[name], b.checkpoint[other]
                found[name] = Difference("renamed", name, other, one, two, axes=axes)
                others.remove(other)
                break
    return found


def _axes(a: _Side, left: str, b: _Side, right: str) -> tuple[int, ...] | None:
    """The order of axes that makes the left tensor the right one, other than the order it has."""
    one, two = a.checkpoint[left], b.checkpoint[right]
    rank = len(one.shape)
    if not 2 <= rank <= 5 or sorted(one.shape) != sorted(two.shape) or one.nbytes <= _END:
        return None
    if dtypes.bits(one.dtype) < 8:
        return None
    width = dtypes.bits(one.dtype) // 8
    if a.ends(left)[:width] != b.ends(right)[:width] or a.ends(left)[-width:] != b.ends(right)[-width:]:
        return None
    x, y = a.checkpoint.read(left), b.checkpoint.read(right)
    for axes in itertools.permutations(range(rank)):
        if axes == tuple(range(rank)) or tuple(one.shape[axis] for axis in axes) != tuple(two.shape):
            continue
        turned = x.permute(axes)
        places = [
            tuple(k * (n - 1) // (_CORNERS + 1 + axis) for axis, n in enumerate(two.shape)) for k in range(_CORNERS)
        ]
        if all(turned[place].equal(y[place]) for place in places) and turned.equal(y):
            return axes
    return None


def _moved(a: _Side, b: _Side, rows: list[Difference]) -> list[Difference]:
    """Changed tensors whose bytes the left has under another name: swapped, shifted, or taken twice."""
    changed = [row for row in rows if row.status == "changed" and row.right is not None]
    sizes = {(row.right_info.dtype, row.right_info.nbytes) for row in changed if row.right_info is not None}
    keys: dict[Hashable, list[str]] = {}
    for name, info in a.checkpoint.items():
        if (info.dtype, info.nbytes) in sizes:
            keys.setdefault(a.key(name), []).append(name)
    found: dict[str, str] = {}
    for row in changed:
        name = str(row.right)
        if b.one_number(name):
            continue
        held = [n for n in keys.get(b.key(name), ()) if n != name and a.hash(n) == b.hash(name)]
        if held:
            found[name] = max(held, key=lambda other, name=name: _common_end(name, other))  # type: ignore[misc]
    return [
        replace(row, notes=(*row.notes, f"now what {found[row.name]} was"))
        if row.status == "changed" and row.name in found
        else row
        for row in rows
    ]


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
