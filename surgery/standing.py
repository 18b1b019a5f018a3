"""Which activation of the reference stands in the place of what a module of the target gives.

Where a module departs on purpose, what it gives occurs nowhere in the reference. Of the activations there that have its
size, those come in question that are computed from what the module takes (its inputs occur in both runs); the nearest
in value come first, then those that a module of the reference gives, by their distance in operators. One is taken only
where what the target computes from it, up to the next such place, occurs in the reference again. Wrong ones are left
by going back (depth first).
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from surgery import surface, twin
from surgery.mapper.record import MOVES, RANDOM, FingerprintIndex, Replaced, Tape, fingerprint
from surgery.pairing import Run, Untold, call, cuts, op_name

NEAR = 0.1  # relative; what a departure gives may be so near to the reference's that nearness tells
NEXT = 64  # activations that are looked at for one place, the closest in the dataflow
MOST = 16  # of which so many are tried
LAYOUTS = 4  # in so many layouts each
TOLERANCES = (1e-9, 1e-6)  # relative; constants that one side stores in float32 leave more than the first
TRIES = 600  # for one target
SECONDS = 180.0

Key = tuple[str, str, int, int]  # of a value: module, operator, the how-manieth of these in the run, which result


@dataclass(frozen=True)
class Stand:
    """What stands in the place of one tensor of one call."""

    key: Key
    axes: tuple[int, ...]  # the order of its axes, before it is laid into the shape of what it stands for

    @property
    def module(self) -> str:
        return self.key[0]

    def laid(self, t: Tensor, shape: Sequence[int]) -> Tensor | None:
        """The reference's activation in the layout of the target's; None where it does not fit."""
        if t.ndim != len(self.axes) or t.numel() != math.prod(shape):
            return None
        return t.permute(self.axes).reshape(tuple(shape))


def keys(tape: Tape) -> dict[Key, int]:
    """The values of a run by where they are made, which is the same on other inputs."""
    count: Counter[tuple[str, str]] = Counter()
    found: dict[Key, int] = {}
    for node in tape.nodes:
        at = (node.module, op_name(node))
        for i, vid in enumerate(node.outs):
            if vid >= 0 and tape.values[vid].origin == "node":
                found[*at, count[at], i] = vid
        count[at] += 1
    for i, vid in enumerate(v for v, value in enumerate(tape.values) if value.origin == "input"):
        found["", "input", i, 0] = vid
    return found


class Theirs:
    """The reference's run on one input, to look values up in."""

    def __init__(self, tape: Tape, held: Callable[[int], Tensor | None] | None = None) -> None:
        self.tape = tape
        self.run = Run(tape, tape.outputs())
        self._held = held

    def held(self, vid: int) -> Tensor:
        """What a value was. Raises Untold."""
        if self._held is None:
            return self.run.held(vid)
        found = self._held(vid)
        if found is None:
            raise Untold(vid)
        return twin.lift(found)

    @cached_property
    def by_key(self) -> dict[Key, int]:
        return keys(self.tape)

    @cached_property
    def key_of(self) -> dict[int, Key]:
        return {vid: key for key, vid in self.by_key.items()}

    @cached_property
    def index(self) -> FingerprintIndex:
        return FingerprintIndex((vid, v.fingerprint) for vid, v in enumerate(self.tape.values) if v.data)

    @cached_property
    def outgoing(self) -> frozenset[int]:
        """Values that are used outside of the module that computes them."""
        found = set(self.tape.outputs())
        for vid, value in enumerate(self.tape.values):
            if value.node >= 0:
                own = self.tape.nodes[value.node].module
                after = (self.tape.nodes[c].module for c in self.tape.consumers[vid])
                if any(m != own and not m.startswith(f"{own}.") for m in after):
                    found.add(vid)
        return frozenset(found)

    def equal(self, t: Tensor, tolerance: float) -> list[int]:
        """The values that equal a tensor, up to layout."""
        found = self.index.find(fingerprint(t), tolerance)
        return [v for v in found if math.prod(self.tape.values[v].shape) == t.numel()]

    def residual(self, t: Tensor) -> float:
        """How far a tensor is from occurring here, as a whole or in pieces; 0 where it says nothing."""
        if not t.is_floating_point() or fingerprint(t) is None:
            return 0.0
        best = surface.INF
        for tolerance in (*TOLERANCES, 1e-3):
            for vid in self.equal(t, tolerance):
                best = min(best, surface.residual(self.held(vid), t, anywhere=True))
            if best < surface.INF:
                return best
        return 0.0 if self.pieces(t) else best

    def pieces(self, t: Tensor) -> list[int]:
        """The values that a tensor is made of, where it is several in one."""
        for several in cuts(twin.lift(t)):
            found = [self.equal(piece, TOLERANCES[0]) for piece in several]
            if all(found):
                return [v for equal in found for v in equal]
        return []

    def value(self, stand: Stand, shape: Sequence[int]) -> Tensor | None:
        """The activation that stands for something of this shape; None where this run has none."""
        vid = self.by_key.get(stand.key)
        return None if vid is None else stand.laid(self.held(vid), shape)


