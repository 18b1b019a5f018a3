"""What is settled of one target tensor: pieces of it, and from which source elements each comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from surgery.mapper.grid import Grid, axes

ReadFn = Callable[[Grid], Tensor]


@dataclass
class Piece:
    """Elements of the target tensor (flat positions) and, in the same shape, the source elements whose sum each is;
    no sources: zero."""

    at: Grid
    sources: tuple[Grid, ...]
    shape: tuple[int, ...]  # of the whole target tensor

    @cached_property
    def box(self) -> list[Tensor] | None:
        return axes(self.at, self.shape)

    @cached_property
    def masks(self) -> list[Tensor] | None:
        """For each axis of the tensor, which coordinates occur; the piece is their product."""
        if self.box is None:
            return None
        out = []
        for n, x in zip(self.shape, self.box, strict=True):
            m = torch.zeros(n, dtype=torch.bool)
            m[x.reshape(-1)] = True
            out.append(m)
        return out if math.prod(int(m.sum()) for m in out) == self.at.numel() else None

    @cached_property
    def whole(self) -> bool:
        """Is it all of the tensor?"""
        return self.at.numel() == math.prod(self.shape)

    def apart_from(self, other: Piece) -> bool:
        """Surely no element in common."""
        if self.at.lo > other.at.hi or other.at.lo > self.at.hi:
            return True
        if self.masks is None or other.masks is None:
            return False
        return any(not bool((a & b).any()) for a, b in zip(self.masks, other.masks, strict=True))

    @cached_property
    def _sorted(self) -> tuple[Tensor, Tensor]:
        flat = self.at.flat()
        order = torch.argsort(flat)
        return flat[order], order

    def lookup(self, positions: Tensor) -> Tensor:
        """For each position, its place in the piece (flat), or -1."""
        if not self.at.numel():
            return torch.full_like(positions, -1)
        if self.masks is None or self.at.numel() < 4096:
            keys, order = self._sorted
            found = torch.searchsorted(keys, positions).clamp_max(len(keys) - 1)
            return torch.where(keys[found] == positions, order[found], -1)
        assert self.box is not None
        place = torch.zeros_like(positions)
        inside = torch.ones_like(positions, dtype=torch.bool)
        rest = positions
        for a in range(len(self.shape) - 1, -1, -1):
            n = self.shape[a]
            here, rest = rest % n, rest // n
            x = self.box[a]
            steps = torch.zeros([1] * self.at.ndim, dtype=torch.int64)  # the flat place that each coordinate stands for
            for d in range(self.at.ndim):
                if x.shape[d] > 1:
                    step = math.prod(self.at.shape[d + 1 :])
                    steps = steps + (torch.arange(x.shape[d]) * step).reshape(
                        [-1 if b == d else 1 for b in range(self.at.ndim)]
                    )
            back = torch.full((n,), -1, dtype=torch.int64)
            back[x.reshape(-1)] = steps.expand(x.shape).reshape(-1)
            got = back[here]
            inside &= got >= 0
            place = place + got
        return torch.where(inside, place, -1)

    def numbers(self, places: Tensor) -> list[Tensor]:
        """The source numbers at these (flat) places of the piece."""
        where, rest = [], places
        for n in reversed(self.at.shape):
            where.append(rest % n)
            rest = rest // n
        where.reverse()
        return [s.at(where) if s.ndim else s.dense().expand(places.shape) for s in self.sources]

    def only(self, keep: Tensor) -> Piece:
        """The piece without some of its elements (a mask over its flat places)."""
        at = Grid.of(self.at.flat()[keep])
        return Piece(at, tuple(Grid.of(s.flat()[keep]) for s in self.sources), self.shape)


@dataclass
class Bound:
    """All that is settled of a tensor: pieces that do not overlap."""

    shape: tuple[int, ...]
    pieces: list[Piece] = field(default_factory=list)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def covered(self) -> int:
        return sum(p.at.numel() for p in self.pieces)

    @property
    def full(self) -> bool:
        return self.covered == self.size

    def with_piece(self, new: Piece) -> Bound | None:
        """This and one piece more; itself where it is known already, None where it contradicts what is settled."""
        kept = []
        for old in self.pieces:
            kept.append(old)
            if new.apart_from(old):
                continue
            if old.at.same(new.at) and len(old.sources) == len(new.sources):
                if all(a.same(b) for a, b in zip(old.sources, new.sources, strict=True)):
                    return self
                return None
            if old.at.numel() < new.at.numel():
                flat = old.at.flat()
                place = new.lookup(flat)
                both = place >= 0
                if not _agree([s.flat()[both] for s in old.sources], new.numbers(place[both])):
                    return None
                if bool(both.all()):  # part of the new one
                    kept.pop()
                    continue
                if not bool(both.any()):
                    continue
            flat = new.at.flat()
            place = old.lookup(flat)
            both = place >= 0
            if not bool(both.any()):
                continue
            if not _agree(old.numbers(place[both]), [s.flat()[both] for s in new.sources]):
                return None
            if bool(both.all()):
                return self
            new = new.only(~both)
        return Bound(self.shape, [*kept, new])

    def lookup(self, positions: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(first source number, further addends) at flat positions: 0 open, -1 zero."""
        ids = torch.zeros(len(positions), dtype=torch.int64)
        more: list[Tensor] = []
        for p in self.pieces:
            place = p.lookup(positions)
            here = place >= 0
            if not bool(here.any()):
                continue
            numbers = p.numbers(place[here])
            ids[here] = torch.where(numbers[0] == 0, -1, numbers[0]) if numbers else -1
            for k, extra in enumerate(numbers[1:]):
                while len(more) <= k:
                    more.append(torch.zeros(len(positions), dtype=torch.int64))
                more[k][here] = extra
        return ids, more

    @cached_property
    def _dense(self) -> tuple[Tensor, list[Tensor]]:
        ids = torch.zeros(self.size, dtype=torch.int64)
        more: list[Tensor] = []
        for p in self.pieces:
            at = p.at.flat()
            first = p.sources[0].flat() if p.sources else None
            ids[at] = torch.where(first == 0, -1, first) if first is not None else -1
            for k, s in enumerate(p.sources[1:]):
                while len(more) <= k:
                    more.append(torch.zeros(self.size, dtype=torch.int64))
                more[k][at] = s.flat()
        return ids, more

    @property
    def ids(self) -> Tensor:
        """For each element the (first) source number: 0 open, -1 zero."""
        return self._dense[0]

    @property
    def more(self) -> list[Tensor]:
        return self._dense[1]

    @classmethod
    def dense(cls, ids: Tensor, more: Sequence[Tensor], shape: tuple[int, ...]) -> Bound:
        """From numbers an element: 0 open, -1 zero."""
        pieces = []
        at = torch.nonzero(ids > 0).flatten()
        if len(at):
            pieces.append(Piece(Grid.of(at), (Grid.of(ids[at]), *(Grid.of(m[at]) for m in more)), shape))
        none = torch.nonzero(ids < 0).flatten()
        if len(none):
            pieces.append(Piece(Grid.of(none), (), shape))
        return cls(shape, pieces)

    @cached_property
    def shift(self) -> int | None:
        """By how much the numbers of one source tensor of this layout are larger than the places, where all comes from
        it as it is."""
        if not self.full or any(len(p.sources) != 1 for p in self.pieces) or not self.pieces:
            return None
        by = self.pieces[0].sources[0].first - self.pieces[0].at.first
        return by if all(p.sources[0].same(p.at.shifted(by)) for p in self.pieces) else None

    # -- values -------------------------------------------------------------------------------------------------------
    def value(self, fetch: ReadFn) -> Tensor:
        """The tensor, all of it settled. `fetch` gives the values of source numbers. A view of the source's own memory
        where the layout allows."""
        if self.shift is not None:
            return fetch(Grid.whole(self.shift, self.shape))
        if len(self.pieces) == 1 and len(self.pieces[0].sources) == 1:
            piece = self.pieces[0]
            if (grid := in_box(piece, piece.sources[0], [(0, n) for n in self.shape])) is not None:
                return fetch(grid)
        return self.partly(fetch, torch.zeros(()))

    def partly(self, fetch: ReadFn, otherwise: Tensor) -> Tensor:
        """The tensor, with `otherwise` where it is open."""
        parts = []
        for p in self.pieces:
            total: Tensor | None = None
            for s in p.sources:
                v = fetch(s)
                total = v if total is None else total.to(torch.float64) + v.to(torch.float64)
            parts.append(total)
        types = {v.dtype for v in parts if v is not None}
        dtype = types.pop() if len(types) == 1 and self.full else torch.float64
        out = otherwise.to(dtype).expand(self.shape).clone(memory_format=torch.contiguous_format)
        flat = out.reshape(-1)
        for p, part in zip(self.pieces, parts, strict=True):
            value = torch.zeros((), dtype=dtype) if part is None else part.to(dtype)
            steps = p.at.strides
            if steps is not None and all(s >= 0 for s in steps):
                flat.as_strided(p.at.shape, steps, p.at.first).copy_(value.expand(p.at.shape))
            else:
                flat[p.at.dense()] = value.expand(p.at.shape)
        return out


