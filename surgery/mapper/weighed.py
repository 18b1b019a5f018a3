"""Weighted sums of values: a stack times a vector of weights, or the values scaled one after the other and added.

A product whose rows are a stack, one part a column, is a sum of scaled values: taken apart so, it can be laid over a
program that adds them up (the layers of an encoder, mixed by learned weights).
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import torch

from surgery.mapper.affine import NotAffine
from surgery.mapper.record import Fingerprint, fingerprint, same
from surgery.mapper.terms import Term

if TYPE_CHECKING:
    from surgery.mapper.reference import Reference


def weighed(terms: list[Term]) -> list[Term] | None:
    """The same sum with every product of a stack as a sum of scaled values; None where there is no such product."""
    out: list[Term] = []
    for t in terms:
        parts = t.site.pieces if t.site is not None else None
        if t.site is None or not parts or len(parts) < 2 or any(len(g) != 1 for g in parts):
            out.append(t)
            continue
        assert t.row is not None
        assert t.col is not None
        here = t.row > 0
        row, col = ((x.to(torch.int64) - 1).clamp_min(0) for x in (t.row, t.col))
        for g in parts:
            value = torch.where(here, t.site.x[:, int(g)][row], 0.0)
            ids = torch.where(here, t.site.w.take(0, g).dense()[0][col], 0).to(torch.float64)
            out.append(Term("scale", t.coef, value=value, ids=ids))
    return out if len(out) > len(terms) else None


def weighed_or_not(terms: list[Term]) -> list[Term]:
    return weighed(terms) or list(terms)


class Weighed:
    """The reference's products of stacks, by the values that they weigh."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference

    @cached_property
    def _found(self) -> list[tuple[int, list[Fingerprint]]]:
        out = []
        for i in self.reference.products:
            try:
                terms = weighed(self.reference.terms(self.reference.tape.nodes[i].outs[0]))
            except NotAffine:
                continue
            prints = [fingerprint(t.value) for t in terms or () if t.kind == "scale" and t.value is not None]
            if prints:
                out.append((i, [f for f in prints if f is not None]))
        return out

    def meeting(self, scale: Term) -> list[tuple[int, list[int]]]:
        """Where in the reference a value is weighed among others: (node, what follows)."""
        f = fingerprint(scale.value) if scale.value is not None else None
        if f is None:
            return []
        ref = self.reference
        nodes = [i for i, prints in self._found if any(same(f, p) for p in prints)]
        return [(i, ref.closure([ref.tape.nodes[i].outs[0]])) for i in nodes]