def descendants(tape: Tape, vids: Iterable[int]) -> dict[int, int]:
    """The values that are computed from these, and these: by how many operators."""
    depth = dict.fromkeys(vids, 0)
    for node in tape.nodes[min((tape.values[v].node for v in depth), default=0) + 1 if depth else 0 :]:
        before = [depth[v] for v in node.inputs if v in depth]
        if before:
            for o in node.outs:
                if o >= 0 and tape.values[o].data:
                    depth.setdefault(o, min(before) + 1)
    return depth


def orders(theirs: Sequence[int], ours: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Orders of axes in which a tensor of one shape is one of another, but for axes merged or split."""
    if len(theirs) > 6:
        return
    edges = set(itertools.accumulate(ours, lambda a, b: a * b))
    seen: set[tuple[int, ...]] = set()
    for order in itertools.permutations(range(len(theirs))):
        told = tuple(i for i in order if theirs[i] != 1)
        made = set(itertools.accumulate((theirs[i] for i in told), lambda a, b: a * b))
        if told not in seen and (made <= edges | {1} or edges <= made | {1}):
            seen.add(told)
            yield order


def between(tape: Tape, after: Iterable[int], vid: int) -> list[str]:
    """The parameters that a value is computed with, from these values on."""
    stop, seen, todo = set(after), set[int](), [vid]
    found: dict[str, None] = {}
    while todo:
        v = todo.pop()
        if v in seen or v in stop:
            continue
        seen.add(v)
        value = tape.values[v]
        if value.origin == "param":
            found[value.name] = None
        elif value.node >= 0:
            todo += tape.nodes[value.node].inputs
    return list(found)


def candidates(
    theirs: Theirs, shape: Sequence[int], own: Tensor | None, at: Iterable[int], weights: int
) -> list[tuple[bool, Stand]]:
    """What may stand in the place of a tensor of this shape, best first, and whether that is likely: as near as that,
    or with as many weights. `at`: the reference's values that equal what the module takes; `own`: what it computes,
    where that is known; `weights`: how many weights it has, which may lie otherwise in the reference, but are as
    many."""
    tape, size, at = theirs.tape, math.prod(shape), list(at)
    depth = descendants(tape, at)
    some = [
        v
        for v in depth
        if math.prod(tape.values[v].shape) == size
        and tape.values[v].dtype.is_floating_point
        and tape.values[v].fingerprint is not None
        and v in theirs.key_of
    ]
    some = sorted(some, key=lambda v: (depth[v], v))
    # Relayouts of one value are one value: the one that a module gives, or else the first.
    first: dict[object, int] = {}
    for v in some:
        f = tape.values[v].fingerprint
        if f not in first or (v in theirs.outgoing and first[f] not in theirs.outgoing):
            first[f] = v
    found: list[tuple[tuple[float, ...], Stand]] = []
    for v in [v for v in some if first[tape.values[v].fingerprint] == v][:NEXT]:
        try:
            held = theirs.held(v)
        except Untold:
            continue
        ways = [Stand(theirs.key_of[v], order) for order in orders(held.shape, shape)]
        far = float(v not in theirs.outgoing)
        if own is not None and len(ways) > 0:
            by = [(surface.relative(laid, own), w) for w in ways if (laid := w.laid(held, shape)) is not None]
            near, best = min(by, key=lambda b: b[0])
            if near < NEAR:
                found.append(((0.0, near), best))
                continue
        used = sum(math.prod(tape.values[tape.params[n]].shape) for n in between(tape, at, v))
        fits = 1 if depth[v] == 0 else 0 if used == weights else 2  # what it takes itself may be what stands there
        rank = (1.0, float(fits), far, float(depth[v]))
        found += [((*rank, float(i)), w) for i, w in enumerate(ways[:LAYOUTS])]
    return [(rank[:2] <= (1.0, 0.0) or rank[0] == 0.0, stand) for rank, stand in sorted(found, key=_rank)][:MOST]


def _rank(found: tuple[tuple[float, ...], Stand]) -> tuple[float, ...]:
    return found[0]


@dataclass
class Resolved:
    """What stands in each place, by number; and where that ends, if not all could be found."""

    stands: dict[int, Stand] = field(default_factory=dict)
    failed: int = -1  # the first place for which nothing fits
    why: str = ""

    @property
    def whole(self) -> bool:
        return self.failed < 0


class Resolving:
    """The places of one target's run against the reference's run on the same input.

    ours: recorded with each place cut out, and what the module computes in it. ends: whether outputs that come out of
    a run are right. barred: values that depend on new tensors.
    """

    def __init__(
        self,
        ours: Tape,
        theirs: Theirs,
        ends: Callable[[Mapping[int, Tensor], Run, float], bool],
        barred: set[int],
        last: set[int],
        weights: Mapping[str, int],
    ) -> None:
        self.weights = weights
        self.tape, self.theirs, self.ends, self.barred, self.last = ours, theirs, ends, barred, last
        self.run = Run(ours, ours.outputs())
        self.places = ours.replaced
        self.tries = 0
        self.until = time.monotonic() + SECONDS
        self.best = Resolved(failed=0)
        self.tolerance = TOLERANCES[0]

    def resolve(self) -> Resolved:
        for self.tolerance in TOLERANCES:
            with twin.math_only():
                if self._from(0, {}, {}):
                    return self.best
        return self.best

    # -- one place after another --------------------------------------------------------------------------------------
    def _from(self, number: int, known: Mapping[int, Tensor], stands: Mapping[int, Stand]) -> bool:
        if number == len(self.places):
            if self.ends(known, self.run, self.tolerance):
                self.best = Resolved(dict(stands))
                return True
            if self.best.failed < number:  # deeper than any before
                self.best = Resolved(dict(stands), number, "what comes out in the end differs")
            return False
        place = self.places[number]
        own = self._value(place.own, known)
        at: list[int] = []
        for v in place.taken:
            t = self._value(v, known)
            if not t.is_floating_point() or fingerprint(t) is None:
                continue
            equal = self.theirs.equal(t, self.tolerance) or self.theirs.pieces(t)
            if not equal:
                self._fails(number, stands, "what goes into it does not occur in the reference")
                return False
            at += equal
        if not self._used(place):
            return self._next(number, known, stands)
        finite = own if bool(torch.isfinite(own).all()) else None
        weights = self.weights.get(place.module, 0)
        found = candidates(self.theirs, tuple(own.shape), finite, at, weights)
        if not found:
            self._fails(number, stands, "the reference computes nothing of its size from what goes into it")
            return False
        if self.best.failed <= number:
            self._fails(number, {**stands, number: found[0][1]}, "nothing in its place makes what follows equal")
        for _, stand in found:
            if self.tries > TRIES or time.monotonic() > self.until:
                return False
            self.tries += 1
            value = self.theirs.value(stand, tuple(own.shape))
            if value is None:
                continue
            if self._next(number, {**known, place.given: value}, {**stands, number: stand}):
                return True
        return False

    def _fails(self, number: int, stands: Mapping[int, Stand], why: str) -> None:
        if number >= self.best.failed:
            self.best = Resolved(dict(stands), number, why)

    def _next(self, number: int, known: Mapping[int, Tensor], stands: Mapping[int, Stand]) -> bool:
        """Run on to the next place; false where nothing that is computed on the way occurs in the reference."""
        last = number + 1 == len(self.places)
        begin = self.places[number].nodes[1]
        until, end = (len(self.tape.nodes), len(self.tape.nodes)) if last else self.places[number + 1].nodes
        changed = dict(known)
        try:
            made = self._advance(changed, begin, max(begin, until))
            after = descendants(self.tape, [self.places[number].given])
            telling = [t for vid, t in made if vid in after and fingerprint(t) is not None]
            ends = self.places[number].given in self.last
            if telling and not ends and not any(self.theirs.equal(t, self.tolerance) for t in telling):
                return False
            self._advance(changed, max(begin, until), max(begin, end))
        except (Untold, RuntimeError, ValueError, IndexError, TypeError, ZeroDivisionError):
            return False  # the program does not run with it: that is not what stands there
        return self._from(number + 1, changed, stands)

    def _advance(self, known: dict[int, Tensor], begin: int, end: int) -> list[tuple[int, Tensor]]:
        """Run these nodes again where what they take is another; what they compute, without mere relayouts."""
        made = []
        for index in range(begin, end):
            node = self.tape.nodes[index]
            name = op_name(node)
            if name in ("sync", "_local_scalar_dense") or name.lstrip("_").startswith(RANDOM):
                continue
            if not any(v in known for v in node.inputs):
                continue
            for vid, t in zip(node.outs, call(node, lambda v: self._value(v, known)), strict=True):
                if vid >= 0:
                    known[vid] = t
                    if name not in MOVES and t.is_floating_point() and vid not in self.barred:
                        made.append((vid, t))
        return made

    def _value(self, vid: int, known: Mapping[int, Tensor]) -> Tensor:
        return known[vid] if vid in known else self.run.held(vid)

    def _used(self, place: Replaced) -> bool:
        return bool(self.tape.consumers[place.given]) or place.given in self.tape.outputs()


def final(tape: Tape, weights: set[str], barred: set[int]) -> set[int]:
    """What took a place, and after which no filled weight is used but with new tensors: an output of the reference may
    be just this."""
    fed = set(tape.fed())
    found = set()
    for place in tape.replaced:
        reached, todo, ends = {place.given}, [place.given], True
        while todo and ends:
            vid = todo.pop()
            ends = vid not in fed
            for c in tape.consumers[vid]:
                node = tape.nodes[c]
                outs = [o for o in node.outs if o >= 0 and o not in barred and o not in reached]
                if outs and any(_weight(tape, v, weights) for v in node.inputs):
                    ends = False
                reached.update(outs)
                todo += outs
        if ends:
            found.add(place.given)
    return found


def _weight(tape: Tape, vid: int, weights: set[str]) -> bool:
    """Is it a filled tensor, or made of such alone?"""
    value = tape.values[vid]
    if value.data or not value.weights:
        return False
    if value.origin == "param":
        return value.name in weights
    return value.node >= 0 and any(_weight(tape, v, weights) for v in tape.nodes[value.node].inputs)