def _agree(old: list[Tensor], new: list[Tensor]) -> bool:
    """Are the addends the same, element by element, in whatever order? (0 and no addend at all both mean zero.)"""
    count, n = max(len(old), len(new)), len((old or new or [torch.zeros(0)])[0])
    none = torch.zeros(n, dtype=torch.int64)
    a, b = (torch.stack([*x, *[none] * (count - len(x))]) if count else none for x in (old, new))
    return bool((a == b).all()) if count < 2 else bool((a.sort(0).values == b.sort(0).values).all())


def in_box(piece: Piece, source: Grid, box: Sequence[tuple[int, int]]) -> Grid | None:
    """The source numbers of a piece that is a box of its tensor, (start, length) an axis, in the tensor's own order;
    None where the piece's order is no mere permutation of axes."""
    steps = piece.at.strides
    if steps is None or any(s < 0 for s in steps) or piece.at.numel() != math.prod(n for _, n in box):
        return None
    order = sorted(range(piece.at.ndim), key=lambda a: (-steps[a], piece.at.shape[a] == 1))
    size = [n for _, n in box]
    contiguous = [math.prod(piece.shape[a + 1 :]) for a in range(len(piece.shape))]
    if [piece.at.shape[a] for a in order] == size and all(
        n == 1 or steps[a] == c for a, n, c in zip(order, size, contiguous, strict=True)
    ):
        start = sum(first * c for (first, _), c in zip(box, contiguous, strict=True))
        return source.permute(order) if piece.at.first == start else None
    here = Grid.whole(0, piece.shape)
    for axis, (start, n) in enumerate(box):
        here = here.narrow(axis, start, n)
    if not piece.at.permute(order).reshape(*size).same(here):
        return None
    return source.permute(order).reshape(*size)
