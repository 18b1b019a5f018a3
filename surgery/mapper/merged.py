"""Products of one input that are added up, as the one product that they are: branches merged for deployment.

`x @ a + x @ b` is `x @ (a + b)`, and convolutions of one input that stand on one grid are one whose kernel is their
sum, each padded to the largest. The sum of several weights has no number of its own; a merged product is laid over the
target's with numbers that stand for sums, and what comes out is told in the weights that are added.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from surgery.mapper.grid import Grid
from surgery.mapper.reference import Reference
from surgery.mapper.terms import Site, Term
from surgery.mapper.unify import Assignment, Match


@dataclass
class Sum:
    """Sums of source elements, numbered like source elements. An addend's number is 0 where it has none."""

    offset: int
    addends: list[Tensor]  # all of one shape
    factors: list[float]

    def holds(self, g: Grid) -> bool:
        return self.offset <= g.lo and g.hi < self.offset + self.addends[0].numel()


class Merged:
    """The merged products of a reference."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.sums: dict[tuple[object, ...], Sum] = {}

    def cut(self, terms: list[Term]) -> list[Term]:
        """The same sum with products of one input as one, as far as they can be merged."""
        groups: list[list[Term]] = []
        for t in terms:
            home = next((g for g in groups if _together(g[0], t)), None)
            if home is None:
                groups.append([t])
            else:
                home.append(t)
        return [t for g in groups for t in self._merge(g)]

    def _merge(self, group: list[Term]) -> list[Term]:
        group = sorted(group, key=lambda t: -t.site.w.numel() if t.site is not None else 0)
        lead = group[0]
        if len(group) < 2 or lead.site is None:
            return group
        placed = [_placed(t.site, lead.site) for t in group if t.site is not None]
        numbers = [p for p in placed if p is not None]
        if len(numbers) != len(group):
            return group
        factors = [t.coef / lead.coef for t in group]
        key = (*factors, *((t.site.node, t.site.w.key()) for t in group if t.site is not None))
        if key not in self.sums:
            self.sums[key] = Sum(self.reference.next, numbers, factors)
            self.reference.next += numbers[0].numel()
        site = replace(lead.site, w=Grid.whole(self.sums[key].offset, lead.site.w.shape), keys=None, _linear=None)
        return [replace(lead, site=site)]

    def told(self, m: Match) -> None:
        """Say a match in the weights that are added, element by element."""
        if self.sums:
            m.assignments = [b for a in m.assignments for b in self._told(a)]

    def _told(self, a: Assignment) -> list[Assignment]:
        made = next((s for s in self.sums.values() if a.sources and s.holds(a.sources[0])), None)
        if made is None or len(a.sources) != 1:
            return [a]
        by = a.factors[0] if a.factors else 1.0
        target, at = a.target.flat(), a.sources[0].flat() - made.offset
        addends = [x.reshape(-1)[at] for x in made.addends]
        code = torch.zeros(len(at), dtype=torch.int64)
        for k, x in enumerate(addends):
            code |= (x > 0).to(torch.int64) << k
        out = []
        for pattern in torch.unique(code).tolist():
            here = code == pattern
            mine = [k for k in range(len(addends)) if pattern >> k & 1]
            out.append(Assignment.of(target[here], *(addends[k][here] for k in mine)))
            out[-1].factors = [by * made.factors[k] for k in mine]
        return out


def _together(a: Term, b: Term) -> bool:
    """Two products of one input, row by row and column by column in the same elements."""
    s, t = a.site, b.site
    if s is None or t is None or s.conv != t.conv or s.transposed or t.transposed:
        return False
    if a.row is None or b.row is None or a.col is None or b.col is None or a.row.shape != b.row.shape:
        return False
    if s.x is not t.x and not (s.x.shape == t.x.shape and torch.equal(s.x, t.x)):
        return False
    same = s.geometry[:1] == t.geometry[:1] and s.geometry[2:] == t.geometry[2:]
    return same and torch.equal(a.row, b.row) and torch.equal(a.col, b.col)


def _placed(s: Site, largest: Site) -> Tensor | None:
    """The numbers of a matrix, or of a kernel where it lies within the largest; None where it does not."""
    numbers = s.w.dense()
    if not s.conv:
        return numbers if s.w.shape == largest.w.shape else None
    if s.w.shape[:2] != largest.w.shape[:2] or s.w.holes:
        return None
    out = torch.zeros(largest.w.shape, dtype=torch.int64)
    where = out
    for a, n in enumerate(s.w.shape[2:]):
        (mine, theirs, step) = (g[a if len(g) > 1 else 0] for g in (s.geometry[1], largest.geometry[1], s.geometry[2]))
        start, rest = divmod(theirs - mine, step)
        if rest or start < 0 or start + n > largest.w.shape[2 + a]:
            return None
        where = where.narrow(2 + a, start, n)
    where.copy_(numbers)
    return out
