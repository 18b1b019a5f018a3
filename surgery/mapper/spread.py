"""Scales that were folded away: the reference's sums with every scale by weights spread over what it scales.

A reference computes `(x @ w + b) * s`; a program made for deployment computes `x @ w' + b'`. Spread out, the first is
`x @ (w * s) + b * s`: the same kind of sum, whose weights are products of weights (see factors.py), and the two can be
laid over each other. So a batch norm behind a convolution and a layer scale behind a linear map are one case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery.mapper.affine import Affine, NotAffine
from surgery.mapper.align import function
from surgery.mapper.grid import Grid
from surgery.mapper.record import Node
from surgery.mapper.reference import Reference
from surgery.mapper.rows import match_sites
from surgery.mapper.terms import Site, Term, Virtual
from surgery.mapper.unify import Match, live, present_rows, unify

if TYPE_CHECKING:
    from surgery.mapper.hypothesis import Hypothesis

MOVED = ("layout", "sum")


class Spread(Affine):
    """Reads the reference's tape with scales spread out. The numbers are the reference's."""

    STOPS = frozenset({"barrier"})

    def __init__(self, reference: Reference) -> None:
        self.reference = reference
        self.tape, self.cut = reference.tape, True
        self.memo, self.ends, self.bare = {}, {}, {}
        self.made: dict[tuple[object, ...], Grid] = {}  # numbers of products and negatives of weights
        self.fed: dict[int, bool] = {}
        self.folding = [i for i in reference.scales if self._scales_product(self.tape.nodes[i])]

    def known(self, vid: int) -> Tensor | None:
        return self.reference.known(vid)

    def grid(self, vid: int) -> Grid | None:
        return self.reference.grid(vid)

    def virtual_of(self, vid: int, how: str = "") -> Virtual:
        return self.reference.virtual_of(vid, how)

    # -- where --------------------------------------------------------------------------------------------------------
    def _scales_product(self, node: Node) -> bool:
        return any(self._fed(v) for v in node.inputs if not self.weight_only(v))

    def _fed(self, vid: int) -> bool:
        """Is there a product with weights in this sum?"""
        if vid not in self.fed:
            v = self.tape.values[vid]
            kind = self.kind(self.tape.nodes[v.node]) if v.origin == "node" and v.data else ""
            self.fed[vid] = kind == "product" or (
                kind in (*MOVED, "scale") and any(self._fed(i) for i in self.tape.nodes[v.node].inputs)
            )
        return self.fed[vid]

    @cached_property
    def _scaled(self) -> list[tuple[int, list[Site], list[int]]]:
        """Products that are scaled: (node, what it multiplies, what follows from the scales)."""
        folding = {o for i in self.folding for o in self.tape.nodes[i].outs if o >= 0}
        out = []
        for i in self.reference.products if folding else ():
            node = self.tape.nodes[i]
            scaled = [y for y in self._follows([node.outs[0]]) if y in folding]
            if scaled:
                try:
                    sites = {id(t.site): t.site for t in self.reference.terms(node.outs[0]) if t.site is not None}
                except NotAffine:
                    continue
                out.append((i, list(sites.values()), self._follows(scaled)))
        return out

    def _follows(self, vids: list[int]) -> list[int]:
        return self.reference.closure(vids, through=(*MOVED, "scale"))

    def meeting(self, terms: list[Term]) -> list[tuple[int, list[int]]]:
        """Where in the reference the rows of this sum's product are multiplied, and scaled: (node, what follows)."""
        lead = next((t for t in terms if live(t)), None)
        if lead is None or lead.site is None or not self.folding:
            return []
        site, rows = lead.site, present_rows(lead)
        return [(i, ys) for i, sites, ys in self._scaled if any(match_sites(site, s, rows) is not None for s in sites)]

    def likely(self, h: Hypothesis, vid: int) -> bool:
        """Is it a product and a bias, which the reference has too, and scales afterwards?"""
        terms = h.terms(vid)
        return any(t.kind == "weight" for t in terms) and bool(self.meeting(terms))

    def matches(self, h: Hypothesis, vid: int) -> Iterator[tuple[Match, int]]:
        """The ways to make a value of the target equal to a sum that is spread out, and the node that led to it."""
        try:
            terms = h.terms(vid)
        except NotAffine:
            return
        for node, values in self.meeting(terms):
            for y in values:
                try:
                    theirs = self.whole(y)
                except NotAffine:
                    continue
                for m in unify(terms, h.tape.values[vid].shape, theirs, self.tape.values[y].shape, exact=True):
                    yield m, node

    # -- sums ---------------------------------------------------------------------------------------------------------
    def whole(self, vid: int) -> list[Term]:
        """The sum that a value is, scales spread out, with a weight that is taken away as its negative added."""
        out = []
        for t in self.terms(vid):
            if t.kind == "weight" and t.coef < 0 and t.ids is not None:
                t = Term("weight", -t.coef, ids=self._negative(t.ids))
            out.append(t)
        return out

    def _scale(self, node: Node, shape: tuple[int, ...]) -> list[Term]:
        a, b = node.args[0].vid, node.args[1].vid
        x, w = (a, b) if self.weight_only(b) else (b, a)
        factors = self.terms(w, root=False)
        if node.op is not torch.ops.aten.mul.Tensor or len(factors) != 1 or factors[0].ids is None:
            return super()._scale(node, shape)
        ids, coef = factors[0].ids.expand(shape), factors[0].coef
        out = []
        for t in self.terms(x, root=False):
            t = t.mapped(lambda z: z.expand(shape)).scaled(coef)
            if t.kind == "known":
                t = Term("scale", t.coef, value=t.value, ids=ids, vid=t.vid)
            elif t.kind == "product":
                t = self._scaled_product(t, ids)
            else:
                assert t.ids is not None
                t.ids = self._times(t.ids, ids)
            out.append(t)
        return out

    def _scaled_product(self, t: Term, ids: Tensor) -> Term:
        """A product whose columns are scaled, as a product with scaled weights."""
        site, row, col = t.site, t.row, t.col
        assert site is not None
        assert row is not None
        assert col is not None
        here = row > 0
        found = function(col[here].to(torch.int64), ids[here].to(torch.int64))
        if found is None or not len(found[1]) or not bool((found[1] > 0).all()):
            raise NotAffine  # not one weight a column
        if site.conv and site.geometry[3]:
            raise NotAffine  # the channels of a transposed convolution lie along another axis of its kernel
        axis = 0 if site.conv else 1
        by = torch.full((site.w.shape[axis],), int(found[1][0]), dtype=torch.int64)
        by[found[0] - 1] = found[1]
        key = ("columns", site.node, site.w.key(), by.numpy().tobytes())
        if key not in self.made:
            along = Grid.of(by.reshape([-1 if k == axis else 1 for k in range(site.w.ndim)]))
            self.made[key] = self._as_stored([site.w, along])
        scaled = Site(site.node, site.x, site.x_vid, self.made[key], site.geometry, site.pieces)
        return Term("product", t.coef, site=scaled, row=row, col=col)

    def _as_stored(self, factors: list[Grid]) -> Grid:
        """The numbers of a product; those of a matrix run as its elements are stored, so that a plan reads well."""
        steps = factors[0].strides
        if steps is not None and len(steps) == 2 and steps[0] < steps[1]:
            return self.reference.multiply([f.permute((1, 0)) for f in factors]).permute((1, 0))
        return self.reference.multiply(factors)

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        """Numbers of the products of two weights, element by element; 0 where there is none."""
        both = torch.stack([a.reshape(-1), b.reshape(-1)])
        both = torch.where((both > 0).all(0), both, 0.0)
        return self._numbered(both, lambda n: self.reference.multiply([Grid.of(x) for x in n]).flat()).reshape(a.shape)

    def _negative(self, ids: Tensor) -> Tensor:
        """Numbers of the negatives of weights; 0 where there is none."""
        found = self._numbered(ids.reshape(1, -1), lambda n: self.reference.derive("neg", {}, n[0]))
        return found.reshape(ids.shape)

    def _numbered(self, columns: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        """Numbers for what `make` gives for each distinct column; 0 for a column of zeros."""
        some, inverse = torch.unique(columns.to(torch.int64), dim=1, return_inverse=True)
        key = ("elements", some.shape, some.numpy().tobytes())
        if key not in self.made:
            none = int((some[0] == 0).sum())  # that column comes first
            numbers = make(some[:, none:]) if none < some.shape[1] else torch.zeros(0, dtype=torch.int64)
            self.made[key] = Grid.of(torch.cat([torch.zeros(none, dtype=torch.int64), numbers]))
        return self.made[key].dense()[inverse].to(torch.float64)
