"""A target program in which some weights are settled."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from surgery.mapper.affine import Affine, NotAffine, base
from surgery.mapper.record import Node, Tape, fingerprint
from surgery.mapper.reference import Reference
from surgery.mapper.terms import Term
from surgery.mapper.unify import Assignment, live

aten = torch.ops.aten


PARTS = frozenset(
    {"slice", "split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "select", "unbind", "chunk"}
    | {"unsafe_chunk", "index", "index_select"}
)  # layouts that keep some of the elements


@dataclass
class Bound:
    """What is settled of a target tensor: for each element the source number (0 open, -1 zero), and further addends."""

    ids: Tensor
    more: list[Tensor] = field(default_factory=list)

    @cached_property
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
        self.stuck = ""  # the first module for whose weights nothing in the reference fits
        self.parted = ""  # the first module whose input occurs in the reference and whose output does not
        self.version = 0
        self.unknown: dict[int, int] = {}
        self.hopeless: dict[int, tuple[int, bool]] = {}
        for vid, v in enumerate(tape.values):
            if v.origin in ("input", "const") and v.tensor is not None:
                self.env[vid] = v.tensor

    def fork(self) -> Hypothesis:
        new = copy.copy(self)
        for name in ("env", "bound", "constant", "template", "where", "virtual", "unknown", "hopeless"):
            setattr(new, name, dict(getattr(self, name)))
        new.tainted, new.used, new.choices, new.memo = set(self.tainted), set(self.used), list(self.choices), {}
        return new

    # -- values -------------------------------------------------------------------------------------------------------
    def terms(self, vid: int, root: bool = True) -> list[Term]:
        self.memo.clear()
        found = super().terms(vid, root)
        return [self._told(t) for t in found] if root else found

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
        if self._hopeless(vid):
            self.unknown[vid] = self.version
            return None
        if self.kind(node) in ("layout", "sum", "product") and (value := self._partly(vid)) is not None:
            self.env[vid] = value
            return value
        self.unknown[vid] = self.version
        return None

    def ready(self, vid: int) -> bool:
        """Is it known, or made of settled weights only? Asked at every step, so it computes nothing."""
        if vid in self.env:
            return True
        v = self.tape.values[vid]
        if v.origin == "param":
            return v.name in self.constant or (v.name in self.bound and self.bound[v.name].full)
        if v.origin != "node" or v.data:
            return False
        return all(self.ready(i) for i in self.tape.nodes[v.node].inputs)

    def _hopeless(self, vid: int) -> bool:
        """Does it meet a weight of which nothing is settled? (A product with rows of zeros meets none.)"""
        if vid in self.env:
            return False
        v = self.tape.values[vid]
        if v.origin == "param":
            return v.name not in self.bound and v.name not in self.constant
        if v.origin != "node":
            return True
        if self.hopeless.get(vid, (-1, False))[0] == self.version:
            return self.hopeless[vid][1]
        found = self._meets_open(self.tape.nodes[v.node])
        self.hopeless[vid] = (self.version, found)
        return found

    def _meets_open(self, node: Node) -> bool:
        if base(node.op) in PARTS:  # what it leaves out may be what is open
            return False
        if self.kind(node) == "product":
            data = [i for i in node.inputs if not self.weight_only(i)]
            x = self.env.get(data[0]) if data else None
            if x is not None and not bool((x != 0).any()):
                return False
        return any(self._hopeless(i) for i in node.inputs if self.tape.values[i].dtype.is_floating_point)

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

    def _told(self, t: Term) -> Term:
        """A term whose weights are all settled is known. One that meets settled and open ones stays: they are settled
        together, and what is settled must agree."""
        if t.kind not in ("weight", "scale") or t.ids is None or not self.bound:
            return t
        value, done = self._settled(t.ids)
        if not bool(done.all()):
            return t
        if t.kind == "scale":
            assert t.value is not None
            value = value * t.value
        return Term("known", t.coef, value=value, vid=t.vid)

    def _settled(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """(values in float64, is it settled?) of weight elements; what is no weight counts as settled, and zero."""
        flat = numbers.reshape(-1).to(torch.int64)
        value, done = torch.zeros(len(flat), dtype=torch.float64), flat == 0
        for first, _, name, where in self.holders(flat):
            b = self.bound.get(name)
            if b is None:
                continue
            at = flat[where] - first
            part = Bound(b.ids[at], [m[at] for m in b.more])
            value[where] = self._gather(part)
            done[where] = part.ids != 0
        return value.reshape(numbers.shape), done.reshape(numbers.shape)

    def _product(self, node: Node, index: int, shape: tuple[int, ...]) -> list[Term]:
        """A product whose matrix is settled in some columns is known there."""
        out = []
        for t in super()._product(node, index, shape):
            assert t.site is not None
            assert t.row is not None
            assert t.col is not None
            if not live(t):  # zero times anything
                out.append(Term("known", t.coef, value=torch.zeros(shape, dtype=torch.float64)))
                continue
            value, done = self._settled(t.site.w)
            column = done.flatten(1).all(1) if t.site.conv else done.all(0)
            if not bool(column.any()):
                out.append(t)
                continue
            settled = torch.cat([torch.zeros(1, dtype=torch.bool), column])[t.col.to(torch.int64)]
            if t.site.conv:
                y = aten.convolution.default(
                    t.site.x, value, None, *(list(g) if isinstance(g, tuple) else g for g in t.site.geometry)
                )
            else:
                table = t.site.x @ torch.where(column, value, 0.0)
                y = table[(t.row.to(torch.int64) - 1).clamp_min(0), (t.col.to(torch.int64) - 1).clamp_min(0)]
            here = settled & (t.row > 0)
            out.append(Term("known", t.coef, value=torch.where(here, y, 0.0)))
            if not bool(column.all()):
                out.append(
                    Term(
                        "product",
                        t.coef,
                        site=t.site,
                        row=torch.where(settled, 0.0, t.row),
                        col=torch.where(settled, 0.0, t.col),
                    )
                )
        return out

    def weight_matrix(self, vid: int) -> Tensor:
        """The numbers of a matrix, also where it is settled in part (a tied table): what is settled must agree."""
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
                if bool(here.any()) and not self._write(
                    name, size, a.target[here] - first, [s[here] for s in a.sources]
                ):
                    return False
            if hi >= self.real_end:
                for key, u in list(self.virtual.items()):
                    here = (a.target >= u.offset) & (a.target < u.offset + u.size)
                    if bool(here.any()) and not self._solve(
                        key, a.target[here] - u.offset, [s[here] for s in a.sources]
                    ):
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
        """A computed weight (weight norm, exp ...) must equal source elements: settle what it is computed from."""
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
        elif self.reference.slices.find(f):
            self.hits += 1
            return True
        else:
            self.misses += 1
        return bool(found)
