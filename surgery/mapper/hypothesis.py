"""A target program in which some weights are settled."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import twin
from surgery.mapper.affine import Affine, NotAffine
from surgery.mapper.align import function
from surgery.mapper.bound import Bound, Piece
from surgery.mapper.grid import Grid, axes, cut
from surgery.mapper.kinds import PARTS, base
from surgery.mapper.parts import Part
from surgery.mapper.record import PERMUTING, Fingerprint, Node, Tape, fingerprint
from surgery.mapper.reference import Reference
from surgery.mapper.repeat import Recipe, numbers, pattern
from surgery.mapper.terms import Site, Term, cells, compact
from surgery.mapper.unify import Assignment, live

aten = torch.ops.aten


@dataclass
class Choice:
    """A decision, for the person who asks why."""

    weights: tuple[str, ...]
    sources: tuple[str, ...]
    of: int  # how many ways there were
    module: str


FORKED = (
    "env", "bound", "recipes", "constant", "template", "where", "virtual", "grids", "unknown", "hopeless", "prints",
    "tables", "passed", "stood",
)  # fmt: skip
SHELVED = 1 << 20  # elements of activations that a hypothesis put aside may hold
HELD = 1 << 16  # elements of a value made of weights that is held; a larger one is made again where it is needed


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
        self.used: list[Grid] = []  # source elements that have found their place
        self.tainted: set[int] = set()
        self.folds: set[int] = set()  # products of two values whose constant factor a weight has taken
        self.folded: set[int] = set()  # values that are the reference's times such a factor
        self.at = 0
        self.score = 0.0
        self.hits = 0
        self.misses = 0
        self.swapped = False
        self.spreads = False  # has a scale of the reference been folded into a weight?
        self.passed: dict[int, int] = {}  # values of which so many ways to settle them were tried before
        self.spread_at = -1  # a value for which that is to be tried, on taking the hypothesis up again
        self.choices: list[Choice] = []
        self.template: dict[str, frozenset[str]] = {}  # a name without its numbers -> those that it came from before
        self.recipes: dict[
            tuple[object, ...], tuple[Recipe, ...]
        ] = {}  # how values were settled, for those of the next block
        self.searched: frozenset[int] = frozenset()  # values for which no recipe may be used
        self.on_shelf = False  # put aside without its activations
        self.gone: set[int] = set()  # activations that nothing needs any more
        self.supported = False
        self.prints: dict[int, Fingerprint | None] = {}  # of the values that were looked at
        self.tables: dict[tuple[object, ...], Tensor] = {}  # products with settled columns, by node and piece
        self.last: list[bool | None] = []
        self.where: dict[int, int] = {}  # target value -> reference value that it was found equal to
        self.stood: dict[int, int] = {}  # a departure's hole -> the reference's value that was put there
        self.stuck = ""  # the first module for whose weights nothing in the reference fits
        self.parted = ""  # the first module whose input occurs in the reference and whose output does not
        self.version = 0
        self.unknown: dict[int, int] = {}
        self.hopeless: dict[int, tuple[int, bool]] = {}
        self.memo_at = (0, 0)
        self.kept = frozenset(tape.outputs())
        for vid, v in enumerate(tape.values):
            if v.origin in ("input", "const") and v.tensor is not None:
                self.env[vid] = v.tensor

    def fork(self) -> Hypothesis:
        new = copy.copy(self)
        for name in FORKED:
            setattr(new, name, dict(getattr(self, name)))
        new.tainted, new.used, new.choices, new.memo = set(self.tainted), list(self.used), list(self.choices), {}
        new.gone = set(self.gone)
        new.folds, new.folded = set(self.folds), set(self.folded)
        return new

    # -- values -------------------------------------------------------------------------------------------------------
    def terms(self, vid: int, root: bool = True) -> list[Term]:
        if self.memo_at != (self.version, self.at):  # what is known has changed
            self.memo.clear()
            self.memo_at = (self.version, self.at)
        found = super().terms(vid, root)
        return [self._told(t) for t in found] if root else found

    def part_terms(self, vid: int, part: Part) -> list[Term]:
        """The sum that a part of a value is."""
        return [self._told(t) for t in part.of(self.terms(vid))]

    def _weight_terms(self, vid: int) -> list[Term]:
        v = self.tape.values[vid]
        if v.origin == "param" and v.name in self.constant:
            return [Term("known", 1.0, value=self.constant[v.name], vid=vid)]
        return super()._weight_terms(vid)

    def known(self, vid: int) -> Tensor | None:
        value = self.computed_value(vid)
        v = self.tape.values[vid]
        if value is not None or v.origin != "node" or vid in self.tainted or self.unknown.get(vid) == self.version:
            return value
        node = self.tape.nodes[v.node]
        partly = not self._hopeless(vid) and self._within(vid) and self.kind(node) in ("layout", "sum", "product")
        if partly and (value := self._partly(vid)) is not None:
            self.env[vid] = value
            return value
        if all(self.known(i) is not None for i in node.inputs):
            return self.compute(node)[v.out]
        self.unknown[vid] = self.version
        return None

    def computed_value(self, vid: int) -> Tensor | None:
        if vid in self.env:
            return self.env[vid]
        v = self.tape.values[vid]
        if vid in self.tainted:
            return None
        if v.origin == "param":
            return self.value_of(v.name)
        if v.origin != "node" or not self._able(vid, {}):
            return None
        return self.compute(self.tape.nodes[v.node])[v.out]

    def _able(self, vid: int, seen: dict[int, bool]) -> bool:
        """Is all that it is computed from known? Looks only; computes nothing."""
        if vid in self.env:
            return True
        if vid not in seen:
            v = self.tape.values[vid]
            seen[vid] = False
            if v.origin == "param":
                seen[vid] = self.ready(vid)
            elif v.origin == "node" and vid not in self.tainted:
                seen[vid] = all(self._able(i, seen) for i in self.tape.nodes[v.node].inputs)
        return seen[vid]

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

    def _within(self, vid: int) -> bool:
        """Of a large value made of weights: does it lie in what is settled of it? False only where surely not."""
        if not self.weight_only(vid) or math.prod(self.tape.values[vid].shape) <= HELD or (g := self.grid(vid)) is None:
            return True
        held = self.holder(g.lo)
        if held is None or g.hi >= held[0] + held[1]:
            return True
        b = self.bound.get(held[2])
        if b is None or b.covered < g.numel():
            return False
        box = axes(g.shifted(-held[0]), b.shape)
        if box is None or any(p.masks is None for p in b.pieces):
            return True
        settled = [
            math.prod(int(m[x].sum()) for m, x in zip(p.masks, box, strict=True))
            for p in b.pieces
            if p.masks is not None
        ]
        return sum(settled) == g.numel()

    def _partly(self, vid: int) -> Tensor | None:
        """A value that meets only the settled elements of a tensor that is settled in part (rows of a table)."""
        self.unknown[vid] = self.version  # the terms ask for what is known, and must not come back here
        try:
            terms = self.terms(vid)
        except NotAffine:
            return None
        return self.total(terms, self.tape.values[vid].shape)

    def total(self, terms: list[Term], shape: tuple[int, ...]) -> Tensor | None:
        """The value of a sum of which all is known."""
        if not all(t.kind == "known" and t.value is not None for t in terms):
            return None
        total = torch.zeros(shape, dtype=torch.float64)
        for t in terms:
            total = total + t.coef * t.value  # type: ignore[operator]
        return total

    def value_of(self, name: str) -> Tensor | None:
        """A tensor of the target as it is settled, in the type that it is stored in."""
        if name in self.constant:
            return self.constant[name]
        b = self.bound.get(name)
        return b.value(self.reference.fetch) if b is not None and b.full else None

    def _told(self, t: Term) -> Term:
        """A term whose weights are all settled is known. One that meets settled and open ones stays: they are settled
        together, and what is settled must agree."""
        if t.kind == "known" and t.value is not None and t.value.dtype in twin.LOW:
            return Term("known", t.coef, value=twin.lift(t.value), vid=t.vid)
        if t.kind not in ("weight", "scale") or t.ids is None or not self.bound:
            return t
        value, done = self._settled(compact(t.ids))
        if not bool(done.all()):
            return t
        value = value.expand(t.ids.shape)
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
            ids, more = b.lookup(flat[where] - first)
            total = self.reference.values_of(ids.clamp_min(0))
            for extra in more:
                total = total + self.reference.values_of(extra)
            value[where] = total
            done[where] = ids != 0
        return value.reshape(numbers.shape), done.reshape(numbers.shape)

    def _product(self, node: Node, index: int, shape: tuple[int, ...]) -> list[Term]:
        """A product whose matrix is settled in some columns is known there."""
        out = []
        for t in super()._product(node, index, shape):
            if t.site is None:
                out.append(t)
                continue
            assert t.row is not None
            assert t.col is not None
            if not live(t):  # zero times anything
                out.append(Term("known", t.coef, value=torch.zeros(shape, dtype=torch.float64)))
                continue
            if t.site.conv:
                column, y = self._settled_kernel(t.site)
            else:
                column, y = self._settled_columns(t.site, t.row, t.col)
            done = torch.cat([torch.zeros(1, dtype=torch.bool), column])[compact(t.col).to(torch.int64)]
            if y is None or not bool(done.any()):
                out.append(t)
                continue
            if bool(done.all()) and bool((compact(t.row) > 0).all()):
                out.append(Term("known", t.coef, value=y))
                continue
            done = done.expand(shape)
            out.append(Term("known", t.coef, value=torch.where(done & (t.row > 0), y, 0.0)))
            row, col = torch.where(done, 0.0, t.row), torch.where(done, 0.0, t.col)
            if bool((row > 0).any()):
                out.append(Term("product", t.coef, site=t.site, row=row, col=col))
        return out

    def _settled_kernel(self, site: Site) -> tuple[Tensor, Tensor | None]:
        """(which output channels of a convolution are settled, the convolution with those)."""
        names = {self.owner(n)[1] for n in (site.w.lo, site.w.hi)}
        if names == {""} or not any(n in self.bound for n in names):
            return torch.zeros(site.kernel().shape[0], dtype=torch.bool), None
        value, done = self._settled(site.w.dense())
        column = (
            self._settled(site.kernel().dense())[1].flatten(1).all(1) if site.transposed else done.flatten(1).all(1)
        )
        if not bool(column.any()):
            return column, None
        geometry = (list(g) if isinstance(g, tuple) else g for g in site.geometry)
        return column, aten.convolution.default(site.x, value, None, *geometry)

    def _settled_columns(self, site: Site, row: Tensor, col: Tensor) -> tuple[Tensor, Tensor | None]:
        """(which columns of a matrix are settled, the elements of the product with those)."""
        column, y = torch.zeros(site.w.shape[1], dtype=torch.bool), None
        held = self.holder(site.w.lo)
        if held is not None and site.w.hi < held[0] + held[1]:
            b = self.bound.get(held[2])
            if b is None:
                return column, None
            local = site.w.shifted(-held[0])
            told = [piece_columns(p, local) for p in b.pieces]
            if all(c is not None for c in told):
                for p, c in zip(b.pieces, told, strict=True):
                    if c is None or not bool(c.any()):
                        continue
                    table = self._table(site, p, local, c)
                    place = torch.cat([torch.zeros(1, dtype=torch.int64), torch.cumsum(c.to(torch.int64), 0)])
                    at = compact(col).to(torch.int64)
                    mine = cells(table, row, place[at].expand(col.shape))
                    here = torch.cat([torch.zeros(1, dtype=torch.bool), c])[at]
                    y = mine if y is None else torch.where(here, mine, y)
                    column = column | c
                return column, y
        elif not any(h[2] in self.bound for n in (site.w.lo, site.w.hi) if (h := self.holder(n)) is not None):
            return column, None
        value, done = self._settled(site.w.dense())
        seen = torch.unique(compact(row).to(torch.int64))
        idle = ~(site.x[seen[seen > 0] - 1] != 0).any(0)  # zero times anything: the first step of a recurrence
        column = (done | idle.unsqueeze(1)).all(0)
        if not bool(column.any()):
            return column, None
        return column, cells(site.x @ torch.where(column, value, 0.0), row, col)

    def _table(self, site: Site, piece: Piece, local: Grid, column: Tensor) -> Tensor:
        """The product of a site's rows with those of its columns that a piece settles."""
        key = (site.node, site.w.key(), id(piece))
        if key not in self.tables:
            part = local.take(1, torch.nonzero(column).flatten())
            if not piece.sources:
                matrix = torch.zeros(part.shape, dtype=torch.float64)
            elif len(piece.sources) == 1 and part.same(piece.at):
                matrix = self.reference.fetch(piece.sources[0])
            else:
                matrix, _ = self._settled(part.shifted(self.holder(site.w.lo)[0]).dense())  # type: ignore[index]
            self.tables[key] = site.x @ twin.lift(matrix)
        return self.tables[key]

    def compute(self, node: Node) -> list[Tensor]:
        """Run the node on what is known, and hold what it gives."""
        found = self.run(node, {})
        outs = list(found) if isinstance(found, (tuple, list)) else [found]
        for k, (vid, t) in enumerate(zip(node.outs, outs, strict=True)):
            if vid >= 0 and isinstance(t, Tensor):
                if self.tape.values[vid].data:
                    outs[k] = t = twin.lift(t)
                elif t.numel() > HELD and self.weight_only(vid):
                    continue
                self.env[vid] = t
        return outs

    def open_names(self, vid: int) -> list[str]:
        """The open tensors that a value is made of directly, by pattern and then by number."""
        found: dict[str, None] = {}
        queue, seen = [vid], {vid}
        while queue:
            v = queue.pop()
            value = self.tape.values[v]
            if value.origin == "param":
                if not self.ready(v):
                    found[value.name] = None
            elif value.origin == "node" and v not in self.env and v not in self.tainted:
                queue += [i for i in self.tape.nodes[value.node].inputs if i not in seen]
                seen.update(self.tape.nodes[value.node].inputs)
        return sorted(found, key=lambda n: (pattern(n), numbers(n)))

    def release(self, node: Node) -> None:
        """Let go of activations that every consumer has seen."""
        queue = [i for i in node.inputs if i in self.env]
        while queue:
            vid = queue.pop()
            value = self.tape.values[vid]
            if not value.data or value.origin != "node" or vid in self.kept:
                continue
            if not all(self._done(c) for c in self.tape.consumers[vid]):
                continue
            self.env.pop(vid, None)
            self.gone.add(vid)
            for key in [k for k in self.tables if k[0] == value.node]:
                del self.tables[key]
            queue += [i for i in self.tape.nodes[value.node].inputs if i not in self.gone]

    def shelve(self) -> None:
        """Put aside: what can be computed again need not be held, where it is much."""
        again = [v for v in self.env if self.tape.values[v].data and self.tape.values[v].origin == "node"]
        if sum(self.env[v].numel() for v in again) > SHELVED:
            for v in again:
                del self.env[v]
            self.tables, self.memo, self.on_shelf = {}, {}, True

    def restore(self) -> None:
        """Compute again what was let go of, as far as the program had come."""
        if not self.on_shelf:
            return
        self.on_shelf, self.gone, self.unknown = False, set(), {}
        for node in self.tape.nodes[: self.at]:
            outs = [o for o in node.outs if o >= 0]
            wanted = any(self.tape.values[o].data and o not in self.env and o not in self.tainted for o in outs)
            if wanted and node.op != "sync" and all(self._able(i, {}) for i in node.inputs):
                self.compute(node)
                self.release(node)

    def _done(self, index: int) -> bool:
        """Is all that a node gives known, or beyond help?"""
        if index > self.at:
            return False
        outs = [o for o in self.tape.nodes[index].outs if o >= 0]
        return all(o in self.env or o in self.gone or o in self.tainted for o in outs)

    def taint(self, node: Node) -> None:
        self.tainted.update(o for o in node.outs if o >= 0)

    # -- settling weights ---------------------------------------------------------------------------------------------
    def settle(self, assignments: list[Assignment]) -> bool:
        """Write assignments down. False where one contradicts what is settled."""
        for a in assignments:
            target, sources = a.target, a.sources
            if not target.numel():
                continue
            if not target.injective:
                pairs = [function(target.flat(), s.flat()) for s in sources]
                if any(p is None for p in pairs):
                    return False
                kept = [p for p in pairs if p is not None]
                target = Grid.of(kept[0][0] if kept else torch.unique(target.flat()))
                sources = [Grid.of(p[1]) for p in kept]
            if not self._place(target, sources):
                return False
        return True

    def _place(self, target: Grid, sources: list[Grid]) -> bool:
        """Distinct target elements, in one tensor or in several."""
        held = self.holder(target.lo)
        if held is not None and target.hi < held[0] + held[1]:
            first, _, name = held
            return self._write(name, target.shifted(-first), sources)
        for key, u in list(self.virtual.items()):
            if u.offset <= target.lo and target.hi < u.offset + u.size:
                return self._solve(key, target.flat() - u.offset, [s.flat() for s in sources])
        parted = cut(target, self.spans())
        if parted is not None and len(parted[1]) > 1:
            axis, runs = parted
            return all(
                self._place(target.narrow(axis, at, n), [s.narrow(axis, at, n) for s in sources]) for at, n in runs
            )
        flat = target.flat()
        edges = torch.tensor(sorted(self.spans()))
        who = torch.bucketize(flat, edges, right=True)
        if len(torch.unique(who)) < 2:
            return False
        for k in torch.unique(who).tolist():
            here = who == k
            if not self._place(Grid.of(flat[here]), [Grid.of(s.flat()[here]) for s in sources]):
                return False
        return True

    def _write(self, name: str, at: Grid, sources: list[Grid]) -> bool:
        shape = self.tape.values[self.tape.params[name]].shape
        old = self.bound.get(name, Bound(shape))
        new = old.with_piece(Piece(at, tuple(sources), shape))
        if new is None:
            return False
        if new is not old:
            self.bound[name] = new
            self.version += 1
        return True

    def _solve(self, key: tuple[int, str], at: Tensor, sources: list[Tensor]) -> bool:
        """A computed weight (weight norm, exp ...) must equal source elements: settle what it is computed from."""
        from surgery.mapper.invert import solve

        return solve(self, self.virtual[key], at, sources)

    def keep_own(self, names: Iterable[str]) -> None:
        """These tensors are constants of the target."""
        for n in names:  # a large one stays in the type that it is stored in: mostly a slice of it is used
            own = self.own[n]
            self.constant[n] = own if own.numel() > HELD else own.to(torch.float64)
            self.version += 1

    def mark(self) -> tuple[dict[str, Bound], int]:
        """What is settled now, to go back to."""
        return dict(self.bound), self.version

    def back_to(self, mark: tuple[dict[str, Bound], int]) -> None:
        """Forget what was settled since. The version goes on: what was asked meanwhile was asked of another state."""
        self.bound = dict(mark[0])
        self.version += 1

    def settled_as(self, numbers: Tensor, sources: Tensor) -> bool:
        """Are these elements of one tensor settled, and to just these source elements?"""
        held = self.holder(int(numbers.min()))
        bound = self.bound.get(held[2]) if held is not None else None
        if held is None or bound is None or int(numbers.max()) >= held[0] + held[1]:
            return False
        ids, more = bound.lookup(numbers - held[0])
        return bool((ids == sources).all()) and not any(bool(m.any()) for m in more)

    def has_place(self, number: int) -> bool:
        """Has this source element found its place in the target?"""
        return any(number in g for g in self.used)

    # -- evidence -----------------------------------------------------------------------------------------------------
    def look(self, vid: int, like: int = -1) -> bool | None:
        """Does this value occur in the reference, or are its rows among those of `like` there? None where it could tell
        nothing."""
        if vid in self.tainted:
            return False
        v = self.tape.values[vid]
        t = self.env.get(vid)
        if t is None or not v.data:
            return None
        f = self._fingerprint(vid, t)
        if f is None:
            return None
        found = self.reference.index.find(f)
        if found:
            self.where[vid] = found[0]
            self.hits += 1
        elif self.reference.slices(t.numel()).find(f) or (like >= 0 and self.reference.holds_rows(like, t)):
            self.hits += 1
            return True
        else:
            self.misses += 1
        return bool(found)

    def _fingerprint(self, vid: int, t: Tensor) -> Fingerprint | None:
        """A value that is another one moved has its fingerprint."""
        node = self.tape.nodes[self.tape.values[vid].node]
        one = node.inputs[0] if len(node.inputs) == 1 else -1
        if one in self.prints and base(node.op) in PERMUTING and t.numel() == math.prod(self.tape.values[one].shape):
            self.prints[vid] = self.prints[one]
        else:
            self.prints[vid] = fingerprint(t)
        return self.prints[vid]


def piece_columns(piece: Piece, matrix: Grid) -> Tensor | None:
    """Which columns of a matrix (positions in the piece's tensor) lie in the piece; None where that is not plain, or
    where it holds parts of columns."""
    box = axes(matrix, piece.shape)
    if box is None or piece.masks is None:
        return None
    inside = torch.ones(1, matrix.shape[1], dtype=torch.bool)
    for mask, x in zip(piece.masks, box, strict=True):
        told = mask[x]
        whole = told.all(0, keepdim=True)
        if not bool((whole == told.any(0, keepdim=True)).all()):
            return None if bool(inside.any()) else inside.reshape(-1)
        inside = inside & whole
    return inside.reshape(-1)
