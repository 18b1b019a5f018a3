"""Lines that no input reached, where the lines that were reached come, step by step, from one tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.mapper.bound import Bound, Piece
from surgery.mapper.grid import Grid
from surgery.mapper.reference import Reference


def complete(b: Bound, reference: Reference) -> Bound:
    """Fill lines that no input reached where the lines that were reached come, step by step, from one tensor.

    Along the axis on which whole lines are open: the settled lines of each source tensor must be an affine function of
    the line's place (row r from row r - offset: positions, tokens, a merged table), and a place that two such functions
    claim stays open.
    """
    if b.full or not b.shape or not b.pieces:
        return b
    if not any(p.sources for p in b.pieces):
        return _nothing_but_zeros(b)
    at = torch.cat([p.at.flat() for p in b.pieces])
    order = torch.argsort(at)
    at = at[order]
    count = max(len(p.sources) for p in b.pieces)
    if any(len(p.sources) != count or not count for p in b.pieces):
        return b
    columns = [torch.cat([p.sources[k].flat() for p in b.pieces])[order] for k in range(count)]
    if any(bool((c <= 0).any()) for c in columns):
        return b
    for axis, n in enumerate(b.shape):
        step = math.prod(b.shape[axis + 1 :])
        line = (at // step) % n
        settled, counts = torch.unique(line, return_counts=True)
        if not bool((counts == b.size // n).all()):
            continue
        by_line = torch.argsort(line, stable=True)
        rows = [c[by_line].reshape(len(settled), -1) for c in columns]
        within = at[by_line].reshape(len(settled), -1)[0] - settled[0] * step
        laws = _laws(rows, settled, n, reference)
        if laws is None:
            continue
        pieces = []
        for where, parts in laws:
            place = Grid((len(where), len(within)), 0, [(where * step).unsqueeze(1), within.unsqueeze(0)])
            pieces.append(Piece(place, tuple(parts), b.shape))
        return Bound(b.shape, pieces)
    return b


def _nothing_but_zeros(b: Bound) -> Bound:
    """A table of which every row that was reached is one that the source does without: the other rows as well."""
    reached = torch.cat([p.at.flat() for p in b.pieces]) // math.prod(b.shape[1:])
    if len(b.shape) < 2 or not bool((torch.unique(reached, return_counts=True)[1] == math.prod(b.shape[1:])).all()):
        return b
    return Bound(b.shape, [Piece(Grid.whole(0, b.shape), (), b.shape)])


def _laws(rows: list[Tensor], settled: Tensor, n: int, reference: Reference) -> list[tuple[Tensor, list[Grid]]] | None:
    """(lines, for each addend the numbers in them) of every law; the settled lines that follow none as they are."""
    if len(rows) > 1:  # a sum of several tensors: each addend by its own law, in the lines where all of them hold
        found = [_law(r, settled, n, reference) for r in rows]
        laws = [law for law in found if law is not None]
        if len(laws) != len(rows):
            return None
        where = torch.nonzero(torch.stack([law.valid for law in laws]).all(0)).flatten()
        return [(where, [law.rows(where) for law in laws])]
    edges = torch.tensor(sorted(reference.spans()))
    owner = torch.bucketize(rows[0][:, 0].contiguous(), edges, right=True)
    claims = torch.zeros(n, dtype=torch.int64)
    taken = torch.zeros(n, dtype=torch.bool)
    taken[settled] = True
    out: list[tuple[Tensor, list[Grid]]] = []
    kept: list[tuple[Tensor, _Law]] = []
    for o in torch.unique(owner).tolist():
        mine = torch.nonzero(owner == o).flatten()
        law = _law(rows[0][mine], settled[mine], n, reference)
        if law is None:
            out.append((settled[mine], [Grid.of(rows[0][mine])]))
            continue
        claims += law.valid.to(torch.int64)
        kept.append((settled[mine], law))
    for own, law in kept:
        here = law.valid & ~taken & (claims == 1)
        here[own] = True
        where = torch.nonzero(here).flatten()
        out.append((where, [law.rows(where)]))
    return out


@dataclass
class _Law:
    """Row r holds the numbers start + (r - at) * step, where that stays inside the source tensor and its axis."""

    at: int
    start: Tensor
    step: int
    valid: Tensor  # for every row: does it stay inside?

    def rows(self, where: Tensor) -> Grid:
        return Grid((len(where), len(self.start)), 0, [((where - self.at) * self.step).unsqueeze(1), self.start[None]])


def _law(rows: Tensor, settled: Tensor, n: int, reference: Reference) -> _Law | None:
    """The law that the settled rows follow, or None."""
    at = int(settled[0])
    start = rows[0]
    held = reference.shape_of(int(start[0]))
    if held is None:
        return None
    first, shape = held
    if len(settled) > 1:
        gap = rows[1:] - start
        steps = gap // (settled[1:] - at).unsqueeze(1)
        step = int(steps[0, 0])
        if step == 0 and not bool(gap.any()):  # one row for all
            return _Law(at, start, 0, torch.ones(n, dtype=torch.bool))
        if step <= 0 or not bool((gap == (settled[1:] - at).unsqueeze(1) * step).all()):
            return None
    else:
        step = math.prod(shape[1:])
    local = start - first
    if int(local.min()) < 0 or int(local.max()) >= math.prod(shape):
        return None
    length = next((shape[a] for a in range(len(shape)) if math.prod(shape[a + 1 :]) == step and shape[a] > 1), None)
    if length is None:
        return None
    place = (local // step) % length
    if not bool((place == place[0]).all()):
        return None
    there = int(place[0]) + torch.arange(n) - at
    return _Law(at, start, step, (there >= 0) & (there < length))
