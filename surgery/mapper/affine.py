"""Values as sums of terms that are linear in the weights, element by element.

Between two operations that are not linear in the weights, every program is a sum: a product of known rows with a
weight matrix, a scale times a known value, a bias, a table row, and what is known already. `Affine.terms(value)` gives
that sum with, for every element of the value, the number of the weight element that stands in it. Layout operators
(views, transposes, splits, concatenations) only move these numbers, so that fused and split, transposed and stacked
spellings of one function come to the same thing, and a mapping between two programs can be read off where sums meet.

Weight elements are numbered from 1 through all tensors of a program; 0 is "no weight here". The numbers travel as
float64 (exact to 2**53), because every layout operator knows float64.
"""

from __future__ import annotations

import bisect
import math
from abc import ABC, abstractmethod
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery import twin
from surgery.mapper.grid import Grid
from surgery.mapper.kinds import PARTS, REARRANGED, VIEWS, Kinds, base
from surgery.mapper.record import Node, Ref, Tape
from surgery.mapper.terms import Site, Term, Virtual, compact, informative

aten = torch.ops.aten


class NotAffine(Exception):
    """The value is not a sum of terms linear in the weights."""


class Affine(Kinds, ABC):
    """Reads a tape as sums. `known(vid)` gives a value that needs no weights any more, or None."""

    STOPS = frozenset({"barrier", "scale"})  # operations at whose arguments a sum of the reference ends

    def __init__(self, tape: Tape, *, cut: bool) -> None:
        super().__init__(tape)
        self.cut = cut  # the reference: a value that a non-linear operation consumes is an addend of its own
        self.offset: dict[int, int] = {}
        self.names: list[tuple[int, int, str]] = []  # (first number, size, name)
        n = 1
        for vid in sorted(set(tape.params.values())):
            size = math.prod(tape.values[vid].shape)
            self.offset[vid] = n
            self.names.append((n, size, tape.values[vid].name))
            n += size
        self.firsts = [first for first, _, _ in self.names]
        self.real_end = n
        self.next = n
        self.virtual: dict[tuple[int, str], Virtual] = {}
        self.grids: dict[int, Grid | None] = {}
        self.memo: dict[int, list[Term]] = {}
        self.ends: dict[int, bool] = {}
        self.bare: dict[int, bool] = {}

    def grid(self, vid: int) -> Grid | None:
        """The numbers of a value that is weights moved about, or computed weights; None for any other."""
        if vid not in self.grids:
            self.grids[vid] = self._grid(vid)
        return self.grids[vid]

    def _grid(self, vid: int) -> Grid | None:
        v = self.tape.values[vid]
        if v.origin == "param":
            return Grid.whole(self.offset[vid], v.shape)
        if v.origin != "node" or not self.weight_only(vid):
            return None
        node = self.tape.nodes[v.node]
        kind = self.kind(node)
        if kind == "virtual":
            return Grid.whole(self.virtual_of(vid).offset, v.shape)
        return self._moved_grid(node, v.out) if kind == "layout" else None

    def _moved_grid(self, node: Node, out: int) -> Grid | None:
        name = base(node.op)
        if name == "cat":
            parts = [self.grid(r.vid) for r in node.args[0]]
            if any(p is None for p in parts):
                return None
            axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            return Grid.cat([p for p in parts if p is not None], axis)
        moved = node.args[1] if name == "copy" else node.args[0] if node.args else None
        floats = [i for i in node.inputs if self.tape.values[i].dtype.is_floating_point]
        if not isinstance(moved, Ref) or floats != [moved.vid]:
            return None
        g = self.grid(moved.vid)
        if g is None:
            return None
        if name in ("clone", "_to_copy", "copy", "detach", "alias", "lift_fresh", "contiguous"):
            return g if g.shape == self.tape.values[node.outs[out]].shape else None
        if name in ("view", "_unsafe_view", "reshape", "view_copy"):
            return g.reshape(*self.tape.values[node.outs[out]].shape)
        if name in VIEWS and not node.kwargs:

            def view(t: Tensor) -> Tensor:
                y = node.op(t, *node.args[1:])
                return y[out] if isinstance(y, (tuple, list)) else y

            return g.viewed(view)
        if name == "flip":
            for axis in node.args[1]:
                g = g.take(axis, torch.arange(g.shape[axis] - 1, -1, -1))
            return g
        try:
            y = self.run(node, {moved.vid: g.dense().to(torch.float64)})
        except NotAffine:
            return None
        return Grid.of(y[out] if isinstance(y, (tuple, list)) else y)

    def virtual_of(self, vid: int, how: str = "") -> Virtual:
        key = (vid, how)
        if key not in self.virtual:
            size = math.prod(self.tape.values[vid].shape)
            self.virtual[key] = Virtual(vid, self.next, size, how)
            self.next += size
        return self.virtual[key]

    def holders(self, flat: Tensor) -> list[tuple[int, int, str, Tensor | slice]]:
        """Which tensors hold these elements: (first number, size, name, where in `flat`); no virtual ones."""
        if not flat.numel():
            return []
        edges = torch.tensor([*self.firsts, self.real_end])
        who = torch.bucketize(flat, edges, right=True)
        counts = torch.bincount(who, minlength=len(edges) + 1)
        out: list[tuple[int, int, str, Tensor | slice]] = []
        for k in torch.nonzero(counts).flatten().tolist():
            if 0 < k <= len(self.names):
                first, size, name = self.names[k - 1]
                out.append((first, size, name, slice(None) if int(counts[k]) == len(flat) else who == k))
        return out

    def holder(self, number: int) -> tuple[int, int, str] | None:
        """(first number, size, name) of the tensor that holds an element; None for a virtual one."""
        k = bisect.bisect_right(self.firsts, number) - 1
        if k >= 0 and 0 < number < self.real_end:
            return self.names[k]
        return None

    def owner(self, number: int) -> tuple[int, str]:
        """(first number, name) of the tensor that holds an element; name is "" for a virtual one."""
        found = self.holder(number)
        return (found[0], found[2]) if found is not None else (0, "")

    def made_of(self, term: Term) -> frozenset[str]:
        """The tensors that the weights of a term are, or are computed from; none where they are many or no tensor's."""
        ids = compact(term.ids) if term.ids is not None else torch.zeros(0)
        ids = ids[ids > 0]
        lo, hi = (term.site.w.lo, term.site.w.hi) if term.site is not None else (0, 0)
        lo, hi = (int(ids.min()), int(ids.max())) if ids.numel() else (lo, hi)
        held = self.holder(lo)
        if held is not None:
            return frozenset({held[2]}) if hi < held[0] + held[1] else frozenset()
        queue = [u.vid for u in self.virtual.values() if u.offset <= lo and hi < u.offset + u.size]
        names, seen = set(), set(queue)
        while queue:
            v = self.tape.values[queue.pop()]
            if v.origin == "param":
                names.add(v.name)
            elif v.origin == "node":
                queue += [i for i in self.tape.nodes[v.node].inputs if i not in seen]
                seen.update(self.tape.nodes[v.node].inputs)
        return frozenset(names)

    def spans(self) -> list[int]:
        """Where numbered tensors begin, virtual ones too."""
        return [*self.firsts, self.real_end, *(u.offset for u in self.virtual.values())]

    @abstractmethod
    def known(self, vid: int) -> Tensor | None:
        """The value in float64, or None where it still needs an open weight. Each of the two programs says it."""

    def computed_value(self, vid: int) -> Tensor | None:
        """The value where all that it is computed from is known."""
        return self.known(vid)

    def atom(self, vid: int) -> list[Term]:
        return [Term("known", 1.0, value=self.known(vid), vid=vid)]

    def terms(self, vid: int, root: bool = True) -> list[Term]:
        """The sum that `vid` is. Raises NotAffine where it is none and is not known either."""
        if root and vid in self.memo:
            return self.memo[vid]
        v = self.tape.values[vid]
        if v.origin == "param":
            out = self._weight_terms(vid)
        elif (
            v.origin != "node"
            or not v.weights
            or (self.cut and not root and v.data and self.is_end(vid) and not self.is_bare(vid))
        ):
            out = self._need(vid)
        elif not self.cut and (k := self.computed_value(vid)) is not None:
            out = [Term("known", 1.0, value=k, vid=vid)]
        elif self.weight_only(vid) and self.grid(vid) is not None:
            out = self._weight_terms(vid)
        else:
            out = self._node_terms(vid, root)
        if root:
            self.memo[vid] = out
        return out

    def _weight_terms(self, vid: int) -> list[Term]:
        g = self.grid(vid)
        assert g is not None
        return [Term("weight", 1.0, ids=g.dense().to(torch.float64))]

    def _need(self, vid: int) -> list[Term]:
        if self.known(vid) is None:
            raise NotAffine(vid)
        return self.atom(vid)

    def is_bare(self, vid: int) -> bool:
        """Weights with nothing but masks added: a bias of positions, which stands for itself nowhere."""
        found = self.bare.get(vid)
        if found is None:
            v = self.tape.values[vid]
            found = False
            if v.origin == "node" and v.weights and v.data and self.kind(self.tape.nodes[v.node]) in ("layout", "sum"):
                inputs = [i for i in self.tape.nodes[v.node].inputs if self.tape.values[i].dtype.is_floating_point]
                mixed = [i for i in inputs if self.tape.values[i].weights and self.tape.values[i].data]
                found = all(self.is_bare(i) for i in mixed)
            self.bare[vid] = found
        return found

    def is_end(self, vid: int) -> bool:
        """A non-linear operation consumes it, as it is or moved, or it is the known factor of a product."""
        found = self.ends.get(vid)
        if found is None:
            found = self.ends[vid] = False  # an operator may give back its own argument
            for c in self.tape.consumers[vid]:
                node = self.tape.nodes[c]
                kind = self.kind(node)
                if (
                    kind in self.STOPS
                    or self._as_rows(c, vid)
                    or (kind == "layout" and any(self.is_end(o) for o in node.outs if o >= 0))
                ):
                    found = True
                    break
            self.ends[vid] = found
        return found

    def _as_rows(self, consumer: int, vid: int) -> bool:
        """Is it the known factor of a product?"""
        node = self.tape.nodes[consumer]
        return self.kind(node) == "product" and not self.weight_only(vid)

    def _node_terms(self, vid: int, root: bool) -> list[Term]:
        v = self.tape.values[vid]
        node = self.tape.nodes[v.node]
        kind = self.kind(node)
        if kind == "layout":
            return self._layout(node, v.out, root)
        if kind == "sum":
            return self._sum(node, v.shape, root)
        if kind == "product":
            return self._product(node, v.node, v.shape)
        if kind == "scale":
            return self._scale(node, v.shape)
        return self._need(vid)

    def run(self, node: Node, feed: dict[int, Tensor]) -> Any:
        """The node's operator on other tensors; values that are not fed are the known ones."""

        moves = self.kind(node) == "layout"  # then weights stay in the type that they are stored in

        def put(x: Any) -> Any:
            if isinstance(x, Ref):
                if x.vid in feed:
                    return feed[x.vid]
                k = self.known(x.vid)
                if k is None:
                    raise NotAffine(x.vid)
                return k
            return x

        op = node.op
        if op in (aten.view.default, aten._unsafe_view.default):  # strides need not be the recorded run's
            op = aten.reshape.default
        kwargs = {k: v for k, v in node.kwargs.items() if k != "saw"}  # what Python read there is no argument
        args, kwargs = tree_map(put, node.args), tree_map(put, kwargs)
        return op(*args, **kwargs) if moves else twin.call(op, args, kwargs)

    def _layout(self, node: Node, out: int, root: bool) -> list[Term]:
        name = base(node.op)
        values = self.tape.values
        if name in ("index", "gather", "index_select"):
            moved = [node.args[0].vid]
        elif name == "copy":
            moved = [node.args[1].vid]
        else:
            moved = [i for i in node.inputs if values[i].dtype.is_floating_point]
        result: list[Term] = []
        kwargs_free = name in ("_to_copy", "clone", "copy")
        if (rows := self._looked_up(node)) is not None:
            return rows
        for i in dict.fromkeys(moved):
            for term in self._moved_terms(i, name, root):

                def one(t: Tensor, i: int = i) -> Tensor:
                    if kwargs_free:
                        return t.expand(values[node.outs[0]].shape)
                    feed = {j: torch.zeros(values[j].shape, dtype=torch.float64) for j in moved if j != i}
                    feed[i] = t
                    y = self.run(node, feed)
                    return y[out] if isinstance(y, (tuple, list)) else y

                if term.value is None and term.kind in ("known", "scale"):
                    raise NotAffine(i)
                new = term.mapped(one)
                if new.kind in ("weight", "scale") and new.ids is not None and not bool(new.ids.any()):
                    continue
                if new.kind == "product" and new.row is not None and not bool(new.row.any()):
                    continue
                result.append(new)
        return result

    def _moved_terms(self, vid: int, name: str, root: bool) -> list[Term]:
        """The sum that a moved value is: what is moved is still the whole value. Of a value of which only other parts
        are consumed, this part is no addend of its own."""
        v = self.tape.values[vid]
        part = self.cut and not root and name in PARTS and v.origin == "node" and v.data and v.weights
        if part and self.is_end(vid) and not self._consumed_whole(vid):
            return self._node_terms(vid, root)
        return self.terms(vid, root=root)

    def _consumed_whole(self, vid: int) -> bool:
        for c in self.tape.consumers[vid]:
            node = self.tape.nodes[c]
            kind = self.kind(node)
            if kind in ("barrier", "scale") or self._as_rows(c, vid):
                return True
            if kind == "layout" and base(node.op) not in PARTS and any(self.is_end(o) for o in node.outs if o >= 0):
                return True
        return False

    def _looked_up(self, node: Node) -> list[Term] | None:
        """Rows of a table: their numbers, without numbering the whole table."""
        if base(node.op) != "index":
            return None
        table, where = node.args[0].vid, node.args[1]
        if len(where) != 1 or not isinstance(where[0], Ref) or not self.weight_only(table):
            return None
        ids, g = self.known(where[0].vid), self.grid(table)
        if ids is None or ids.dtype == torch.bool or g is None:
            return None
        return self.row_terms(table, ids.to(torch.int64))

    def row_terms(self, vid: int, rows: Tensor) -> list[Term]:
        """The terms of these rows of a table of weights."""
        shape = self.tape.values[vid].shape
        size = math.prod(shape[1:])
        rows = torch.where(rows < 0, rows + shape[0], rows)
        place = rows.reshape(*rows.shape, *[1] * (len(shape) - 1)) * size + torch.arange(1, size + 1).reshape(shape[1:])
        return [Term("weight", 1.0, ids=self.row_numbers(vid, rows).to(torch.float64), place=place.to(torch.float64))]

    def row_numbers(self, vid: int, rows: Tensor) -> Tensor:
        g = self.grid(vid)
        assert g is not None
        rows = torch.where(rows < 0, rows + g.shape[0], rows)
        return g.take(0, rows.reshape(-1)).dense().reshape(*rows.shape, *g.shape[1:])

    def _sum(self, node: Node, shape: tuple[int, ...], root: bool) -> list[Term]:
        name = base(node.op)
        if name == "sum":
            dim = node.args[1][0]
            keep = node.args[2] if len(node.args) > 2 else False
            out: list[Term] = []
            for term in self.terms(node.args[0].vid, root=root):
                n = self.tape.values[node.args[0].vid].shape[dim]
                for i in range(n):
                    part = term.mapped(partial(_one, dim=dim, at=i, keep=keep))
                    main = getattr(part, part.tensors()[-1])
                    if main is None or bool((main != 0).any()):
                        out.append(part)
            return out
        if name in ("masked_fill", "where"):
            return self._masked_weights(node, shape)
        a = node.args[0]
        if name in ("mul", "div"):
            b = node.args[1]
            x, c = (a, b) if isinstance(a, Ref) else (b, a)
            factor = float(c) if name == "mul" else 1.0 / float(c)
            return [t.scaled(factor) for t in self.terms(x.vid, root=root)]
        if name == "neg":
            return [t.scaled(-1.0) for t in self.terms(a.vid, root=root)]
        sign = -1.0 if name == "sub" else 1.0
        out = []
        both = sum(isinstance(x, Ref) and self.tape.values[x.vid].data for x in (a, node.args[1])) == 2
        for x, s in ((a, 1.0), (node.args[1], sign)):
            if isinstance(x, Ref):
                for t in self.terms(
                    x.vid, root=root and not both
                ):  # an addend that stands for itself elsewhere is one here
                    if t.value is None and t.kind in ("known", "scale"):
                        raise NotAffine(x.vid)
                    out.append(t.mapped(lambda z: z.expand(shape)).scaled(s))
            else:
                out.append(Term("known", s, value=torch.full(shape, float(x), dtype=torch.float64)))
        return out

    def _masked_weights(self, node: Node, shape: tuple[int, ...]) -> list[Term]:
        """Weights where a mask leaves them, and a known value elsewhere."""
        found = self.overwritten(node)
        assert found is not None
        x, other, chosen = found
        mask = self.known((node.args[0] if base(node.op) == "where" else node.args[1]).vid)
        value = self.known(other.vid) if isinstance(other, Ref) else torch.tensor(float(other), dtype=torch.float64)
        if mask is None or value is None:
            raise NotAffine(x)
        keep = (mask if chosen else ~mask).expand(shape)
        out = [t.mapped(lambda z: torch.where(keep, z.expand(shape), 0.0)) for t in self.terms(x, root=False)]
        return [*out, Term("known", 1.0, value=torch.where(keep, 0.0, value.to(torch.float64)))]

    def _scale(self, node: Node, shape: tuple[int, ...]) -> list[Term]:
        a, b = node.args[0].vid, node.args[1].vid
        x, w, how = (a, b, "") if self.weight_only(b) else (b, a, "")
        if base(node.op) == "div":
            how = "reciprocal"
        k = self.known(x)
        if k is None:
            raise NotAffine(x)
        if how:
            u = self.virtual_of(w, how)
            numbers = Grid.whole(u.offset, self.tape.values[w].shape).dense()
            wt = [Term("weight", 1.0, ids=numbers.to(torch.float64))]
        else:
            wt = self.terms(w, root=False)
        out = []
        for t in wt:
            if t.kind == "known":  # the weights are settled
                assert t.value is not None
                out.append(Term("known", t.coef, value=(k * t.value).expand(shape)))
            elif t.kind == "weight":
                assert t.ids is not None
                out.append(Term("scale", t.coef, value=k.expand(shape), ids=t.ids.expand(shape), vid=x))
            else:
                raise NotAffine(w)
        return out

    def weight_matrix(self, vid: int) -> Grid:
        """The numbers of a value that is made of weights only, one weight an element."""
        found = self.grid(vid)
        if found is None:  # a sum of weights, or with holes: computed weights
            found = Grid.whole(self.virtual_of(vid).offset, self.tape.values[vid].shape)
        return found

    def _product(self, node: Node, index: int, shape: tuple[int, ...]) -> list[Term]:
        name = base(node.op)
        a, b = node.args[0].vid, node.args[1].vid
        if name == "convolution":
            x = self.known(a)
            if x is None:
                raise NotAffine(a)
            site = Site(index, x, a, self.weight_matrix(b), tuple(_plain(v) for v in node.args[3:9]))
            n, c, *space = shape
            p = math.prod(space)
            row = torch.arange(1, n * p + 1, dtype=torch.float64).reshape(n, 1, *space).expand(shape)
            col = torch.arange(1, c + 1, dtype=torch.float64).reshape(1, c, *[1] * len(space)).expand(shape)
            return [Term("product", 1.0, site=site, row=row, col=col)]
        left = self.weight_only(a)  # w @ x is the transpose of x.T @ w.T
        xv, wv = (b, a) if left else (a, b)
        x = self.known(xv)
        if x is None:
            raise NotAffine(xv)
        if not informative(x):  # zero times anything: the first step of a recurrence
            return [Term("known", 1.0, value=torch.zeros(shape, dtype=torch.float64))]
        w = self.weight_matrix(wv)
        if left:
            x, w = x.transpose(-1, -2), w.transpose(-2, -1)
        if name == "mm":
            x, w = x.unsqueeze(0), w.unsqueeze(0)
        nb, n, k = x.shape
        m = w.shape[2]
        out: list[Term] = []
        if nb > 1 and all(p.shape[0] == 1 for p in w.parts):  # one matrix for the whole batch
            x, w, nb, n = x.reshape(1, nb * n, k), w.narrow(0, 0, 1), 1, nb * n
        elif nb > 1 and bool((x == x[:1]).all()):  # one input for all matrices: their columns side by side
            w = w.permute((1, 0, 2)).reshape(k, nb * m)
            row = torch.arange(1, n + 1, dtype=torch.float64).reshape(1, n, 1).expand(nb, n, m)
            col = torch.arange(1, nb * m + 1, dtype=torch.float64).reshape(nb, 1, m).expand(nb, n, m)
            return self._site_terms(index, x[0], xv, w, row, col, shape, left)
        if nb == 1:
            row = torch.arange(1, n + 1, dtype=torch.float64).reshape(1, n, 1).expand(1, n, m)
            col = torch.arange(1, m + 1, dtype=torch.float64).reshape(1, 1, m).expand(1, n, m)
            return self._site_terms(index, x[0], xv, w.reshape(k, m), row, col, shape, left)
        for i in range(nb):
            row = torch.zeros(nb, n, m, dtype=torch.float64)
            col = torch.zeros(nb, n, m, dtype=torch.float64)
            row[i] = torch.arange(1, n + 1, dtype=torch.float64).reshape(n, 1)
            col[i] = torch.arange(1, m + 1, dtype=torch.float64).reshape(1, m)
            matrix = w.narrow(0, i, 1).reshape(k, m)
            out += self._site_terms(index, x[i], xv, matrix, row, col, shape, left)
        return out

    def _site_terms(
        self, index: int, x: Tensor, xv: int, w: Grid, row: Tensor, col: Tensor, shape: tuple[int, ...], left: bool
    ) -> list[Term]:
        row, col = (_turned(t, left).reshape(shape) for t in (row, col))
        if not w.injective and (first := w.once(1)).shape != w.shape:  # heads that share one
            col, w = _columns_once(col, w, first), first
        site = Site(index, x, xv, w, pieces=self._pieces(xv, x, left))
        return [Term("product", 1.0, site=site, row=row, col=col)]

    def _pieces(self, xv: int, x: Tensor, left: bool) -> list[Tensor] | None:
        """The columns of x (of its transpose, where it is the right factor) that come from each part of a
        concatenation, or None where it is none."""
        chain = []
        vid = xv
        while True:
            v = self.tape.values[vid]
            if v.origin != "node":
                return None
            node = self.tape.nodes[v.node]
            name = base(node.op)
            if name == "cat":
                break
            if name not in REARRANGED:
                return None
            chain.append((node, vid))
            vid = node.args[0].vid
        parts = node.args[0]
        axis = (node.args[1] if len(node.args) > 1 else 0) % len(v.shape)
        turned = left or any(base(n.op) in ("t", "transpose", "permute") for n, _ in chain)
        if len(parts) > (64 if turned else 16) or (axis != len(v.shape) - 1 and not turned):
            return None
        mark = torch.cat([torch.full(self.tape.values[p.vid].shape, float(i)) for i, p in enumerate(parts)], axis)
        for n, _ in reversed(chain):
            mark = mark.expand(*mark.shape) if base(n.op) == "clone" else self.run(n, {n.args[0].vid: mark})
        if mark.numel() != x.numel():
            return None
        mark = _turned(mark, left).reshape(-1, x.shape[-1])
        if not bool((mark == mark[:1]).all()):
            return None
        first = mark[0]
        return [torch.nonzero(first == i).flatten() for i in range(len(parts)) if bool((first == i).any())]


def _columns_once(col: Tensor, w: Grid, first: Grid) -> Tensor:
    """The numbers of columns of a matrix as those of the matrix in which each stands once."""
    lines = torch.cat([first.dense(), w.dense()], 1).t()
    _, inverse = torch.unique(lines, dim=0, return_inverse=True)
    n = first.shape[1]
    place = torch.zeros(n, dtype=torch.int64)
    place[inverse[:n]] = torch.arange(n)
    to = torch.cat([torch.zeros(1), place[inverse[n:]] + 1.0]).to(torch.float64)
    return to[compact(col).to(torch.int64)].expand(col.shape)


def _one(t: Tensor, *, dim: int, at: int, keep: bool) -> Tensor:
    return t.narrow(dim, at, 1) if keep else t.select(dim, at)


def _turned(t: Tensor, left: bool) -> Tensor:
    return t.transpose(-1, -2) if left else t


def _plain(v: Any) -> Any:
    return tuple(v) if isinstance(v, (list, tuple)) else v
