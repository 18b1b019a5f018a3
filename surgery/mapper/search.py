"""Fill a program with holes: walk the target's tape, and bind each weight where it is needed, from the reference's run.

A hypothesis is a target program in which some weights are settled. Values that need no open weight are computed; a
value that does is left as a sum (affine.py) until something non-linear consumes it, and then it is settled in one of
the ways in which it meets values of the reference (meeting.py). More than one way: the hypothesis forks. Hypotheses
walk in step, and one whose values no longer occur in the reference, while another's do, is set aside; it is taken up
again only if all others fail.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from surgery import twin
from surgery.mapper.affine import Affine, NotAffine
from surgery.mapper.align import function
from surgery.mapper.grid import Grid
from surgery.mapper.holes import Holes
from surgery.mapper.hypothesis import Choice, Hypothesis
from surgery.mapper.kinds import base
from surgery.mapper.meeting import WIDTH, Found, Meeting, Prior, firsts, scaled
from surgery.mapper.parts import Part, cut_up, seen_as
from surgery.mapper.record import SYNC, Node, Tape
from surgery.mapper.reference import Reference
from surgery.mapper.repeat import moved_on, noted, pattern, recipe
from surgery.mapper.terms import Term
from surgery.mapper.unify import Assignment, Match

FIRST = 6  # ways to settle one value that are looked at before the others, where one of them is borne out
TRIES = 96  # hypotheses taken up again after all others failed
aten = torch.ops.aten


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
        self.again = again
        self.accept = accept
        self.meeting = Meeting(reference, prior)
        self.start = Hypothesis(tape, reference, own, maybe_constant)
        self.holes = Holes(tape, reference)
        for vid in self.holes.places:
            self.start.env.pop(vid, None)
        self.reserve: list[tuple[int, Hypothesis]] = []
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
        if self.holes.places and (holes := self.holes.open(h, node.inputs)):
            return [g for k in self._filled(h, holes[0]) for g in self._step(k)]
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
                g.last = [False] if self.holes.places else g.last  # another that stands there may do better
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
            if val.origin in ("input", "const") and val.tensor is not None and v not in self.holes.places:
                h.env.setdefault(v, val.tensor)
        return h

    def _filled(self, h: Hypothesis, vid: int) -> list[Hypothesis]:
        """What stands in the place of what a departure gives, in each way in which it may."""
        hs = [h]
        for v in self.holes.places[vid].taken:
            if h.tape.values[v].dtype.is_floating_point:
                hs = [g for k in hs for g in self._settle(k, v)]
        out = []
        for k in hs:
            now, later = self.holes.filled(k, vid)
            out += now
            self.reserve += [(1, g) for g in later]
        return out

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
        if h.known(vid) is not None or vid in h.tainted or vid in h.gone:
            return [h]
        if self.holes.open(h, [vid]):
            return self._filled(h, vid)
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
        for match, score, node in self.meeting.unified(h, terms, shape, vid):
            g = h.fork()
            if not g.settle(match.assignments):
                continue
            value = g.total(g.part_terms(vid, part), shape)
            if value is None or not all(self.reference.occurs(v) for v in seen_as(g, vid, value)):
                continue
            (again if any(map(h.has_place, firsts(match))) else fresh).append(g)
            g.swapped |= match.swapped
            g.score += score
            self._remember(g, match, 2, node)
            g.last = [True]
        if fresh:  # weights that have found their place come here only if all else fails
            self.reserve += [(0, g) for g in again]
        return fresh or again

    def _settle_whole(self, h: Hypothesis, vid: int, key: tuple[object, ...], names: list[str]) -> list[Hypothesis]:
        start = h.passed.get(vid, 0)
        found = self._candidates(h, vid)[start:]
        ways = len(found) + start
        found, others = (found[:FIRST], found[FIRST:]) if len(found) > FIRST + 1 else (found, [])
        if others:
            later = h.fork()
            later.passed[vid] = start + FIRST
        taken = self._taken(h, vid, found, ways)
        if others and any(g.last[0] is True for g, _ in taken):
            self.reserve.append((0, later))
        elif others:
            taken += self._taken(h, vid, others, ways)
            found += others
        for g, match in taken:
            made = recipe(g, names, match.assignments, occurs=bool(g.last[0]), folds=match.folds >= 0)
            if made is not None:
                g.recipes[key] = noted(g.recipes.get(key, ()), made)
        plain = any(g.last[0] is not False and not m.zeros and not m.missing for g, m in taken)
        if self.meeting.spread.folding and (not plain or h.spreads or h.spread_at == vid):
            # are scales of the reference folded into these weights?
            spread = self._taken(h, vid, over := self.meeting.spread_over(h, vid), len(over))
            for g, _ in spread:
                g.spreads = True
            taken = spread if h.spread_at == vid else taken + spread
        elif self.meeting.spread.folding and self.meeting.spread.likely(h, vid):
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
        better = any(look and not scaled(m) for look, (_, m) in zip(looks, taken, strict=True))
        for g, look in zip(out, looks, strict=True):
            g.last = [look if better or look or not any(looks) else None]
        if better and not all(looks):
            self.reserve += [(0, g) for g, look in zip(out, looks, strict=True) if not look]
            out = [g for g, look in zip(out, looks, strict=True) if look]
        if len(out) > 1:  # weights that have found their place come here only if all else fails
            again = [g for g, m in taken if any(map(h.has_place, firsts(m))) and g in out]
            if 0 < len(again) < len(out):
                self.reserve += [(0, g) for g in again]
                out = [g for g in out if g not in again]
        if len(out) > 1:
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
        tried = ((made, *found) for made in h.recipes[key] for found in moved_on(made, names, h))
        for made, assignments, constants in tried:
            g = h.fork()
            g.keep_own(constants)
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
            new = recipe(g, names, assignments, occurs=made.occurs, folds=made.folds)
            g.recipes[key] = noted(g.recipes[key], new or made)
            g.last = [True if look else None]
            return g
        return None

    def _rest_as_before(self, g: Hypothesis, names: list[str]) -> Hypothesis:
        """What else of the same tensors an earlier block settled after this (keys after queries), settled along with
        it: then the whole is computed at once. Whether it is right shows where it is used."""
        patterns = tuple(pattern(n) for n in names)
        while any(n not in g.constant and (n not in g.bound or not g.bound[n].full) for n in names):
            settled = tuple(g.bound[n].covered if n in g.bound else 0 for n in names)
            made = [r for k, several in g.recipes.items() if k[2:] == (patterns, settled) for r in several]
            for assignments, constants in (found for r in made for found in moved_on(r, names, g)):
                other = g.fork()
                other.keep_own(constants)
                if other.settle(assignments):
                    other.score += 1.0
                    self._remember(other, Match(assignments), 1, -1)
                    g = other
                    break
            else:
                return g
        return g

    def _taken(self, h: Hypothesis, vid: int, found: list[Found], of: int) -> list[tuple[Hypothesis, Match]]:
        """A hypothesis for each of these matches (of so many) that makes the value known, and whether it occurs in the
        reference."""
        out = []
        for match, score, node in found:
            g = h.fork() if of > 1 or self.meeting.spread.folding else h  # else nothing is tried after it
            if g.settle(match.assignments) and g.known(vid) is not None:
                g.swapped |= match.swapped
                g.score += score
                self._remember(g, match, of, node)
                if match.folds >= 0:
                    g.folded.add(vid)
                g.last = [g.look(vid, match.like) if vid not in g.folded else None]
                out.append((g, match))
        return out

    def _settled_apart(self, h: Hypothesis, vid: int) -> list[Hypothesis]:
        """The hypotheses in which a value put together from others, or taken out of one, is known, by settling one
        after the other: of what is known in the target by now, the reference's sum of the whole still has every
        addend."""
        parts = self._joined(h, vid)
        hs = [h.fork()] if parts != [vid] else []
        for part in parts:
            hs = [g for k in hs for g in self._settle(k, part) if part not in g.tainted]
        return [g for g in hs if g.known(vid) is not None]

    def _joined(self, h: Hypothesis, vid: int) -> list[int]:
        """The values that a concatenation joins, before they were moved into their places; or the one that something
        is a part of; or the addends of a sum, where several are open."""
        value = h.tape.values[vid]
        node = h.tape.nodes[value.node] if value.origin == "node" else None
        if node is not None and h.kind(node) == "sum" and (addends := self._addends(h, node)):
            return [p for i in addends for p in self._joined(h, i)]
        if node is None or h.kind(node) != "layout":
            return [vid]
        moved = [i for i in node.inputs if h.tape.values[i].dtype.is_floating_point]
        if value.data and all(h.weight_only(i) for i in moved):  # rows that were looked up
            return [vid]
        return [p for i in dict.fromkeys(moved) for p in self._joined(h, i)]

    def _addends(self, h: Hypothesis, node: Node) -> list[int]:
        """What a sum adds, where weights stand in more than one addend and none is made of weights alone; and what a
        multiple is a multiple of."""
        inputs = [i for i in dict.fromkeys(node.inputs) if h.tape.values[i].dtype.is_floating_point]
        opened = [i for i in inputs if h.tape.values[i].weights and h.tape.values[i].data and h.known(i) is None]
        if any(h.weight_only(i) for i in inputs) or len(opened) != len(inputs):
            return []
        return opened if len(opened) > 1 or base(node.op) in ("mul", "div", "neg", "sum") else []

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
        h.keep_own(names)
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
        found = self.meeting.unified(h, terms, shape, vid)
        if maybe:
            full = [f for f in found if f[0].zeros == 0 and f[0].missing == 0]
            if not full and any(not m.zeros and not m.missing for m, _, _ in self.meeting.spread_over(h, vid)):
                return []  # see _settle
            if not full:  # a buffer that nothing in the source stands for is a constant of the target
                h.keep_own(maybe)
                if h.known(vid) is not None:
                    return [(Match([]), 0.0, -1)]
                return self.meeting.unified(h, h.terms(vid), shape, vid)
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

    def _remember(self, h: Hypothesis, m: Match, of: int, node: int) -> None:
        pairs = self.meeting.names(h, m)
        fresh = not any(map(h.has_place, firsts(m)))
        places = self.meeting.places(h, m)
        h.supported = fresh and bool(places) and all(s in h.template.get(t, ()) for t, s in places)
        h.used += [s for a in m.assignments if a.sources and a.target.numel() for s in a.sources]
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
