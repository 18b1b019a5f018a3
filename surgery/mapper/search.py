"""Fill a program with holes: walk the target's tape, and bind each weight where it is needed, from the reference's run.

A hypothesis is a target program in which some weights are settled. Values that need no open weight are computed; a
value that does is left as a sum (affine.py) until something non-linear consumes it, and then it is unified (unify.py)
with values of the reference that read the same rows. More than one way: the hypothesis forks. Hypotheses walk in step,
and one whose values no longer occur in the reference, while another's do, is set aside; it is taken up again only if
all others fail.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from surgery import twin
from surgery.mapper import coefficients
from surgery.mapper.affine import Affine, NotAffine, base
from surgery.mapper.grid import Grid
from surgery.mapper.hypothesis import Choice, Hypothesis
from surgery.mapper.merged import Merged
from surgery.mapper.parts import Part, cut_up, seen_as
from surgery.mapper.record import SYNC, Node, Ref, Tape, fingerprint
from surgery.mapper.reference import Reference
from surgery.mapper.repeat import moved_on, pattern, recipe
from surgery.mapper.repeated import Repeated
from surgery.mapper.rows import match_rows, match_sites
from surgery.mapper.spread import Spread
from surgery.mapper.taps import products, rows_told, taps, taps_for
from surgery.mapper.terms import Site, Term, apart
from surgery.mapper.unify import Assignment, Match, function, live, present_rows, unify
from surgery.mapper.weighed import Weighed, weighed, weighed_or_not

WIDTH = 24  # hypotheses that walk in step
TRIES = 96  # hypotheses taken up again after all others failed
aten = torch.ops.aten


Prior = Callable[[str, str], float]
Found = tuple[Match, float, int]  # a way to settle a value, its score, the node of the reference that led to it
Cut = Callable[[list[Term]], list[Term]]


def _as_it_is(terms: list[Term]) -> list[Term]:
    return terms


def _apart_or_not(terms: list[Term]) -> list[Term]:
    return apart(terms) or list(terms)


class Search:
    """The walk over the target's tape."""

    def __init__(
        self,
        tape: Tape,
        reference: Reference,
        *,
        own: dict[str, Tensor],
        maybe_constant: set[str],
        prior: Prior,
        again: Callable[[dict[str, Tensor]], Tape] | None = None,
        accept: Callable[[Hypothesis], bool],
    ) -> None:
        self.reference = reference
        self.prior = prior
        self.again = again
        self.accept = accept
        self.spread = Spread(reference)
        self.repeated = Repeated(reference)
        self.weighed = Weighed(reference)
        self.merged = Merged(reference)
        self.start = Hypothesis(tape, reference, own, maybe_constant)
        self.reserve: list[tuple[int, Hypothesis]] = []
        self.forks = 0
        self.shelved = 0  # of the reserve, how many do not hold their activations

    def run(self) -> tuple[Hypothesis | None, Hypothesis]:
        """(the first accepted hypothesis or None, the one that went furthest)."""
        beam = [self.start]
        best: Hypothesis | None = None
        tries = 0
        with twin.math_only():
            while True:
                for h in self._walk(beam):
                    if self.accept(h):
                        return h, h
                    if best is None or (h.hits, -h.misses) > (best.hits, -best.misses):
                        best = h
                if not self.reserve or tries >= TRIES:
                    assert best is not None
                    return None, best
                tries += 1
                self.reserve.sort(key=lambda e: (e[0], e[1].at, e[1].score))
                beam = [self.reserve.pop()[1]]
                beam[0].restore()
                self.shelved = len(self.reserve)

    def _walk(self, beam: list[Hypothesis]) -> list[Hypothesis]:
        done: list[Hypothesis] = []
        at = min(h.at for h in beam)
        while beam:
            later = [h for h in beam if h.at > at]
            now: list[Hypothesis] = []
            for h in beam:
                if h.at == at:
                    if at >= len(h.tape.nodes):
                        done += self._finish(h)
                    else:
                        now += self._step(h)
            beam = self._prune(now) + later
            for _, h in self.reserve[self.shelved :]:
                if h not in beam:
                    h.shelve()
            self.shelved = len(self.reserve)
            at += 1
        return done

    def _finish(self, h: Hypothesis) -> list[Hypothesis]:
        hs = [h]
        for vid in h.tape.outputs():
            hs = [g for k in hs for g in self._settle(k, vid)]
        return hs

    def _step(self, h: Hypothesis) -> list[Hypothesis]:
        node = h.tape.nodes[h.at]
        if not any(h.tape.values[o].data for o in node.outs if o >= 0) and node.op != "sync" and node.op not in SYNC:
            out = self._weights_meet(h, node)
            for g in out:
                g.at += 1
            return out
        if any(v in h.tainted for v in node.inputs):
            h.taint(node)
            h.at += 1
            return [h]
        kind = h.kind(node)
        waiting = [v for v in node.inputs if not h.ready(v)]
        hs = [h]
        if waiting:
            if kind in ("layout", "sum"):  # left as a sum until something needs its value
                h.at += 1
                return [h]
            need = waiting
            if kind in ("product", "scale"):
                need = [v for v in waiting if not h.weight_only(v)]
            for v in need:
                hs = [g for k in hs for g in self._settle(k, v)]
        out = []
        for g in hs:
            if any(v in g.tainted for v in node.inputs):
                g.taint(node)
            elif all(g.ready(v) and g.known(v) is not None for v in node.inputs):
                if node.op == "sync" or node.op in SYNC:
                    g = self._check(g, node)
                if node.op != "sync":
                    g.compute(node)
                    node = g.tape.nodes[g.at]
                g.last = [g.look(o) for o in node.outs if o >= 0]
            g.release(node)
            g.at += 1
            out.append(g)
        return out

    def _weights_meet(self, h: Hypothesis, node: Node) -> list[Hypothesis]:
        """A product of weights with weights (a learned query): settled as the reference's of that shape are."""
        if h.kind(node) != "virtual" or base(node.op) not in ("mm", "bmm"):
            return [h]
        if all(h.known(a.vid) is not None for a in node.args[:2]):
            return [h]
        mine = _factors(h, node)
        ref = self.reference
        out = []
        for other in ref.tape.nodes:
            if ref.kind(other) != "virtual" or base(other.op) not in ("mm", "bmm"):
                continue
            a, b = _factors(ref, other)
            for theirs in ((a, b), (b.transpose(1, 2), a.transpose(1, 2))):  # a @ b is the transpose of b.T @ a.T
                if [x.shape for x in theirs] != [x.shape for x in mine]:
                    continue
                g = h.fork()
                pairs = [function(x.flat(), y.flat()) for x, y in zip(mine, theirs, strict=True)]
                if any(p is None for p in pairs):
                    continue
                if g.settle([Assignment.of(p[0], p[1]) for p in pairs if p is not None]):
                    g.known(node.outs[0])  # of tensors that are settled in part too
                    out += self._settle(g, self._chain_end(g, node.outs[0]))
        return [g for g in out if self._chain_end(g, node.outs[0]) not in g.tainted] or [h]

    def _chain_end(self, h: Hypothesis, vid: int) -> int:
        """What a value becomes while it is only moved and added to."""
        while len(h.tape.consumers[vid]) == 1:
            node = h.tape.nodes[h.tape.consumers[vid][0]]
            if (
                h.kind(node) not in ("layout", "sum", "virtual")
                or len(node.outs) != 1
                or not h.weight_only(node.outs[0])
            ):
                break
            vid = node.outs[0]
        return vid

    def _check(self, h: Hypothesis, node: Node) -> Hypothesis:
        """Python looked at a value while the target ran with other weights: where it saw another, run it again."""
        vid = node.inputs[0]
        now, saw = h.known(vid), node.kwargs.get("saw")
        assert now is not None
        if node.op is aten._local_scalar_dense.default:
            if saw == now.item():
                return h
        elif node.op == "sync":
            if saw is not None and saw.shape == now.shape and bool((saw == now).all()):
                return h
        else:
            expected = h.tape.values[node.outs[0]].shape
            got = h.run(node, {})
            if tuple(got.shape) == tuple(expected):
                return h
        if self.again is None:
            return h
        values = {}
        for name, b in h.bound.items():
            own = h.own[name]
            values[name] = b.partly(self.reference.fetch, own)
        tape = self.again(values)
        h.tape = tape
        for v, val in enumerate(tape.values):
            if val.origin in ("input", "const") and val.tensor is not None:
                h.env.setdefault(v, val.tensor)
        return h

    def _prune(self, beam: list[Hypothesis]) -> list[Hypothesis]:
        if len(beam) < 2:
            return beam
        good = [h for h in beam if any(x is True for x in h.last)]
        bad = [h for h in beam if h not in good and any(x is False for x in h.last)]
        if good and bad:
            self.reserve += [(0, h) for h in bad]
            beam = [h for h in beam if h not in bad]
        if len(beam) > WIDTH:
            beam.sort(key=lambda h: -(h.score + h.hits - h.misses))
            self.reserve += [(0, h) for h in beam[WIDTH:]]
            beam = beam[:WIDTH]
        for h in beam:
            h.last = []
        return beam

    # -- one value ----------------------------------------------------------------------------------------------------
    def _settle(self, h: Hypothesis, vid: int) -> list[Hypothesis]:
        """All hypotheses in which `vid` is known, or tainted where nothing in the reference fits: as a whole, or part
        by part where only its parts occur in the reference."""
        if h.known(vid) is not None or vid in h.tainted:
            return [h]
        names = h.open_names(vid)
        key = self._key_of(h, vid, names)
        if key in h.recipes and vid not in h.searched and (g := self._as_before(h, vid, key, names)) is not None:
            return [g]
        cut = cut_up(h, vid)
        if not cut:
            return self._settle_whole(h, vid, key, names)
        before = len(self.reserve)
        whole = self._settle_whole(h.fork(), vid, key, names)
        if any(vid not in g.tainted and g.last != [False] for g in whole):
            return whole
        others = self.reserve[before:]
        del self.reserve[before:]
        hs = [h.fork()]
        for part in cut:
            hs = [k for g in hs for k in self._settle_part(g, vid, part)]
            hs = sorted(hs, key=lambda g: -g.score)[:WIDTH]
        hs = [g for g in hs if g.known(vid) is not None]
        if not hs:
            self.reserve += others
        return hs or whole

    def _settle_part(self, h: Hypothesis, vid: int, part: Part) -> list[Hypothesis]:
        """All hypotheses in which this part of a value is known and occurs in the reference, if it can."""
        try:
            terms = h.part_terms(vid, part)
        except NotAffine:
            return []
        if all(t.kind == "known" for t in terms):
            return [h]
        shape = part.shape(h.tape.values[vid].shape)
        fresh: list[Hypothesis] = []
        again: list[Hypothesis] = []
        for match, score, node in self._unified(h, terms, shape, vid):
            g = h.fork()
            if not g.settle(match.assignments):
                continue
            value = g.total(g.part_terms(vid, part), shape)
            if value is None or not all(self.reference.occurs(v) for v in seen_as(g, vid, value)):
                continue
            (again if any(k in h.used for k in _firsts(match)) else fresh).append(g)
            g.swapped |= match.swapped
            g.score += score
            self._remember(g, match, 2, node)
            g.last = [True]
        if fresh:  # weights that have found their place come here only if all else fails
            self.reserve += [(0, g) for g in again]
        return fresh or again

    def _settle_whole(self, h: Hypothesis, vid: int, key: tuple[object, ...], names: list[str]) -> list[Hypothesis]:
        found = self._candidates(h, vid)
        taken = self._taken(h, vid, found)
        for g, match in taken:
            made = recipe(g, names, match.assignments, occurs=bool(g.last[0]), folds=match.folds >= 0)
            if made is not None:
                g.recipes[key] = made
        plain = any(g.last[0] is not False and not m.zeros and not m.missing for g, m in taken)
        if self.spread.folding and (not plain or h.spreads or h.spread_at == vid):
            # are scales of the reference folded into these weights?
            spread = self._taken(h, vid, self._spread_over(h, vid))
            for g, _ in spread:
                g.spreads = True
            taken = spread if h.spread_at == vid else taken + spread
        elif self.spread.folding and self.spread.likely(h, vid):
            later = h.fork()
            later.spread_at = vid
            self.reserve.append((-1, later))
        out, looks = [g for g, _ in taken], [g.last[0] for g, _ in taken]
        if not out and not found and self._constants(h, vid):
            return [h]
        if not out and not found and (apart := self._settled_apart(h, vid)):
            return apart
        if not out:
            h.tainted.add(vid)
            h.stuck = h.stuck or h.tape.values[vid].name or self._module(h, vid)
            return [h]
        # A multiple of the reference's value need not occur in it: one with the constant in its weights is no better.
        better = any(look and not _scales(m) for look, (_, m) in zip(looks, taken, strict=True))
        for g, look in zip(out, looks, strict=True):
            g.last = [look if better or look or not any(looks) else None]
        if better and not all(looks):
            self.reserve += [(0, g) for g, look in zip(out, looks, strict=True) if not look]
            out = [g for g, look in zip(out, looks, strict=True) if look]
        if len(out) > 1:
            self.forks += 1
            supported = [g for g in out if g.supported]
            if supported:
                self.reserve += [(1, g) for g in out if g is not supported[0]]
                out = supported[:1]
        return out

    def _key_of(self, h: Hypothesis, vid: int, names: list[str]) -> tuple[object, ...]:
        """Alike for the same value of another block."""
        v = h.tape.values[vid]
        op = str(h.tape.nodes[v.node].op) if v.node >= 0 else ""
        settled = tuple(h.bound[n].covered if n in h.bound else 0 for n in names)  # queries come before keys
        return (v.shape, op, tuple(pattern(n) for n in names), settled)

    def _as_before(self, h: Hypothesis, vid: int, key: tuple[object, ...], names: list[str]) -> Hypothesis | None:
        """Settled as the same value of an earlier block was, where what that computes occurs in the reference as well
        as it did there."""
        made = h.recipes[key]
        for assignments in moved_on(made, names, h):
            g = h.fork()
            if not g.settle(assignments):
                continue
            g = self._rest_as_before(g, names)
            if g.known(vid) is None or (not (look := g.look(vid)) and made.occurs):
                continue
            h.searched = h.searched | {vid}  # should this lead nowhere, it is searched for here
            self.reserve.append((1, h))
            match = Match(assignments, folds=h.at if made.folds else -1)
            self._remember(g, match, 1, -1)
            if made.folds:
                g.folded.add(vid)
            g.recipes[key] = recipe(g, names, assignments, occurs=made.occurs, folds=made.folds) or made
            g.last = [True if look else None]
            return g
        return None

    def _rest_as_before(self, g: Hypothesis, names: list[str]) -> Hypothesis:
        """What else of the same tensors an earlier block settled after this (keys after queries), settled along with
        it: then the whole is computed at once. Whether it is right shows where it is used."""
        patterns = tuple(pattern(n) for n in names)
        while any(n not in g.bound or not g.bound[n].full for n in names):
            settled = tuple(g.bound[n].covered if n in g.bound else 0 for n in names)
            made = next((r for k, r in g.recipes.items() if k[2:] == (patterns, settled)), None)
            if made is None:
                return g
            for assignments in moved_on(made, names, g):
                other = g.fork()
                if other.settle(assignments):
                    other.score += 1.0
                    self._remember(other, Match(assignments), 1, -1)
                    g = other
                    break
            else:
                return g
        return g

    def _taken(self, h: Hypothesis, vid: int, found: list[Found]) -> list[tuple[Hypothesis, Match]]:
        """A hypothesis for each of these matches that makes the value known, and whether it occurs in the reference."""
        out = []
        for match, score, node in found:
            g = h.fork() if len(found) > 1 or self.spread.folding else h  # else nothing is tried after it
            if g.settle(match.assignments) and g.known(vid) is not None:
                g.swapped |= match.swapped
                g.score += score
                self._remember(g, match, len(found), node)
                if match.folds >= 0:
                    g.folded.add(vid)
                g.last = [g.look(vid) if vid not in g.folded else None]
                out.append((g, match))
        return out

    def _spread_over(self, h: Hypothesis, vid: int) -> list[Found]:
        """Matches with sums of the reference whose scales are spread over what they scale."""
        found: dict[tuple[Any, ...], Found] = {}
        for m, node in self.spread.matches(h, vid):
            self._scale(m)
            found.setdefault(_key(m), (m, self._score(h, m) - m.penalty, node))
        return sorted(found.values(), key=lambda f: (f[0].missing, f[0].zeros, -f[1]))[:WIDTH]

    def _scale(self, m: Match) -> None:
        """Give the constants that a match found to the numbers of its sources."""
        self.merged.told(m)
        for a in m.assignments:
            if a.factors:
                a.sources = [self.reference.times(s, f) for s, f in zip(a.sources, a.factors, strict=True)]

    def _settled_apart(self, h: Hypothesis, vid: int) -> list[Hypothesis]:
        """The hypotheses in which a value put together from others is known, by settling one after the other: of what
        is known in the target by now, the reference's sum of the whole still has every addend."""
        parts = self._joined(h, vid)
        hs = [h.fork()] if len(parts) > 1 else []
        for part in parts:
            hs = [g for k in hs for g in self._settle(k, part) if part not in g.tainted]
        return [g for g in hs if g.known(vid) is not None]

    def _joined(self, h: Hypothesis, vid: int) -> list[int]:
        """The values that a concatenation joins, before they were moved into their places."""
        value = h.tape.values[vid]
        node = h.tape.nodes[value.node] if value.origin == "node" else None
        if node is None or h.kind(node) != "layout":
            return [vid]
        moved = [i for i in node.inputs if h.tape.values[i].dtype.is_floating_point]
        if value.data and all(h.weight_only(i) for i in moved):  # rows that were looked up
            return [vid]
        return [p for i in dict.fromkeys(moved) for p in self._joined(h, i)]

    def _constants(self, h: Hypothesis, vid: int) -> bool:
        """Buffers that only a comparison, a cast or an index reads (masks) are constants of the target."""
        names, queue, seen = set(), [vid], set()
        while queue:
            v = queue.pop()
            value = h.tape.values[v]
            if v in seen or v in h.env:
                continue
            seen.add(v)
            if value.origin == "param":
                names.add(value.name)
            elif value.origin == "node":
                queue += h.tape.nodes[value.node].inputs
        names -= {n for n in names if n in h.constant or (n in h.bound and h.bound[n].full)}
        if not names or not names <= h.maybe:
            return False
        for n in names:
            h.constant[n] = h.own[n].to(torch.float64)
        h.version += 1
        return h.known(vid) is not None

    def _module(self, h: Hypothesis, vid: int) -> str:
        node = h.tape.values[vid].node
        return h.tape.nodes[node].module if node >= 0 else h.tape.values[vid].name

    def _candidates(self, h: Hypothesis, vid: int) -> list[Found]:
        try:
            terms = h.terms(vid)
        except NotAffine:
            return []
        shape = h.tape.values[vid].shape
        open_names = self._open(h, terms)
        maybe = {n for n in open_names if n in h.maybe}
        found = self._unified(h, terms, shape, vid)
        if maybe:
            full = [f for f in found if f[0].zeros == 0 and f[0].missing == 0]
            if not full and any(not m.zeros and not m.missing for m, _, _ in self._spread_over(h, vid)):
                return []  # see _settle
            if not full:  # a buffer that nothing in the source stands for is a constant of the target
                for n in maybe:
                    h.constant[n] = h.own[n].to(torch.float64)
                h.version += 1
                if h.known(vid) is not None:
                    return [(Match([]), 0.0, -1)]
                return self._unified(h, h.terms(vid), shape, vid)
            found = full
        return found

    def _open(self, h: Hypothesis, terms: list[Term]) -> set[str]:
        names: set[str] = set()
        for t in terms:
            if t.site is not None:
                ends = (t.site.w.lo, t.site.w.hi)
            elif t.ids is not None:
                some = t.ids[t.ids > 0]
                ends = (int(some.min()), int(some.max())) if some.numel() else (0, 0)
            else:
                continue
            names.update(h.owner(n)[1] for n in ends if n > 0)
        return names - {""}

    def _unified(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...], vid: int) -> list[Found]:
        """The ways to settle a value: as a multiple of one of the reference's, for a constant may follow; where none
        can follow, or nothing is a multiple, as one of the reference's with the constants in the weights."""
        found = self._multiples(h, terms, shape)
        node = h.tape.nodes[h.at] if h.at < len(h.tape.nodes) else None
        if node is not None and coefficients.bilinear(h, node):
            found = self._folded(h, node, found)
        elif found and (node is None or any(m.gain != 1.0 for m, _, _ in found)):
            exact = self._unified_as(h, terms, shape, _as_it_is, exact=True)
            found = found + [(m, score - 2.0, at) for m, score, at in exact if _scales(m)]
        found = found or self._unified_as(h, terms, shape, _as_it_is, exact=True)
        if all(m.inner or m.missing for m, _, _ in found):  # an addend of a larger sum at best: the sum in one
            merged = self._unified_as(h, terms, shape, self.merged.cut, exact=True)
            found = [f for f in merged if not f[0].inner and not f[0].missing] + found
        return found

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
                    for m in unify(terms, shape, theirs, size_r, exact=exact):
                        m.like = y
                        self._scale(m)
                        key = _key(m)
                        if key not in seen:
                            seen.add(key)
                            m.inner = part is None and not (ref.is_end(y) or y in ends)
                            best.append((m, self._score(h, m) - m.penalty - (0.0 if size == n else 0.5), start))
                found += best
                if any(b[0].missing == 0 for b in best):
                    break
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
        for t, s in self._names(h, m):
            score += self.prior(t, s)
        score += sum(8.0 for t, s in self._places(h, m) if s in h.template.get(t, ()))
        if any(k in h.used for k in _firsts(m)):
            score -= 12.0
        return score

    def _names(self, h: Hypothesis, m: Match) -> list[tuple[str, str]]:
        pairs = []
        for a in m.assignments:
            if a.sources and a.target.numel():
                t = h.owner(a.target.first)[1]
                s = self.reference.owner(self.reference.told_by(a.sources[0].first))[1]
                if t and s:
                    pairs.append((t, s))
        return pairs

    def _places(self, h: Hypothesis, m: Match) -> list[tuple[str, str]]:
        """What a match says of its block: where in a tensor of this name, from where in one of that name."""
        out = []
        for a in m.assignments:
            if a.sources and a.target.numel():
                t, s = _place(h, a.target.first), _place(self.reference, self.reference.told_by(a.sources[0].first))
                if t and s:
                    out.append((t, s))
        return out

    def _remember(self, h: Hypothesis, m: Match, of: int, node: int) -> None:
        pairs = self._names(h, m)
        fresh = not any(k in h.used for k in _firsts(m))
        places = self._places(h, m)
        h.supported = fresh and bool(places) and all(s in h.template.get(t, ()) for t, s in places)
        h.used.update(_firsts(m))
        if m.folds >= 0:
            h.folds.add(m.folds)
        for t, s in places:
            h.template[t] = h.template.get(t, frozenset()) | {s}
        if pairs:
            module = self.reference.tape.nodes[node].module if node >= 0 else ""
            h.choices.append(Choice(tuple(t for t, _ in pairs), tuple(s for _, s in pairs), of, module))


