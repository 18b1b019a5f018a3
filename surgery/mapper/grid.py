"""Arrays of element numbers that are written down as sums of small ones.

A weight of 768 x 3072 elements has as many numbers, but they are `first + 3072 * row + column`: one short vector an
axis says it all. A Grid is a base and a few such parts, each varying along axes of its own; transposing, cutting,
reshaping and concatenating grids gives grids, so that a mapping of a whole model costs what its axes are long, not what
they multiply to. What has no such form is one dense part.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor

Index = Sequence[int] | Tensor


def _varying(t: Tensor) -> frozenset[int]:
    return frozenset(a for a, n in enumerate(t.shape) if n > 1)


class Grid:
    """Numbers `base + sum(parts)`; every part has the grid's number of axes, and length 1 where it does not vary."""

    def __init__(self, shape: Iterable[int], base: int, parts: Iterable[Tensor]) -> None:
        self.shape = tuple(shape)
        self.base = base
        self.parts = self._tidy(list(parts))

    def _tidy(self, parts: list[Tensor]) -> tuple[Tensor, ...]:
        """Parts that vary along axes of their own, each from zero up; constants go into the base."""
        if 0 in self.shape:
            return (torch.zeros(self.shape, dtype=torch.int64),)
        out: list[Tensor] = []
        for p in parts:
            if p.numel() == 1:
                self.base += int(p.reshape(()))
                continue
            axes = _varying(p)
            for o in [o for o in out if _varying(o) & axes]:
                out = [x for x in out if x is not o]
                p = p + o
            out.append(p)
        done = []
        for p in out:
            least = int(p.min())
            self.base += least
            done.append(p - least if least else p)
        return tuple(sorted(done, key=lambda p: min(_varying(p))))

    @classmethod
    def whole(cls, first: int, shape: Sequence[int]) -> Grid:
        """All elements of a tensor, row by row."""
        return cls.strided(first, shape, [math.prod(shape[a + 1 :]) for a in range(len(shape))])

    @classmethod
    def strided(cls, first: int, shape: Sequence[int], strides: Sequence[int]) -> Grid:
        parts = []
        for a, (n, s) in enumerate(zip(shape, strides, strict=True)):
            if n > 1 and s:
                parts.append((torch.arange(n) * s).reshape([n if b == a else 1 for b in range(len(shape))]))
        return cls(shape, first, parts)

    @classmethod
    def of(cls, numbers: Tensor) -> Grid:
        """These numbers, as they are."""
        return cls(numbers.shape, 0, [numbers.to(torch.int64)])

    # -- what it holds ------------------------------------------------------------------------------------------------
    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def lo(self) -> int:
        return self.base

    @cached_property
    def hi(self) -> int:
        return self.base + sum(int(p.max()) for p in self.parts) if self.numel() else self.base

    @property
    def first(self) -> int:
        """The number in the first place."""
        return self.base + sum(int(p.reshape(-1)[0]) for p in self.parts) if self.numel() else self.base

    @property
    def holes(self) -> bool:
        """Is there an element that is no weight? (Numbers of weights start at 1.)"""
        return self.lo <= 0

    def dense(self) -> Tensor:
        out = torch.full((), self.base, dtype=torch.int64)
        for p in self.parts:
            out = out + p
        return out.expand(self.shape)

    def flat(self) -> Tensor:
        return self.dense().reshape(-1)

    @cached_property
    def injective(self) -> bool:
        """Does no number stand twice?"""
        if self.numel() < 2:
            return True
        if any(n > 1 and not any(p.shape[a] > 1 for p in self.parts) for a, n in enumerate(self.shape)):
            return False
        reach = 0  # parts like digits: each step of one is larger than all that the smaller ones can add up to
        for p in sorted(self.parts, key=lambda p: int(p.max())):
            values = torch.unique(p)
            if len(values) != p.numel():
                return False
            if int((values[1:] - values[:-1]).min()) <= reach:
                flat = self.flat()
                return len(torch.unique(flat)) == len(flat)
            reach += int(values[-1])
        return True

    def __contains__(self, number: int) -> bool:
        """Does this number stand in it?"""
        parts = sorted(self.parts, key=lambda p: -int(p.max())) if self.numel() else []

        def made(rest: int, at: int) -> bool:
            if at == len(parts):
                return rest == 0
            reach = sum(int(p.max()) for p in parts[at + 1 :])
            near = parts[at][(parts[at] <= rest) & (parts[at] >= rest - reach)]
            return any(made(rest - value, at + 1) for value in torch.unique(near).tolist())

        return bool(self.numel()) and self.lo <= number <= self.hi and made(number - self.base, 0)

    @cached_property
    def strides(self) -> tuple[int, ...] | None:
        """One step an axis, where the numbers go in even steps along every axis."""
        steps = [0] * self.ndim
        for p in self.parts if self.numel() else ():
            rebuilt = torch.zeros([1] * self.ndim, dtype=torch.int64)
            origin = p.reshape(-1)[0]
            for a in _varying(p):
                steps[a] = int(p.narrow(a, 1, 1).reshape(-1)[0] - origin)
                rebuilt = rebuilt + (torch.arange(p.shape[a]) * steps[a]).reshape(
                    [-1 if b == a else 1 for b in range(self.ndim)]
                )
            if not bool((p == rebuilt + origin).all()):
                return None
        return tuple(steps)

    def key(self) -> tuple[object, ...]:
        """Equal for grids of the same numbers that are written down alike."""
        told: list[object] = [self.shape, self.base]
        for p in self.parts:
            weigh = torch.arange(1, p.numel() + 1, dtype=torch.float64)
            told.append((tuple(p.shape), float((p.reshape(-1) * weigh).sum())))
        return tuple(told)

    def same(self, other: Grid) -> bool:
        if self.shape != other.shape:
            return False
        if self is other or not self.numel():
            return True
        if len(self.parts) == len(other.parts) and all(
            p.shape == q.shape for p, q in zip(self.parts, other.parts, strict=True)
        ):
            return self.base == other.base and all(
                p is q or bool((p == q).all()) for p, q in zip(self.parts, other.parts, strict=True)
            )
        return bool((self.dense() == other.dense()).all())

    def at(self, where: Sequence[Tensor]) -> Tensor:
        """The numbers at these coordinates (a tensor an axis)."""
        out = torch.full((), self.base, dtype=torch.int64)
        for p in self.parts:
            out = out + p[tuple(w if p.shape[a] > 1 else torch.zeros_like(w) for a, w in enumerate(where))]
        return out.expand(where[0].shape) if where else out

    # -- moving it ----------------------------------------------------------------------------------------------------
    def shifted(self, by: int) -> Grid:
        return Grid(self.shape, self.base + by, self.parts)

    def viewed(self, f: Callable[[Tensor], Tensor]) -> Grid:
        """f, an operator that only views its argument, on every part."""
        parts, shape = [], None
        for p in self.parts or (torch.zeros([1] * self.ndim, dtype=torch.int64),):
            y = f(p.expand(self.shape))
            shape = y.shape
            for a, n in enumerate(y.shape):
                if n > 1 and y.stride(a) == 0:
                    y = y.narrow(a, 0, 1)
            parts.append(y)
        assert shape is not None
        return Grid(shape, self.base, parts)

    def permute(self, dims: Sequence[int]) -> Grid:
        return self.viewed(lambda t: t.permute(tuple(dims)))

    def transpose(self, a: int, b: int) -> Grid:
        return self.viewed(lambda t: t.transpose(a, b))

    def expand(self, shape: Sequence[int]) -> Grid:
        return self.viewed(lambda t: t.expand(tuple(shape)))

    def unsqueeze(self, axis: int) -> Grid:
        return self.viewed(lambda t: t.unsqueeze(axis))

    def take(self, axis: int, index: Tensor) -> Grid:
        """These lines along an axis, in this order."""
        axis %= self.ndim
        parts = [p.index_select(axis, index) if p.shape[axis] > 1 else p for p in self.parts]
        return Grid([len(index) if a == axis else n for a, n in enumerate(self.shape)], self.base, parts)

    def once(self, axis: int) -> Grid:
        """The lines along an axis without those that stand there already."""
        if all(p.shape[axis] == 1 for p in self.parts):
            return self.narrow(axis, 0, 1)
        lines = self.dense().movedim(axis, 0).reshape(self.shape[axis], -1)
        _, inverse = torch.unique(lines, dim=0, return_inverse=True)
        first = torch.full((int(inverse.max()) + 1,), len(lines), dtype=torch.int64)
        first.scatter_reduce_(0, inverse, torch.arange(len(lines)), "amin")
        return self if len(first) == len(lines) else self.take(axis, torch.sort(first).values)

    def narrow(self, axis: int, start: int, length: int) -> Grid:
        return self.viewed(lambda t: t.narrow(axis, start, length))

    def reshape(self, *shape: int) -> Grid:
        """Row by row in another shape: axes that stay apart stay apart."""
        n = self.numel()
        want = list(shape)
        if -1 in want:
            rest = math.prod(w for w in want if w != -1)
            want[want.index(-1)] = n // rest if rest else 0
        if tuple(want) == self.shape:
            return self
        if math.prod(want) != n:
            raise ValueError(f"{n} numbers do not make the shape {tuple(want)}")
        if n == 0:
            return Grid(want, self.base, [])
        groups = list(_groups(self.shape, want))
        parts = []
        for p in self.parts:
            axes = _varying(p)
            touched = [g for g in groups if axes & set(g[0])]
            wide = [1] * self.ndim
            thin = [1] * len(want)
            for old, new in touched:
                for a in old:
                    wide[a] = self.shape[a]
                for b in new:
                    thin[b] = want[b]
            y = p.expand(wide).reshape(thin)
            if sum(m > 1 for m in y.shape) > 1:  # an axis that was split off may not vary
                for a, m in enumerate(y.shape):
                    if m > 1 and bool((y == y.narrow(a, 0, 1)).all()):
                        y = y.narrow(a, 0, 1)
            parts.append(y)
        return Grid(want, self.base, parts)

    @staticmethod
    def cat(grids: Sequence[Grid], axis: int) -> Grid:
        axis %= grids[0].ndim
        shape = list(grids[0].shape)
        shape[axis] = sum(g.shape[axis] for g in grids)
        lines, others = [], None
        for g in grids:
            along = [p for p in g.parts if p.shape[axis] > 1]
            across = [p for p in g.parts if p.shape[axis] == 1]
            if any(_varying(p) != {axis} for p in along):
                break
            if others is not None and not _alike(others, across):
                break
            others = across
            line = torch.full([g.shape[axis] if a == axis else 1 for a in range(g.ndim)], g.base, dtype=torch.int64)
            lines.append(line + along[0] if along else line)
        else:
            return Grid(shape, 0, [torch.cat(lines, axis), *(others or [])])
        return Grid.of(torch.cat([g.dense() for g in grids], axis))


