"""Fill a program with holes: walk the target's tape, and bind each weight where it is needed, from the reference's run.

A hypothesis is a target program in which some weights are settled. Values that need no open weight are computed; a value
that does is left as a sum (affine.py) until something non-linear consumes it, and then it is unified (unify.py) with values
of the reference that read the same rows. More than one way: the hypothesis forks. Hypotheses walk in step, and one whose
values no longer occur in the reference, while another's do, is set aside; it is taken up again only if all others fail.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery import twin
from surgery.mapper.affine import Affine, NotAffine, Term, base
from surgery.mapper.record import SYNC, Fingerprint, FingerprintIndex, Node, Ref, Tape, Value, fingerprint, overlay
from surgery.mapper.unify import Assignment, Match, live, match_sites, present_rows, unify

WIDTH = 24  # hypotheses that walk in step
TRIES = 96  # hypotheses taken up again after all others failed
aten = torch.ops.aten


def _norm_except(v: Tensor, dim: int) -> Tensor:
    return v.norm(2) if dim == -1 else v.norm(2, [d for d in range(v.ndim) if d != dim % v.ndim], keepdim=True)


DERIVE: dict[str, Callable[..., Tensor]] = {
    "log": torch.log,
    "exp": torch.exp,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "rsqrt_inverse": lambda t: t.square().reciprocal(),
    "shift": lambda t, by: t + by,
    "norm_except": _norm_except,
}


@dataclass
class Derived:
    """Source values computed by a rule, numbered like source elements."""

    offset: int
    size: int
    fn: str
    params: dict[str, Any]
    numbers: Tensor
    shape: tuple[int, ...]
    value: Tensor


class Reference(Affine):
    """The reference's tape: every value is known, and every weight has its number."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape, cut=True)
        values = tape.values
        self.index = FingerprintIndex((i, v.fingerprint) for i, v in enumerate(values))
        self.products: list[int] = []
        self.scales: list[int] = []
        self.pure: list[int] = []
        self.derived: list[Derived] = []
        for i, node in enumerate(tape.nodes):
            kind = self.kind(node)
            if kind == "product":
                self.products.append(i)
            elif kind == "scale":
                self.scales.append(i)
        self._pure()
        self._source: dict[int, Tensor] = {}

    def known(self, vid: int) -> Tensor | None:
        t = self.tape.values[vid].tensor
        return None if t is None else t.to(torch.float64) if t.is_floating_point() else t

    def _pure(self) -> None:
        """Values that are sums of weights alone (embeddings, class tokens): what a product cannot lead to."""
        pure = {v for v in self.tape.params.values()}
        for node in self.tape.nodes:
            if self.kind(node) in ("layout", "sum"):
                floats = [v for v in node.inputs if self.tape.values[v].dtype.is_floating_point]
                if floats and all(v in pure for v in floats):
                    pure.update(o for o in node.outs if o >= 0)
        outputs = set(self.tape.outputs())
        for v in sorted(pure):
            if self.tape.values[v].origin == "node" and (self.is_end(v) or v in outputs or self._leaves(v, pure)):
                self.pure.append(v)

    def _leaves(self, vid: int, pure: set[int]) -> bool:
        return any(o not in pure for c in self.tape.consumers[vid] for o in self.tape.nodes[c].outs if o >= 0)

    def closure(self, vids: list[int], limit: int = 48) -> list[int]:
        """Values that are these, moved or added to: ends first."""
        seen, queue = dict.fromkeys(vids), list(vids)
        while queue and len(seen) < limit:
            vid = queue.pop(0)
            for c in self.tape.consumers[vid]:
                if self.kind(self.tape.nodes[c]) in ("layout", "sum"):
                    for o in self.tape.nodes[c].outs:
                        if o >= 0 and o not in seen:
                            seen[o] = None
                            queue.append(o)
        outputs = set(self.tape.outputs())
        return sorted(seen, key=lambda v: (not (self.is_end(v) or v in outputs), v))

    def values_of(self, numbers: Tensor) -> Tensor:
        """The values of weight elements, in float64; 0 where the number is 0."""
        out = torch.zeros(numbers.shape, dtype=torch.float64)
        flat, dest = numbers.reshape(-1), out.reshape(-1)
        lo, hi = (int(flat.min()), int(flat.max())) if flat.numel() else (0, 0)
        n = flat.numel()
        spans = [(first, size, self.tape.params[name]) for first, size, name in self.names]
        spans += [(u.offset, u.size, -1 - k) for k, u in enumerate(self.virtual.values())]
        spans += [(d.offset, d.size, -(1 << 20) - k) for k, d in enumerate(self.derived)]
        for first, size, vid in spans:
            if first > hi or first + size <= lo:
                continue
            src = self._flat(vid)
            if lo >= first and hi < first + size:
                if n == size and lo == first and bool((flat[1:] - flat[:-1] == 1).all()):
                    return src.reshape(numbers.shape).clone()
                return src[flat - first].reshape(numbers.shape)
            here = (flat >= first) & (flat < first + size)
            dest[here] = src[flat[here] - first]
        return out

    def derive(self, fn: str, params: dict[str, Any], numbers: Tensor) -> Tensor:
        """Numbers for fn(these elements): source values that a target weight needs and no source tensor holds."""
        value = DERIVE[fn](self.values_of(numbers.to(torch.int64)), **params)
        d = Derived(self.next, value.numel(), fn, params, numbers, tuple(value.shape), value)
        self.derived.append(d)
        self.next += d.size
        return torch.arange(d.offset, d.offset + d.size).reshape(value.shape)

    def _flat(self, vid: int) -> Tensor:
        if vid <= -(1 << 20):
            return self.derived[-vid - (1 << 20)].value.reshape(-1)
        if vid < 0:
            u = list(self.virtual.values())[-1 - vid]
            t = self.known(u.vid)
            assert t is not None
            return (t.reciprocal() if u.how else t).reshape(-1)
        found = self._source.get(vid)
        if found is None:
            t = self.tape.values[vid].tensor
            assert t is not None
            found = t.reshape(-1).to(torch.float64)
        return found


