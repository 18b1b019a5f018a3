"""From numbered elements to a plan's expressions: read an index map aloud.

A settled target tensor is an array of source element numbers. Here it becomes an expression that a person can read: a
name, a transpose, a concatenation, an interleaving of heads, a strided view; with the rows that no input reached
completed where the ones that were reached lie on one index map (see `complete`). What has no such form is not rendered,
and is left open.
"""

from __future__ import annotations

import itertools
import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from surgery.expr import Expr, call
from surgery.mapper.affine import NotAffine
from surgery.mapper.bound import Bound, Piece, in_box
from surgery.mapper.grid import Grid, axes
from surgery.mapper.kinds import base
from surgery.mapper.record import Node, Ref
from surgery.mapper.reference import Derived, Product, Reference
from surgery.mapper.taken import lines
from surgery.mapper.terms import Virtual

MOST_PARTS = 64  # of a concatenation
MOST_ROWS = 4096  # that a plan names one by one
MOST_ELEMENTS = 64  # likewise, where nothing else says what they are


class Unrenderable(Exception):
    """An index map that no expression of the language gives."""


def _box(p: Piece) -> list[tuple[int, int]] | None:
    """(start, length) along each axis of the tensor, where the piece is all of such a box."""
    if p.masks is None:
        return None
    out = []
    for m in p.masks:
        at = torch.nonzero(m).flatten()
        if int(at[-1]) - int(at[0]) + 1 != len(at):
            return None
        out.append((int(at[0]), len(at)))
    return out


