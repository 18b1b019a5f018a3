"""Where and how a sum of the target meets sums of the reference: the ways to settle one value.

Where: at values of the reference that follow from the same rows, the same scaled or known value, or weights alone. How:
as one sum over another (unify.py), as they are or in another spelling: products of concatenations in parts,
convolutions by the places of their kernels, scaled values for a stack, rows looked up here and there. What fits is
ranked by what names say and by what earlier blocks did.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery.mapper import coefficients
from surgery.mapper.affine import Affine, NotAffine
from surgery.mapper.hypothesis import Hypothesis
from surgery.mapper.kinds import base
from surgery.mapper.merged import Merged
from surgery.mapper.parts import Part, cut_up
from surgery.mapper.record import Node, Ref, fingerprint
from surgery.mapper.reference import Reference
from surgery.mapper.repeat import pattern
from surgery.mapper.repeated import Repeated
from surgery.mapper.rows import match_rows, match_sites
from surgery.mapper.spread import Spread
from surgery.mapper.taps import products, rows_told, taps, taps_for
from surgery.mapper.terms import Site, Term, apart
from surgery.mapper.unify import Assignment, Match, live, present_rows, unify
from surgery.mapper.weighed import Weighed, weighed, weighed_or_not

WIDTH = 24  # ways to settle one value that are kept, and hypotheses that walk in step

Prior = Callable[[str, str], float]
Found = tuple[Match, float, int]  # a way to settle a value, its score, the node of the reference that led to it
Cut = Callable[[list[Term]], list[Term]]


def _as_it_is(terms: list[Term]) -> list[Term]:
    return terms


def _apart_or_not(terms: list[Term]) -> list[Term]:
    return apart(terms) or list(terms)


class Meeting:
    """The reference's sums, for those of a target to be laid over."""

    def __init__(self, reference: Reference, prior: Prior) -> None:
        self.reference = reference
        self.prior = prior
        self.spread = Spread(reference)
        self.repeated = Repeated(reference)
        self.weighed = Weighed(reference)
        self.merged = Merged(reference)

    def unified(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...], vid: int) -> list[Found]:
        """The ways to settle a value: as a multiple of one of the reference's, for a constant may follow; where none
        can follow, or nothing is a multiple, as one of the reference's with the constants in the weights."""
        found = self._multiples(h, terms, shape)
        node = h.tape.nodes[h.at] if h.at < len(h.tape.nodes) else None
        if node is not None and coefficients.bilinear(h, node):
            found = self._folded(h, node, found)
        elif found and (node is None or any(m.gain != 1.0 for m, _, _ in found)):
            exact = self._unified_as(h, terms, shape, _as_it_is, exact=True)
            found = found + [(m, score - 2.0, at) for m, score, at in exact if scaled(m)]
        found = found or self._unified_as(h, terms, shape, _as_it_is, exact=True)
        if all(m.inner or m.missing for m, _, _ in found):  # an addend of a larger sum at best: the sum in one
            merged = self._unified_as(h, terms, shape, self.merged.cut, exact=True)
            found = [f for f in merged if not f[0].inner and not f[0].missing] + found
        return found or self._without_gain(h, terms, shape)

    def _without_gain(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...]) -> list[Found]:
        """A scaled value that the reference uses as it is (a norm without gain): the scale is one."""
        scales = [t for t in terms if t.kind == "scale"]
        if len(scales) != 1 or any(live(t) for t in terms):
            return []
        (scale,) = scales
        if scale.value is None or scale.ids is None or not bool((scale.ids > 0).all()):
            return []
        ids, ref = torch.unique(scale.ids.to(torch.int64)), self.reference
        bare = [replace(t, kind="known", ids=None) if t is scale else t for t in terms]
        ends = [y for y in ref.closure(ref.index.find(fingerprint(scale.value))) if ref.used_bare(y)]
        found: dict[tuple[Any, ...], Found] = {}
        for y in ends:
            for m in unify(bare, shape, ref.terms(y), ref.tape.values[y].shape, exact=True):
                if not m.missing:
                    m.assignments.append(Assignment.of(ids, ref.ones(len(ids), int(ids[0]))))
                    m.like, m.penalty = y, m.penalty + 1.0
                    found.setdefault(_key(m), (m, self._score(h, m) - m.penalty, ref.tape.values[y].node))
        return list(found.values())[:WIDTH]

    def spread_over(self, h: Hypothesis, vid: int) -> list[Found]:
        """Matches with sums of the reference whose scales are spread over what they scale."""
        found: dict[tuple[Any, ...], Found] = {}
        for m, node in self.spread.matches(h, vid):
            self._scale(m)
            found.setdefault(_key(m), (m, self._score(h, m) - m.penalty, node))
        return sorted(found.values(), key=lambda f: (f[0].missing, f[0].zeros, -f[1]))[:WIDTH]

    def _folded(self, h: Hypothesis, node: Node, found: list[Found]) -> list[Found]:
        """Factors of a product of two values: where the reference multiplies by a constant around that product and the
        target does not, the weights of the factor that is settled first take it."""
        if h.at in h.folds or base(node.op) not in ("mm", "bmm"):
            return found
        out = []
        for m, score, at in found:
            alike = self.reference.closure([m.like]) if m.like >= 0 else []
            factors = coefficients.missing(h, node, self.reference, alike)
            for f in factors:
                told = [Assignment(a.target, [self.reference.times(s, f) for s in a.sources]) for a in m.assignments]
                out.append((replace(m, assignments=told, folds=h.at), score, at))
            if not factors:
                out.append((m, score, at))
        return out

    def _multiples(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...]) -> list[Found]:
        whole = self._unified_as(h, terms, shape, _as_it_is)
        if not all(m.missing or m.inner for m, _, _ in whole):
            return whole
        if not whole and any(t.kind == "known" for t in terms):
            whole = self._unified_as(h, terms, shape, self.reference.computed)
        # a product of a concatenation against products of its parts, or against a product of one of them alone
        for mine, theirs in ((apart(terms), _apart_or_not), (terms, _apart_or_not), (apart(terms), _as_it_is)):
            if mine and (found := self._unified_as(h, mine, shape, theirs)):
                keys = {_key(m) for m, _, _ in found}
                return found + [w for w in whole if w[0].inner and not w[0].missing and _key(w[0]) not in keys]
        if not whole and (found := self._by_taps(h, terms, shape)):
            return found
        # a product of a stack against scaled values that are added, and the other way round
        for mine, theirs in ((weighed(terms), _as_it_is), (terms, weighed_or_not)):
            if not whole and mine and any(t.kind == "scale" for t in mine):
                whole = self._unified_as(h, mine, shape, theirs)
        return whole or self._looked_up(h, terms, shape) or self._repeated(h, terms, shape)

    def _repeated(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...]) -> list[Found]:
        """What is made of weights alone, by one program once and by the other for all of a batch."""
        found: dict[tuple[Any, ...], Found] = {}
        for m in self.repeated.matches(terms, shape):
            found.setdefault(_key(m), (m, self._score(h, m) - m.penalty, -1))
        return list(found.values())[:WIDTH]

    def _by_taps(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...]) -> list[Found]:
        """A convolution against a sum of products over shifted inputs, one a place of its kernel."""
        count = products(terms)
        found = self._unified_as(h, rows_told(terms), shape, taps_for(count)) if count > 1 else []
        mine = taps(terms) if not found else None
        return found or (self._unified_as(h, rows_told(mine), shape, rows_told) if mine else [])

    def _looked_up(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...]) -> list[tuple[Match, float, int]]:
        """Rows of a table that the reference looks up here and there, not at once."""
        found = []
        for t in self.reference.lookups if any(t.place is not None for t in terms) else []:
            assert t.ids is not None
            found += unify(terms, shape, [t], (len(t.ids),))
        return [(m, self._score(h, m) - m.penalty, -1) for m in found]

    def _unified_as(
        self,
        h: Hypothesis,
        terms: list[Term],
        shape: tuple[int, ...],
        cut: Cut,
        *,
        exact: bool = False,
    ) -> list[Found]:
        ref = self.reference
        ends = set(ref.tape.outputs())
        found: list[Found] = []
        seen: set[tuple[Any, ...]] = set()
        n = math.prod(shape)
        for start, values in self._meeting(h, terms, cut, exact):
            for group in self._nearest(values, shape, exact):
                best: list[Found] = []
                for y, part in group:
                    try:
                        theirs = cut(ref.terms(y))
                    except NotAffine:
                        continue
                    size_r = ref.tape.values[y].shape
                    if part is not None:
                        theirs, size_r = part.of(theirs), part.shape(size_r)
                    size = math.prod(size_r)
                    for m in unify(terms, shape, theirs, size_r, exact=exact, made_of=(h.made_of, ref.made_of)):
                        m.like = y
                        self._scale(m)
                        key = _key(m)
                        if key not in seen:
                            seen.add(key)
                            m.inner = part is None and not (ref.is_end(y) or y in ends)
                            best.append((m, self._score(h, m) - m.penalty - (0.0 if size == n else 0.5), start))
                found += best
                if any(b[0].missing == 0 and not (b[0].inner and b[0].zeros) for b in best):
                    break  # an addend of a larger sum that leaves weights over: they may belong to that sum
        if any(f[0].missing == 0 for f in found):
            found = [f for f in found if f[0].missing == 0] + [f for f in found if f[0].missing]
        found.sort(key=lambda f: (f[0].missing, -f[1]))
        return found[:WIDTH]

    def _nearest(self, values: list[int], shape: tuple[int, ...], exact: bool) -> list[list[tuple[int, Part | None]]]:
        """Values of the reference (or parts of one that is cut up later) in the order in which to try them: ends of
        the same size, others of it, larger.

        Of values that are one value moved or scaled, one is enough: that in the target's shape, else one with its axes
        in another order (their elements need not be told apart by value), else the last. `exact`: a value that was
        scaled is another.
        """

        def unlike(y: int) -> int:
            theirs = values_of[y].shape
            return 0 if theirs == shape else 1 if sorted(theirs) == sorted(shape) else 2

        ref, n = self.reference, math.prod(shape)
        values_of = ref.tape.values
        size = {y: math.prod(values_of[y].shape) for y in values}
        root: dict[int, int] = {}
        for y in sorted(values):
            node = ref.tape.nodes[values_of[y].node] if values_of[y].node >= 0 else None
            moved = node is not None and len(node.outs) == 1 and ref.kind(node) in ("layout", "sum")
            data = [i for i in node.inputs if values_of[i].data] if node is not None and moved else []
            alone = (
                len(data) == 1 and not any(values_of[i].weights and not values_of[i].data for i in node.inputs)
                if node
                else False
            )
            plain = node is not None and not any(isinstance(a, Ref) for a in node.args[1:])
            plain = plain and not (exact and node is not None and coefficients.of(node) is not None)
            root[y] = root.get(data[0], y) if alone and plain and size.get(data[0]) == size[y] else y
        chosen: dict[int, int] = {}
        for y in sorted(values):
            kept = chosen.get(root[y])
            if kept is None or (unlike(kept) and unlike(y) <= unlike(kept)):
                chosen[root[y]] = y
        ends = {root[y] for y in values if ref.is_end(y)}
        equal = [y for r, y in chosen.items() if size[y] == n]
        first = [y for y in equal if root[y] in ends]
        larger = [y for y in chosen.values() if size[y] > n]
        smaller = [y for y in chosen.values() if size[y] < n]
        groups: list[list[tuple[int, Part | None]]] = [
            [(y, None) for y in group] for group in (first, [y for y in equal if y not in first], larger, smaller)
        ]
        for y in larger:
            whole = values_of[y].shape
            groups[0] += [(y, part) for part in cut_up(ref, y) if math.prod(part.shape(whole)) == n]
        return [g for g in groups if g]

    def _meeting(self, h: Hypothesis, terms: list[Term], cut: Cut, exact: bool) -> Iterator[tuple[int, list[int]]]:
        """Where in the reference to look: (a node, the values that follow from it)."""
        ref = self.reference
        out: list[tuple[int, list[int]]] = []
        products = [t for t in terms if live(t)]
        if products:
            lead = products[0]
            assert lead.site is not None
            rows = present_rows(lead)
            whole = not exact and cut(terms) is terms  # inputs as they are: no multiples of them, no parts
            nodes = ref.sharing(lead.site, rows) if whole else ref.products
            yield from self._read_alike(lead.site, rows, nodes, cut, exact)
            return
        scales = [t for t in terms if t.kind == "scale"]
        if scales and cut is weighed_or_not:
            yield from self.weighed.meeting(scales[0])
            return
        if scales:
            twins = set()
            for value in (h.known(scales[0].vid) if scales[0].vid >= 0 else None, scales[0].value):
                if value is not None:
                    twins.update(ref.index.find(fingerprint(value)))
            for i in ref.scales:
                node = ref.tape.nodes[i]
                if any(v in twins for v in node.inputs):
                    out.append((i, ref.closure([node.outs[0]])))
            if not out and scales[0].value is not None:
                out = [(i, ref.closure([ref.tape.nodes[i].outs[0]])) for i in self._same_rows(scales[0].value)]
            yield from out
            return
        total: Tensor | None = None
        for t in terms:
            if t.kind == "known" and t.value is not None:
                total = t.coef * t.value if total is None else total + t.coef * t.value
        if total is not None and bool((total != 0).any()):
            known = [total] + [t.value for t in terms if t.kind == "known" and t.value is not None]
            for value in known:
                for y in ref.index.find(fingerprint(value)):
                    out.append((ref.tape.values[y].node, ref.closure([y])))
                if out:
                    break
            yield from out
            return
        yield from ((ref.tape.values[y].node, [y]) for y in ref.pure)

    def _read_alike(
        self, site: Site, rows: Tensor, nodes: list[int], cut: Cut, exact: bool
    ) -> Iterator[tuple[int, list[int]]]:
        """Those of these products that read rows of the site's."""
        ref = self.reference
        for i in nodes:
            out = ref.tape.nodes[i].outs[0]
            try:
                sites = {id(t.site): t.site for t in cut(ref.terms(out)) if t.kind == "product" and t.site}
            except NotAffine:
                continue
            if any(match_sites(site, s, rows, scaled=exact) is not None for s in sites.values()):
                yield i, ref.closure([out])

    def _same_rows(self, value: Tensor) -> list[int]:
        """Scalings in the reference whose known factor holds these rows, and more."""
        k = value.shape[-1] if value.ndim else 0
        out = []
        for i in self.reference.scales:
            for v in self.reference.tape.nodes[i].inputs:
                other = self.reference.known(v) if self.reference.tape.values[v].data else None
                if other is None or not other.ndim or other.shape[-1] != k or other.numel() <= value.numel() or k < 2:
                    continue
                rows = torch.arange(value.numel() // k)
                if match_rows(value.reshape(-1, k), rows, other.reshape(-1, k)) is not None:
                    out.append(i)
        return out

    def _score(self, h: Hypothesis, m: Match) -> float:
        score = 0.0
        for t, s in self.names(h, m):
            score += self.prior(t, s)
        score += sum(8.0 for t, s in self.places(h, m) if s in h.template.get(t, ()))
        if any(map(h.has_place, firsts(m))):
            score -= 12.0
        return score

    def names(self, h: Hypothesis, m: Match) -> list[tuple[str, str]]:
        pairs = []
        for a in m.assignments:
            if a.sources and a.target.numel():
                t = h.owner(a.target.first)[1]
                s = self.reference.owner(self.reference.told_by(a.sources[0].first))[1]
                if t and s:
                    pairs.append((t, s))
        return pairs

    def places(self, h: Hypothesis, m: Match) -> list[tuple[str, str]]:
        """What a match says of its block: where in a tensor of this name, from where in one of that name."""
        out = []
        for a in m.assignments:
            if a.sources and a.target.numel():
                t, s = _place(h, a.target.first), _place(self.reference, self.reference.told_by(a.sources[0].first))
                if t and s:
                    out.append((t, s))
        return out

    def _scale(self, m: Match) -> None:
        """Give the constants that a match found to the numbers of its sources."""
        self.merged.told(m)
        for a in m.assignments:
            if a.factors:
                a.sources = [self.reference.times(s, f) for s, f in zip(a.sources, a.factors, strict=True)]


def scaled(m: Match) -> bool:
    return any(not math.isclose(f, 1.0, rel_tol=1e-12) for a in m.assignments for f in a.factors)


def firsts(m: Match) -> list[int]:
    return [a.sources[0].first for a in m.assignments if a.sources and a.target.numel()]


def _place(p: Affine, number: int) -> str:
    found = p.holder(number)
    return f"{pattern(found[2])} {(number - found[0]) / found[1]:.6f}" if found is not None else ""


def _key(m: Match) -> tuple[Any, ...]:
    """Two matches that settle the same elements in the same way are one."""
    parts = [(a.target.key(), *(s.key() for s in a.sources)) for a in m.assignments if a.target.numel()]
    return tuple(sorted(parts, key=repr))