def _alike(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(p.shape == q.shape and bool((p == q).all()) for p, q in zip(a, b, strict=True))


def _groups(old: Sequence[int], new: Sequence[int]) -> Iterable[tuple[list[int], list[int]]]:
    """Runs of axes of two shapes that hold the same number of elements, as short as they come."""
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            a, left, i = old[i], [i], i + 1
        if j < len(new):
            b, right, j = new[j], [j], j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
                left.append(i - 1)
            else:
                b, j = b * new[j], j + 1
                right.append(j - 1)
        yield left, right


def cut(grid: Grid, edges: Sequence[int]) -> tuple[int, list[tuple[int, int]]] | None:
    """Where a grid crosses from one numbered tensor (they begin at `edges`) into another: (axis, runs of lines that
    stay in one: start and length), or None where no axis parts them so."""
    starts = torch.tensor(sorted(edges))
    for p in grid.parts:
        varying = _varying(p)
        if len(varying) != 1:
            continue
        (axis,) = varying
        rest = grid.hi - grid.base - int(p.max())
        low = grid.base + p.reshape(-1)
        a, b = torch.bucketize(low, starts, right=True), torch.bucketize(low + rest, starts, right=True)
        if not bool((a == b).all()):
            continue
        jumps = (torch.nonzero(a[1:] != a[:-1]).flatten() + 1).tolist()
        bounds = [0, *jumps, len(a)]
        return axis, [(i, j - i) for i, j in itertools.pairwise(bounds)]
    return None


# ------------------------------------------------------------------------------------------------- grids and tensors


def read(flat: Tensor, positions: Grid) -> Tensor:
    """The elements of a contiguous tensor at these positions; a view where they go in even steps."""
    steps = positions.strides
    if steps is not None and all(s >= 0 for s in steps) and flat.is_contiguous():
        return flat.as_strided(positions.shape, steps, flat.storage_offset() + positions.first)
    return flat.reshape(-1)[positions.dense()]


def axes(positions: Grid, shape: Sequence[int]) -> list[Tensor] | None:
    """Positions in a tensor of `shape` as a product of index sets: for each axis of the tensor, the coordinates along
    it, shaped like the grid (length 1 where they do not vary). None where they are no such product."""
    steps = [math.prod(shape[a + 1 :]) for a in range(len(shape))]
    out = []
    base = positions.base
    if not positions.numel():
        return None
    for n, s in zip(shape, steps, strict=True):
        out.append(torch.full([1] * positions.ndim, (base // s) % n if s else 0, dtype=torch.int64))
    for p in positions.parts:
        top = int(p.max())
        for a, (n, s) in enumerate(zip(shape, steps, strict=True)):
            if n > 1 and top // s < n and bool((p % s == 0).all()):
                out[a] = out[a] + p // s
                break
        else:
            return None
    for n, x in zip(shape, out, strict=True):
        if x.numel() and int(x.max()) >= n:
            return None
    return out
