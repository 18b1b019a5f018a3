"""Values that hold one line over and over: what is made of weights alone is the same for all of a batch.

A learned query is projected once by one program and, after it was repeated, once an item by another. Cut down to the
lines that differ, the two are one value, and their sums can be laid over each other.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.mapper.affine import NotAffine
from surgery.mapper.record import Fingerprint, FingerprintIndex, fingerprint
from surgery.mapper.terms import Term
from surgery.mapper.unify import Match, unify

if TYPE_CHECKING:
    from surgery.mapper.reference import Reference


def once(terms: list[Term], shape: tuple[int, ...]) -> tuple[list[Term], tuple[int, ...]]:
    """A sum of weights and known values (of their shape) without what is there again along an axis, be it line after
    line or all lines over and over: a batch may have been joined with the heads."""
    for axis in range(len(shape)):
        found = _period([getattr(t, name) for t in terms for name in t.tensors()], axis)
        if found is not None:
            apart, again = found
            terms = [t.mapped(lambda x, a=axis, p=apart, r=again: _first(x, a, p, r)) for t in terms]  # type: ignore[misc]
            shape = tuple(n if a != axis else apart[1 - again] for a, n in enumerate(shape))
    return terms, shape


def _period(tensors: list[Tensor], axis: int) -> tuple[tuple[int, int], int] | None:
    """(how an axis comes apart into two, the one of them along which all lines are alike); the fewest lines left."""
    n = tensors[0].shape[axis] if tensors else 1
    for p in range(1, n):
        if n % p == 0:
            for apart, again in (((n // p, p), 0), ((p, n // p), 1)):
                if all(_alike(t.unflatten(axis, apart), axis + again) for t in tensors):
                    return apart, again
    return None


def _alike(x: Tensor, axis: int) -> bool:
    return bool((x == x.narrow(axis, 0, 1)).all())


def _first(x: Tensor, axis: int, apart: tuple[int, int], again: int) -> Tensor:
    return x.unflatten(axis, apart).select(axis + again, 0)


class Repeated:
    """The reference's values that are made of weights alone by more than moving them, each line once."""

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self._index: FingerprintIndex | None = None

    def index(self) -> FingerprintIndex:
        if self._index is None:
            ref = self.reference
            computed = [vid for vid, v in enumerate(ref.tape.values) if v.origin == "node" and v.fingerprint]
            computed = [vid for vid in computed if ref.weight_only(vid) and self._made(vid)]
            self._index = FingerprintIndex((vid, _print(ref.known(vid))) for vid in computed)
        return self._index

    def _made(self, vid: int) -> bool:
        """Is it what an operator makes of weights, and not weights moved?"""
        return self.reference.kind(self.reference.tape.nodes[self.reference.tape.values[vid].node]) == "virtual"

    def matches(self, terms: list[Term], shape: tuple[int, ...]) -> list[Match]:
        """The ways to make a sum of weights and known values equal to such a value, line for line; those that need no
        constant come first."""
        known = [t for t in terms if t.kind == "known" and t.value is not None]
        if not known or any(t.kind not in ("known", "weight") for t in terms):
            return []
        terms, shape = once([t.mapped(partial(torch.broadcast_to, size=shape)) for t in terms], shape)
        ref, found = self.reference, []
        starts = {v for t in terms if t.kind == "known" for v in self.index().find(_print(t.value))}
        for y in ref.closure(sorted(starts)):
            if not ref.weight_only(y):
                continue
            size = ref.tape.values[y].shape
            try:
                theirs = ref.computed(ref.terms(y))
            except NotAffine:
                continue
            theirs, size = once([t.mapped(partial(torch.broadcast_to, size=size)) for t in theirs], size)
            for m in unify(terms, shape, theirs, size):
                m.like = y
                found.append(m)
        return sorted(found, key=lambda m: (m.missing, not math.isclose(m.gain, 1.0, rel_tol=1e-12), m.penalty))


def _print(x: Tensor | None) -> Fingerprint | None:
    if x is None or not x.is_floating_point():
        return None
    (term,), _ = once([Term("known", 1.0, value=x)], tuple(x.shape))
    return fingerprint(term.value) if term.value is not None else None