class Renderer:
    """Expressions over checkpoint tensors for arrays of the reference's element numbers."""

    def __init__(self, reference: Reference, links: dict[str, Expr]) -> None:
        self.ref = reference
        self.links = links
        self.real = list(reference.names)  # (first number, size, name) of the tensors that the reference holds

    # -- the whole ----------------------------------------------------------------------------------------------------
    def bound(self, b: Bound) -> Expr:
        """The expression of a settled tensor. Raises Unrenderable."""
        if not b.full:
            raise Unrenderable("some elements are open")
        if not any(p.sources for p in b.pieces):
            return call("zeros", shape=b.shape)
        if (told := self._by_pieces(b)) is not None:
            return told
        addends = [x.reshape(b.shape) for x in (b.ids, *b.more)]
        parts = [self.block(a.clamp_min(0)) for a in addends if bool((a > 0).any())]
        if not parts:
            return call("zeros", shape=b.shape)
        return parts[0] if len(parts) == 1 else call("add", *parts)

    def _by_pieces(self, b: Bound) -> Expr | None:
        """The pieces side by side along one axis, where each is a source tensor as it is or with its axes permuted."""
        if b.shift is not None and (whole_one := self._grid(Grid.whole(b.shift, b.shape))) is not None:
            return whole_one
        runs: dict[int, list[tuple[int, Expr]]] = {}
        for p in b.pieces:
            at = _box(p)
            if at is None or (grids := [in_box(p, s, at) for s in p.sources]) is None or None in grids:
                return None
            addends = [self._grid(g) for g in grids if g is not None]
            if any(a is None for a in addends):
                return None
            exprs = [a for a in addends if a is not None]
            size = tuple(n for _, n in at)
            made = call("zeros", shape=size) if not exprs else exprs[0] if len(exprs) == 1 else call("add", *exprs)
            cuts = [a for a, ((_, n), whole) in enumerate(zip(at, b.shape, strict=True)) if n != whole]
            if not cuts and len(b.pieces) == 1:
                return made
            if len(cuts) != 1:
                return None
            runs.setdefault(cuts[0], []).append((at[cuts[0]][0], made))
        if len(runs) != 1 or len(b.pieces) > MOST_PARTS:
            return None
        ((axis, parts),) = runs.items()
        return call("cat", *(e for _, e in sorted(parts, key=lambda part: part[0])), axis=axis)

    def _grid(self, g: Grid) -> Expr | None:
        """One source tensor, all of it or some of its rows, its axes in any order."""
        held = self.ref.holder(g.lo)
        if held is None or g.hi >= held[0] + held[1]:
            return None
        first, size, name = held
        expr = self.links.get(name)
        if expr is None:
            raise Unrenderable(f"{name} is not in the checkpoint")
        have = self.ref.tape.values[self.ref.tape.params[name]].shape
        local = g.shifted(-first)
        if g.numel() != size:
            return self._cut(expr, have, local)
        steps = [math.prod(have[a + 1 :]) for a in range(len(have))]
        orders = list(itertools.permutations(range(len(have)))) if len(have) <= 4 else [tuple(range(len(have)))]
        for p in sorted(orders, key=lambda p: tuple(have[d] for d in p) != g.shape):  # a new shape is dearer to see
            moved = tuple(have[d] for d in p)
            if moved == g.shape and local.strides is not None:  # steps say it all
                if any(n > 1 and s != steps[d] for n, s, d in zip(moved, local.strides, p, strict=True)):
                    continue
            elif not (Grid.whole(0, have).permute(p) if have else Grid.whole(0, have)).reshape(*g.shape).same(local):
                continue
            squeezed = [d for d in p if have[d] != 1]
            if squeezed != sorted(squeezed):
                expr = call("transpose", expr) if len(p) == 2 else call("permute", expr, dims=p)
            else:
                moved = have
            return expr if moved == g.shape else call("reshape", expr, shape=g.shape)
        return None

    def _cut(self, expr: Expr, have: tuple[int, ...], local: Grid) -> Expr | None:
        """Consecutive lines along one axis of a tensor, or of its transpose, in their own shape."""
        box = axes(local, have)
        if box is None or len(have) != local.ndim:
            return None
        at = [(int(x.min()), int(x.max()) - int(x.min()) + 1) for x in box]
        for p in [tuple(range(len(have)))] + ([(1, 0)] if len(have) == 2 else []):
            part = Grid.whole(0, have)
            for a, (start, n) in enumerate(at):
                part = part.narrow(a, start, n)
            cuts = [a for a, (_, n) in enumerate(at) if n != have[a]]
            if part.numel() != local.numel() or len(cuts) != 1 or not part.permute(p).same(local):
                continue
            start, n = at[cuts[0]]
            made = expr if p[0] == 0 else call("transpose", expr)
            return call("slice", made, axis=p.index(cuts[0]), start=start, stop=start + n)
        return None

    def block(self, ids: Tensor, depth: int = 0) -> Expr:
        """ids: source numbers, 0 for zero, in the shape wanted."""
        shape = tuple(ids.shape)
        if not bool((ids > 0).any()):
            return call("zeros", shape=shape)
        owner = self._owner(ids)
        kinds = torch.unique(owner)
        if len(kinds) == 1:
            expr, size, first = self._base(int(kinds[0]))
            made = view(expr, size, ids - first)
            if made is not None:
                return made
        if depth < 6:
            if (made := self._framed(ids, depth)) is not None:
                return made
            for axis in range(len(shape)):
                made = self._split(ids, owner, axis, depth)
                if made is not None:
                    return made
            short = [a for a in range(len(shape)) if 1 < shape[a] <= 16]
            if short and len(kinds) > 1:  # a grid of tensors: one after the other
                axis = short[0]
                parts = [self.block(ids.narrow(axis, i, 1), depth + 1) for i in range(shape[axis])]
                return call("cat", *parts, axis=axis)
            if not depth and len(kinds) == 1 and ids.numel() <= MOST_ELEMENTS:
                expr, size, first = self._base(int(kinds[0]))
                return _elements_taken(expr, size, ids - first)
        raise Unrenderable(f"no expression for an index map of shape {shape}")

    def _framed(self, ids: Tensor, depth: int) -> Expr | None:
        """What stands among zeros: a kernel within a larger one."""
        inside = torch.nonzero(ids > 0)
        first, last = inside.amin(0).tolist(), inside.amax(0).tolist()
        edges = [a for a, n in enumerate(ids.shape) if first[a] or last[a] + 1 < n]
        core = ids
        for a in edges:
            core = core.narrow(a, first[a], last[a] + 1 - first[a])
        if len(edges) < 2 or not bool((core > 0).all()):  # zeros at the ends of one axis are joined to it as others are
            return None
        try:
            made, size = self.block(core, depth + 1), [int(n) for n in core.shape]
        except Unrenderable:
            return None
        for a in edges:
            before, after = first[a], ids.shape[a] - 1 - last[a]
            zeros = [call("zeros", shape=(*size[:a], n, *size[a + 1 :])) if n else None for n in (before, after)]
            made = call("cat", *(e for e in (zeros[0], made, zeros[1]) if e is not None), axis=a)
            size[a] = ids.shape[a]
        return made

    # -- bases --------------------------------------------------------------------------------------------------------
    def _spans(self) -> list[tuple[int, int, Any]]:
        out: list[tuple[int, int, Any]] = [(f, s, n) for f, s, n in self.real]
        out += [(u.offset, u.size, u) for u in self.ref.virtual.values()]
        out += [(d.offset, d.size, d) for d in self.ref.derived]
        out += [(p.offset, p.size, p) for p in self.ref.multiplied]
        return sorted(out, key=lambda e: e[0])

    def _owner(self, ids: Tensor) -> Tensor:
        spans = self._spans()
        edges = torch.tensor([f for f, _, _ in spans])
        found = torch.bucketize(ids, edges, right=True) - 1
        return torch.where(ids > 0, found, -1)

    def _base(self, k: int) -> tuple[Expr, tuple[int, ...], int]:
        """(expression, its shape, first number) of a numbered tensor."""
        first, _, what = self._spans()[k]
        if isinstance(what, str):
            vid = self.ref.tape.params[what]
            expr = self.links.get(what)
            if expr is None:
                raise Unrenderable(f"{what} is not in the checkpoint")
            return expr, self.ref.tape.values[vid].shape, first
        if isinstance(what, Virtual):
            expr = self._virtual(what.vid)
            shape = self.ref.tape.values[what.vid].shape
            return (call("reciprocal", expr) if what.how else expr), shape, first
        if isinstance(what, Product):
            factors = (self.block(f.dense()) for f in what.factors)
            return reduce(lambda a, b: call("mul", a, b), factors), what.shape, first
        assert isinstance(what, Derived)
        if what.fn == "ones":
            return call("ones", shape=what.shape), what.shape, first
        inner = self.block(what.numbers.dense())
        if what.fn == "rsqrt_inverse":
            return call("reciprocal", call("square", inner)), what.shape, first
        return call(what.fn, inner, **what.params), what.shape, first

    def _value(self, vid: int) -> Expr:
        """A value of weights only."""
        try:
            return self.block(self.ref.weight_matrix(vid).dense())
        except NotAffine as e:
            raise Unrenderable("a weight computed in a way that the plan cannot say") from e

    def _virtual(self, vid: int) -> Expr:
        v = self.ref.tape.values[vid]
        if v.origin != "node":
            raise Unrenderable(f"value {vid}")
        node = self.ref.tape.nodes[v.node]
        name = base(node.op)
        if name == "_weight_norm_interface" and v.out == 0:
            w, g, *dim = node.args
            return call("weight_norm", self._value(g.vid), self._value(w.vid), dim=int(dim[0]) if dim else 0)
        args = [a for a in node.args if isinstance(a, Ref)]
        if name in ("exp", "log", "sqrt", "rsqrt", "neg", "reciprocal", "square") and len(args) == 1:
            return call(name, self._value(args[0].vid))
        if name in ("add", "sub", "mul", "div") and len(node.args) >= 2:
            return self._arithmetic(name, node)
        raise Unrenderable(f"a weight computed by {name}")

    def _arithmetic(self, name: str, node: Node) -> Expr:
        a, b = node.args[0], node.args[1]
        if isinstance(a, Ref) and isinstance(b, Ref) and all(self.ref.weight_only(x.vid) for x in (a, b)):
            return call(name, self._value(a.vid), self._value(b.vid))
        x, c = (a, b) if isinstance(a, Ref) and self.ref.weight_only(a.vid) else (b, a)
        if isinstance(c, Ref):
            k = self.ref.known(c.vid)
            if k is None or k.numel() != 1:
                raise Unrenderable("a weight combined with a table that Python made")
            c = float(k)
        inner = self._value(x.vid)
        if name == "add":
            return call("shift", inner, by=float(c))
        if name == "mul":
            return call("scale", inner, by=float(c))
        if name == "sub":
            return call("shift", inner, by=-float(c)) if x is a else call("shift", call("neg", inner), by=float(c))
        return (
            call("scale", inner, by=1.0 / float(c)) if x is a else call("scale", call("reciprocal", inner), by=float(c))
        )

    # -- cutting ------------------------------------------------------------------------------------------------------
    def _split(self, ids: Tensor, owner: Tensor, axis: int, depth: int) -> Expr | None:
        """Runs along an axis, each from one tensor or one stretch of it: a concatenation, or an interleaving."""
        n = ids.shape[axis]
        if n < 2:
            return None
        rows, own = ids.movedim(axis, 0).reshape(n, -1), owner.movedim(axis, 0).reshape(n, -1)
        if not bool((own == own[:, :1]).all()):
            return None
        who = own[:, 0]
        step = rows[1:] - rows[:-1]
        steady = (step == step[:, :1]).all(1)
        new = who[1:] != who[:-1]
        cut = [0, *(torch.nonzero(new).flatten() + 1).tolist(), n]
        if len(cut) == 2 or len(cut) > 4 * MOST_PARTS:  # one tensor: cut where its own stretches end
            jump = torch.zeros(n - 1, dtype=torch.bool)
            jump[1:] = (step[1:, 0] != step[:-1, 0]) | ~steady[1:]
            edges = torch.nonzero(jump).flatten() + 1
            cut = [0]
            for e in edges.tolist():
                if e - cut[-1] > 1:
                    cut.append(e)
            cut.append(n)
        runs = list(itertools.pairwise(cut))
        if len(runs) < 2 or len(runs) > 4 * MOST_PARTS:
            return None
        woven = self._woven(ids, who, runs, axis, depth)
        if woven is not None:
            return woven
        if len(runs) > MOST_PARTS:
            return None
        try:
            parts = [self.block(ids.narrow(axis, a, b - a), depth + 1) for a, b in runs]
        except Unrenderable:
            return None
        return call("cat", *parts, axis=axis)

    def _woven(self, ids: Tensor, who: Tensor, runs: list[tuple[int, int]], axis: int, depth: int) -> Expr | None:
        """q k v q k v ...: equal runs whose owners recur."""
        owners = [int(who[a]) for a, _ in runs]
        period = len(dict.fromkeys(owners))
        if period < 2 or len(runs) <= period or len(runs) % period:
            return None
        if owners != owners[:period] * (len(runs) // period) or len({b - a for a, b in runs}) != 1:
            return None
        groups = len(runs) // period
        parts = []
        for k in range(period):
            at = torch.cat([torch.arange(*runs[g * period + k]) for g in range(groups)])
            try:
                parts.append(self.block(ids.index_select(axis, at), depth + 1))
            except Unrenderable:
                return None
        return call("interleave", *parts, groups=groups, axis=axis)


# -------------------------------------------------------------------------------------------------------- one tensor


def view(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr | None:
    """The expression whose elements are `local` (flat positions in a tensor of `shape`), or None."""
    want = tuple(local.shape)
    n = math.prod(shape)
    flat = local.reshape(-1)
    if flat.numel() == n and bool((flat == torch.arange(n)).all()):
        return expr if want == shape else call("reshape", expr, shape=want)
    still = [a for a, m in enumerate(want) if m > 1 and bool((local == local.narrow(a, 0, 1)).all())]
    if still:  # one row for all
        for a in still:
            local = local.narrow(a, 0, 1)
        one = view(expr, shape, local)
        return (
            None
            if one is None
            else call("repeat", one, times=tuple(m if a in still else 1 for a, m in enumerate(want)))
        )
    for read in (_plain_view, _strided, _flipped, _rows_taken, _lines_taken):
        made = read(expr, shape, local)
        if made is not None:
            return made
    return None


def _flipped(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr | None:
    """A view read backwards along some axes."""
    origin = local.reshape(-1)[0]
    back = [a for a, m in enumerate(local.shape) if m > 1 and local.select(a, 1).reshape(-1)[0] < origin]
    if not back:
        return None
    forth = local.flip(back)
    made = _plain_view(expr, shape, forth)
    if made is None:
        made = _strided(expr, shape, forth)
    if made is None:
        return None
    for axis in back:
        made = call("flip", made, axis=axis)
    return made


def _rows_taken(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr | None:
    """Whole rows in an order of their own (a table looked up by a fixed index)."""
    size = math.prod(shape[1:])
    want = tuple(local.shape)
    for last in range(len(want), -1, -1):  # the axes from `last` on make one row
        if math.prod(want[last:]) != size:
            continue
        rows = local.reshape(-1, size)
        whole = (rows % size == torch.arange(size)) & (rows // size == rows[:, :1] // size)
        if len(rows) > MOST_ROWS or not bool(whole.all()):
            return None
        taken = call("take", expr, index=tuple((rows[:, 0] // size).tolist()), axis=0)
        return taken if (len(rows), *shape[1:]) == want else call("reshape", taken, shape=want)
    return None


def _lines_taken(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr | None:
    """Lines along any axis in an order of their own, laid out along one axis or several, and moved."""
    for axis, index, size, at in lines(shape, local, MOST_ROWS):
        whole = call("take", expr, index=tuple(index), axis=axis)
        for read in (_plain_view, _strided):
            if (made := read(whole, size, at)) is not None:
                return made
    return None


def _elements_taken(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr:
    """Elements one by one."""
    line = expr if len(shape) == 1 else call("reshape", expr, shape=(math.prod(shape),))
    taken = call("take", line, index=tuple(local.reshape(-1).tolist()), axis=0)
    return taken if local.ndim == 1 else call("reshape", taken, shape=tuple(local.shape))


def _plain_view(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr | None:
    """A transpose, a slice, or both."""
    want = tuple(local.shape)
    if math.prod(shape) < local.numel() or not shape:
        return None
    lo, hi = int(local.min()), int(local.max())
    piece: Expr = expr
    grid: Tensor | None = None
    size = list(shape)
    for axis in range(len(shape)):
        inner = math.prod(shape[axis + 1 :])
        outer = math.prod(shape[:axis])
        if outer > 1 and local.numel() == math.prod(shape):
            break
        per = shape[axis]
        count = local.numel() * per // math.prod(shape)
        if count * math.prod(shape) != local.numel() * per or count == 0 or count == per:
            continue
        start = (lo // inner) % per
        if start + count > per or (hi // inner) % per != start + count - 1:
            continue
        cand = torch.arange(math.prod(shape)).reshape(shape).narrow(axis, start, count)
        if bool((cand.reshape(-1) == local.reshape(-1)).all()):  # as it lies: no need to sort
            piece, grid = call("slice", expr, axis=axis, start=start, stop=start + count), cand
            size[axis] = count
            break
        if bool((torch.sort(cand.reshape(-1)).values == torch.sort(local.reshape(-1)).values).all()):
            piece, grid = call("slice", expr, axis=axis, start=start, stop=start + count), cand
            size[axis] = count
            break
    if grid is None:
        if local.numel() != math.prod(shape):
            return None
        grid = torch.arange(math.prod(shape)).reshape(shape)
    flat = local.reshape(-1)
    for p in itertools.permutations(range(len(size))) if len(size) <= 4 else [tuple(range(len(size)))]:
        if bool((grid.permute(p).reshape(-1) == flat).all()):
            if p != tuple(range(len(size))):
                squeezed = [d for d in p if size[d] != 1]
                if squeezed != sorted(squeezed):
                    piece = call("transpose", piece) if len(p) == 2 else call("permute", piece, dims=p)
                    size = [size[d] for d in p]
            return piece if tuple(size) == want else call("reshape", piece, shape=want)
    return None


def _radix(profile: Tensor) -> list[tuple[int, int]] | None:
    """A one-dimensional index profile (starting at 0) as nested (size, stride), outermost first."""
    n = len(profile)
    if n == 1:
        return []
    out: list[tuple[int, int]] = []
    p = profile
    while len(p) > 1:
        s = int(p[1])
        steps = torch.arange(len(p)) * s
        bad = torch.nonzero(p != steps).flatten()
        m = int(bad[0]) if len(bad) else len(p)
        if len(p) % m:
            return None
        inner = p[:m]
        blocks = p.reshape(-1, m)
        if not bool((blocks - blocks[:, :1] == inner).all()):
            return None
        out.insert(0, (m, s))
        p = blocks[:, 0]
    return out


def _strided(expr: Expr, shape: tuple[int, ...], local: Tensor) -> Expr | None:
    """Any nest of strides: reshape, slice, permute, reshape."""
    want = tuple(local.shape)
    offset = int(local.reshape(-1)[0])
    dims: list[tuple[int, int]] = []
    rebuilt = torch.full(want, offset, dtype=torch.int64)
    for axis, n in enumerate(want):
        index: list[Any] = [0] * len(want)
        index[axis] = slice(None)
        profile = local[tuple(index)] - offset
        nest = _radix(profile)
        if nest is None:
            return None
        dims += nest
        rebuilt = rebuilt + profile.reshape([n if a == axis else 1 for a in range(len(want))])
    if not bool((rebuilt == local).all()) or any(s <= 0 for _, s in dims):
        return None
    order = sorted(range(len(dims)), key=lambda k: -dims[k][1])
    nests = [dims[k] for k in order]
    piece = _nested(expr, shape, nests, offset)
    if piece is None:  # axes that lie close together are one before they are cut apart
        piece = _nested(expr, shape, _fused(nests), offset)
        if piece is None:
            return None
        piece = call("reshape", piece, shape=(*(n for n, _ in nests), 1))
    perm = [order.index(k) for k in range(len(dims))]
    if perm != sorted(perm):
        piece = call("permute", piece, dims=(*perm, len(order)))
    return call("reshape", piece, shape=want)


def _fused(nests: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Nested (size, stride), outermost first, with those that follow each other without a gap as one."""
    out: list[tuple[int, int]] = []
    for n, s in nests:
        if out and out[-1][1] == n * s:
            out[-1] = (out[-1][0] * n, s)
        else:
            out.append((n, s))
    return out


def _nested(expr: Expr, shape: tuple[int, ...], nests: list[tuple[int, int]], offset: int) -> Expr | None:
    """Elements from `offset` on in nested (size, stride), outermost first: an axis for each, and one of a single
    element."""
    sizes, at = [], []
    above = math.prod(shape)
    for n, s in nests:
        if above % s:
            return None
        sizes.append(above // s)
        at.append((offset % above) // s)
        if at[-1] + n > sizes[-1]:
            return None
        above = s
    trailing = above
    piece: Expr = call("reshape", expr, shape=(*sizes, trailing)) if (*sizes, trailing) != shape else expr
    for axis, (n, _) in enumerate(nests):
        if n != sizes[axis]:
            piece = call("slice", piece, axis=axis, start=at[axis], stop=at[axis] + n)
    if trailing > 1:
        piece = call("slice", piece, axis=len(nests), start=offset % trailing, stop=offset % trailing + 1)
    return piece