@dataclass
class Bound:
    """What is settled of one target tensor: for each element the source number (0 open, -1 zero), and further addends."""

    ids: Tensor
    more: list[Tensor] = field(default_factory=list)

    @property
    def full(self) -> bool:
        return bool((self.ids != 0).all())


@dataclass
class Choice:
    """A decision, for the person who asks why."""

    weights: tuple[str, ...]
    sources: tuple[str, ...]
    of: int  # how many ways there were
    module: str


class Hypothesis(Affine):
    """The target's tape with some weights settled."""

    def __init__(self, tape: Tape, reference: Reference, constants: dict[str, Tensor], maybe: set[str]) -> None:
        super().__init__(tape, cut=False)
        self.reference = reference
        self.env: dict[int, Tensor] = {}
        self.bound: dict[str, Bound] = {}
        self.constant: dict[str, Tensor] = {}  # buffers that keep their own value
        self.own = constants  # values of the target's own tensors, for those that may be constants
        self.maybe = maybe
        self.used: set[int] = set()  # source elements (the first of each assignment) that have found their place
        self.tainted: set[int] = set()
        self.at = 0
        self.score = 0.0
        self.hits = 0
        self.misses = 0
        self.swapped = False
        self.choices: list[Choice] = []
        self.template: dict[str, frozenset[str]] = {}  # a name without its numbers -> those that it came from before
        self.supported = False
        self.last: list[bool | None] = []
        self.where: dict[int, int] = {}  # target value -> reference value that it was found equal to
        self.stuck = ""
        self.version = 0
        self.unknown: dict[int, int] = {}
        for vid, v in enumerate(tape.values):
            if v.origin in ("input", "const") and v.tensor is not None:
                self.env[vid] = v.tensor

    def fork(self) -> Hypothesis:
        new = copy.copy(self)
        for name in ("env", "bound", "constant", "template", "where", "virtual", "unknown"):
            setattr(new, name, dict(getattr(self, name)))
        new.tainted, new.used, new.choices, new.memo = set(self.tainted), set(self.used), list(self.choices), {}
        return new

    # -- values -------------------------------------------------------------------------------------------------------
    def terms(self, vid: int, root: bool = True) -> list[Term]:
        self.memo.clear()
        return super().terms(vid, root)

    def known(self, vid: int) -> Tensor | None:
        if vid in self.env:
            return self.env[vid]
        if vid in self.tainted:
            return None
        v = self.tape.values[vid]
        if v.origin == "param":
            value = self.value_of(v.name, v.shape)
            if value is not None:
                self.env[vid] = value
            return value
        if v.origin != "node" or self.unknown.get(vid) == self.version:
            return None
        node = self.tape.nodes[v.node]
        if all(self.known(i) is not None for i in node.inputs):
            self.compute(node)
            return self.env.get(vid)
        if self.kind(node) in ("layout", "sum") and (value := self._partly(vid)) is not None:
            self.env[vid] = value
            return value
        self.unknown[vid] = self.version
        return None

    def _partly(self, vid: int) -> Tensor | None:
        """A value that meets only the settled elements of a tensor that is settled in part (rows of a table)."""
        self.unknown[vid] = self.version  # the terms ask for what is known, and must not come back here
        try:
            terms = self.terms(vid)
        except NotAffine:
            return None
        if not all(t.kind == "known" and t.value is not None for t in terms):
            return None
        total = torch.zeros(self.tape.values[vid].shape, dtype=torch.float64)
        for t in terms:
            total = total + t.coef * t.value  # type: ignore[operator]
        return total

    def value_of(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        if name in self.constant:
            return self.constant[name]
        b = self.bound.get(name)
        if b is None or not b.full:
            return None
        return self._gather(b).reshape(shape)

    def _gather(self, b: Bound) -> Tensor:
        out = self.reference.values_of(b.ids.clamp_min(0).to(torch.int64))
        for extra in b.more:
            out = out + self.reference.values_of(extra.to(torch.int64))
        return out

    def param_terms(self, vid: int) -> list[Term]:
        v = self.tape.values[vid]
        b = self.bound.get(v.name)
        numbers = self.weight_numbers(vid)
        if b is None:
            return [Term("weight", 1.0, ids=numbers)]
        open_ = (b.ids == 0).reshape(v.shape)
        out = [Term("weight", 1.0, ids=torch.where(open_, numbers, 0.0))]
        part = torch.where(open_, 0.0, self._gather(b).reshape(v.shape))
        out.append(Term("known", 1.0, value=part, vid=vid))
        return out

    def _settled(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(values in float64, is it settled?) of weight elements; what is no weight counts as settled, and zero."""
        flat = numbers.reshape(-1).to(torch.int64)
        value, done = torch.zeros(len(flat), dtype=torch.float64), flat == 0
        lo, hi = int(flat.min()), int(flat.max())
        for first, size, name in self.names:
            b = self.bound.get(name)
            if b is None or first > hi or first + size <= lo:
                continue
            here = (flat >= first) & (flat < first + size)
            at = flat[here] - first
            part = Bound(b.ids[at], [m[at] for m in b.more])
            value[here] = self._gather(part)
            done[here] = part.ids != 0
        return value.reshape(numbers.shape), done.reshape(numbers.shape)

    def _product(self, node: Node, index: int, shape: tuple[int, ...]) -> list[Term]:
        """A product whose matrix is settled in some columns is known there."""
        out = []
        for t in super()._product(node, index, shape):
            assert t.site is not None and t.row is not None and t.col is not None
            value, done = self._settled(t.site.w)
            column = done.flatten(1).all(1) if t.site.conv else done.all(0)
            if not bool(column.any()):
                out.append(t)
                continue
            settled = torch.cat([torch.zeros(1, dtype=torch.bool), column])[t.col.to(torch.int64)]
            if t.site.conv:
                y = aten.convolution.default(t.site.x, value, None, *(list(g) if isinstance(g, tuple) else g for g in t.site.geometry))
            else:
                table = t.site.x @ torch.where(column, value, 0.0)
                y = table[(t.row.to(torch.int64) - 1).clamp_min(0), (t.col.to(torch.int64) - 1).clamp_min(0)]
            here = settled & (t.row > 0)
            out.append(Term("known", t.coef, value=torch.where(here, y, 0.0)))
            if not bool(column.all()):
                out.append(Term("product", t.coef, site=t.site, row=torch.where(settled, 0.0, t.row), col=torch.where(settled, 0.0, t.col)))
        return out

    def weight_matrix(self, vid: int) -> Tensor:
        """A product's matrix that is settled in part: its open elements only are asked for with the others (a tied table)."""
        try:
            terms = super().terms(vid, root=False)
        except NotAffine:
            return super().weight_matrix(vid)
        if any(t.kind == "known" for t in terms):
            saved = self.bound
            self.bound = {}
            kept = {v: self.env.pop(v) for v in list(self.env) if self.weight_only(v)}
            try:
                return super().weight_matrix(vid)
            finally:
                self.bound = saved
                self.env.update(kept)
        return super().weight_matrix(vid)

    def compute(self, node: Node) -> None:
        out = self.run(node, {})
        for vid, t in zip(node.outs, out if isinstance(out, (tuple, list)) else (out,), strict=False):
            if vid >= 0 and isinstance(t, Tensor):
                self.env[vid] = t

    def taint(self, node: Node) -> None:
        self.tainted.update(o for o in node.outs if o >= 0)

    # -- settling weights ---------------------------------------------------------------------------------------------
    def settle(self, assignments: list[Assignment]) -> bool:
        """Write assignments down. False where one contradicts what is settled."""
        for a in assignments:
            if a.target.numel() == 0:
                continue
            lo, hi = int(a.target.min()), int(a.target.max())
            spans = [(first, size, name) for first, size, name in self.names if first <= hi and first + size > lo]
            for first, size, name in spans:
                here = (a.target >= first) & (a.target < first + size)
                if bool(here.any()) and not self._write(name, size, a.target[here] - first, [s[here] for s in a.sources]):
                    return False
            if hi >= self.real_end:
                for key, u in list(self.virtual.items()):
                    here = (a.target >= u.offset) & (a.target < u.offset + u.size)
                    if bool(here.any()) and not self._solve(key, a.target[here] - u.offset, [s[here] for s in a.sources]):
                        return False
        return True

    def _write(self, name: str, size: int, at: Tensor, sources: list[Tensor]) -> bool:
        b = self.bound.get(name)
        new = sources[0].to(torch.int64) if sources else torch.full_like(at, -1)
        new = torch.where(new == 0, -1, new)
        ids = torch.zeros(size, dtype=torch.int64) if b is None else b.ids.clone()
        old = ids[at]
        if bool(((old != 0) & (old != new)).any()):
            return False
        ids[at] = new
        more = [] if b is None else [m.clone() for m in b.more]
        for k, s in enumerate(sources[1:]):
            while len(more) <= k:
                more.append(torch.zeros(size, dtype=torch.int64))
            more[k][at] = s.to(torch.int64)
        self.bound[name] = Bound(ids, more)
        self.version += 1
        return True

    def _solve(self, key: tuple[int, str], at: Tensor, sources: list[Tensor]) -> bool:
        """A computed weight (weight norm, exp ...) must equal given source elements: settle what it is computed from."""
        from surgery.mapper.invert import solve

        return solve(self, self.virtual[key], at, sources)

    # -- evidence -----------------------------------------------------------------------------------------------------
    def look(self, vid: int) -> bool | None:
        """Does this value occur in the reference? None where it could tell nothing."""
        if vid in self.tainted:
            return False
        v = self.tape.values[vid]
        t = self.env.get(vid)
        if t is None or not v.data:
            return None
        f = fingerprint(t)
        if f is None:
            return None
        found = self.reference.index.find(f)
        if found:
            self.where[vid] = found[0]
            self.hits += 1
        else:
            self.misses += 1
        return bool(found)


Prior = Callable[[str, str], float]


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
        self.start = Hypothesis(tape, reference, own, maybe_constant)
        self.reserve: list[tuple[int, Hypothesis]] = []
        self.forks = 0

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
            at += 1
        return done

    def _finish(self, h: Hypothesis) -> list[Hypothesis]:
        hs = [h]
        for vid in h.tape.outputs():
            hs = [g for k in hs for g in self._settle(k, vid)]
        return hs

    def _step(self, h: Hypothesis) -> list[Hypothesis]:
        node = h.tape.nodes[h.at]
        floats = [v for v in node.inputs if h.tape.values[v].dtype.is_floating_point or h.tape.values[v].dtype.is_complex]
        if not any(h.tape.values[o].data for o in node.outs if o >= 0) and node.op != "sync" and node.op not in SYNC:
            h.at += 1
            return [h]
        if any(v in h.tainted for v in node.inputs):
            h.taint(node)
            h.at += 1
            return [h]
        kind = h.kind(node)
        unknown = [v for v in floats if h.known(v) is None]
        hs = [h]
        if unknown:
            if kind == "product":
                need = [v for v in unknown if not h.weight_only(v)]
            elif kind in ("layout", "sum"):
                need = []
            elif kind == "scale":
                need = [v for v in unknown if not h.weight_only(v)]
            else:
                need = unknown
            for v in need:
                hs = [g for k in hs for g in self._settle(k, v)]
        out = []
        for g in hs:
            if any(v in g.tainted for v in node.inputs):
                g.taint(node)
            elif all(g.known(v) is not None for v in node.inputs):
                if node.op == "sync" or node.op in SYNC:
                    g = self._check(g, node)
                if node.op != "sync":
                    g.compute(node)
                    node = g.tape.nodes[g.at]
                g.last = [g.look(o) for o in node.outs if o >= 0]
            g.at += 1
            out.append(g)
        return out

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
            known = h._gather(b).reshape(own.shape)
            values[name] = torch.where((b.ids != 0).reshape(own.shape), known, own.to(torch.float64))
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
        """All hypotheses in which `vid` is known, or tainted where nothing in the reference fits."""
        if h.known(vid) is not None or vid in h.tainted:
            return [h]
        found = self._candidates(h, vid)
        if not found:
            h.tainted.add(vid)
            h.stuck = h.stuck or h.tape.values[vid].name or self._module(h, vid)
            return [h]
        children = []
        for match, score, node in found:
            g = h.fork() if len(found) > 1 else h
            if not g.settle(match.assignments):
                continue
            if g.known(vid) is None:
                continue
            g.swapped |= match.swapped
            g.score += score
            self._remember(g, match, len(found), node)
            children.append((g, score))
        if not children:
            h.tainted.add(vid)
            h.stuck = h.stuck or self._module(h, vid)
            return [h]
        looks = [g.look(vid) for g, _ in children]
        for (g, _), look in zip(children, looks, strict=True):
            g.last = [look]
        out = [g for g, _ in children]
        if any(looks) and not all(looks):
            self.reserve += [(0, g) for g, look in zip(out, looks, strict=True) if not look]
            out = [g for g, look in zip(out, looks, strict=True) if look]
        if len(out) > 1:
            self.forks += 1
            supported = [g for g in out if g.supported]
            if supported:
                self.reserve += [(1, g) for g in out if g is not supported[0]]
                out = supported[:1]
        return out

    def _module(self, h: Hypothesis, vid: int) -> str:
        node = h.tape.values[vid].node
        return h.tape.nodes[node].module if node >= 0 else h.tape.values[vid].name

    def _candidates(self, h: Hypothesis, vid: int) -> list[tuple[Match, float, int]]:
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
            ids = t.ids if t.ids is not None else (t.site.w if t.site is not None else None)
            if ids is None:
                continue
            for n in (int(ids.max()), int(ids[ids > 0].min()) if bool((ids > 0).any()) else 0):
                if n:
                    names.add(h.owner(n)[1])
        return names - {""}

    def _unified(self, h: Hypothesis, terms: list[Term], shape: tuple[int, ...], vid: int) -> list[tuple[Match, float, int]]:
        ref = self.reference
        found: list[tuple[Match, float, int]] = []
        seen: set[tuple[Any, ...]] = set()
        n = math.prod(shape)
        for start, values in self._meeting(h, terms):
            for group in self._nearest(values, n):
                best: list[tuple[Match, float, int]] = []
                for y in group:
                    try:
                        theirs = ref.terms(y)
                    except NotAffine:
                        continue
                    size = math.prod(ref.tape.values[y].shape)
                    for m in unify(terms, shape, theirs, ref.tape.values[y].shape):
                        key = _key(m)
                        if key not in seen:
                            seen.add(key)
                            best.append((m, self._score(h, m) - m.penalty - (0.0 if size == n else 0.5), start))
                found += best
                if any(b[0].penalty == 0 and b[0].missing == 0 for b in best):
                    break
        if any(f[0].missing == 0 for f in found):
            found = [f for f in found if f[0].missing == 0] + [f for f in found if f[0].missing]
        found.sort(key=lambda f: (f[0].missing, -f[1]))
        return found[:WIDTH]

    def _nearest(self, values: list[int], n: int) -> list[list[int]]:
        """Values of the reference in the order in which they are worth a try: ends of the same size, others of it, larger."""
        values_of = self.reference.tape.values
        equal = [y for y in values if math.prod(values_of[y].shape) == n]
        ends = [y for y in equal if self.reference.is_end(y)]
        larger = [y for y in values if math.prod(values_of[y].shape) > n]
        smaller = [y for y in values if math.prod(values_of[y].shape) < n]
        return [g for g in (ends, [y for y in equal if y not in ends], larger, smaller) if g]

    def _meeting(self, h: Hypothesis, terms: list[Term]) -> list[tuple[int, list[int]]]:
        """Where in the reference to look: (a node, the values that follow from it)."""
        ref = self.reference
        out: list[tuple[int, list[int]]] = []
        products = [t for t in terms if live(t)]
        if products:
            lead = products[0]
            assert lead.site is not None
            rows = present_rows(lead)
            for i in ref.products:
                node = ref.tape.nodes[i]
                try:
                    sites = {id(t.site): t.site for t in ref.terms(node.outs[0]) if t.kind == "product" and t.site}
                except NotAffine:
                    continue
                if any(match_sites(lead.site, s, rows) is not None for s in sites.values() if s is not None):
                    out.append((i, ref.closure([node.outs[0]])))
            return out
        scales = [t for t in terms if t.kind == "scale"]
        if scales:
            f = fingerprint(h.known(scales[0].vid)) if scales[0].vid >= 0 else None  # type: ignore[arg-type]
            twins = set(ref.index.find(f))
            for i in ref.scales:
                node = ref.tape.nodes[i]
                if any(v in twins for v in node.inputs):
                    out.append((i, ref.closure([node.outs[0]])))
            return out
        total: Tensor | None = None
        for t in terms:
            if t.kind == "known" and t.value is not None:
                total = t.coef * t.value if total is None else total + t.coef * t.value
        if total is not None and bool((total != 0).any()):
            for y in ref.index.find(fingerprint(total)):
                out.append((y, ref.closure([y])))
            return out
        return [(y, [y]) for y in ref.pure]

    def _score(self, h: Hypothesis, m: Match) -> float:
        score = 0.0
        for t, s in self._names(h, m):
            score += 8.0 if _pattern(s) in h.template.get(_pattern(t), ()) else 0.0
            score += self.prior(t, s)
        if any(k in h.used for k in _firsts(m)):
            score -= 12.0
        return score

    def _names(self, h: Hypothesis, m: Match) -> list[tuple[str, str]]:
        pairs = []
        for a in m.assignments:
            if a.sources and a.target.numel():
                t = h.owner(int(a.target[0]))[1]
                s = self.reference.owner(int(a.sources[0][0]))[1]
                if t and s:
                    pairs.append((t, s))
        return pairs

    def _remember(self, h: Hypothesis, m: Match, of: int, node: int) -> None:
        pairs = self._names(h, m)
        fresh = not any(k in h.used for k in _firsts(m))
        h.supported = fresh and bool(pairs) and all(_pattern(s) in h.template.get(_pattern(t), ()) for t, s in pairs)
        h.used.update(_firsts(m))
        for t, s in pairs:
            h.template[_pattern(t)] = h.template.get(_pattern(t), frozenset()) | {_pattern(s)}
        if pairs:
            module = self.reference.tape.nodes[node].module if node >= 0 else ""
            h.choices.append(Choice(tuple(t for t, _ in pairs), tuple(s for _, s in pairs), of, module))


def _firsts(m: Match) -> list[int]:
    return [int(a.sources[0][0]) for a in m.assignments if a.sources and a.target.numel()]


def _pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def _key(m: Match) -> tuple[Any, ...]:
    """Two matches that settle the same elements in the same way are one."""
    parts = []
    for a in m.assignments:
        if a.target.numel() == 0:
            continue
        w = torch.arange(1, a.target.numel() + 1, dtype=torch.float64)
        parts.append((float((a.target * w).sum()), tuple(float((s * w).sum()) for s in a.sources)))
    return tuple(sorted(parts))


__all__ = ["Bound", "Choice", "Hypothesis", "Reference", "Search", "Fingerprint", "Value", "base", "overlay", "tree_map", "Ref"]