def _factors(p: Affine, node: Node) -> tuple[Grid, Grid]:
    """The numbers of both factors of a product of weights [B, N, K] @ [B, K, M], each row of the first and each column
    of the second once; B is 1 where one of the two is the same for all of a batch."""
    a, b = (p.weight_matrix(x.vid) for x in node.args[:2])
    a, b = (x.unsqueeze(0) if x.ndim == 2 else x for x in (a, b))
    if all(part.shape[0] == 1 for part in b.parts):
        a, b = a.reshape(1, -1, a.shape[2]), b.narrow(0, 0, 1)
    elif all(part.shape[0] == 1 for part in a.parts):
        a, b = a.narrow(0, 0, 1), b.permute((1, 0, 2)).reshape(1, b.shape[1], -1)
    return a.once(1), b.once(2)


def _scales(m: Match) -> bool:
    return any(not math.isclose(f, 1.0, rel_tol=1e-12) for a in m.assignments for f in a.factors)


def _firsts(m: Match) -> list[int]:
    return [a.sources[0].first for a in m.assignments if a.sources and a.target.numel()]


def _place(p: Affine, number: int) -> str:
    found = p.holder(number)
    return f"{pattern(found[2])} {(number - found[0]) / found[1]:.6f}" if found is not None else ""


def _key(m: Match) -> tuple[Any, ...]:
    """Two matches that settle the same elements in the same way are one."""
    parts = [(a.target.key(), *(s.key() for s in a.sources)) for a in m.assignments if a.target.numel()]
    return tuple(sorted(parts, key=repr))
