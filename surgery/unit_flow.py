"""Which units flow where: one rule for each operator of a recorded run.

A run is recorded (surgery.mapper.record) and walked once. Every value gets a space for each of its axes
(surgery.unit_spaces); an operator makes spaces one, factors them, joins them, or marks what it does with them: "norm"
and "mean" reduce over them, "softmax" and "dot" run over them, "lookup" picks one of them. An operator that has no rule
fixes all spaces that it touches, by its name and module: nothing is guessed.

Sources: the operators' documentation (torch.ops.aten); Fang et al., arXiv 2301.12900.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from surgery.mapper.record import Node, Ref, Tape, _name
from surgery.unit_spaces import Space, cut, fix, joined, product, push_down, regroup, unify
from surgery.unit_step import NONE, Flow, Origin, Step


def flow(tape: Tape) -> Flow:
    """Walk a run."""
    out = Flow(tape)
    for vid, value in enumerate(tape.values):
        if value.origin == "node":
            continue
        out.axes[vid] = [Space(size) for size in value.shape]
        if value.origin == "input":
            for space in out.axes[vid]:
                space.mark("input", value.name or "an input")
        if value.weights:
            out.origins[vid] = [frozenset({(vid, axis)}) for axis in range(len(value.shape))]
    for index, node in enumerate(tape.nodes):
        Rules(out, index, node).run()
    for vid in tape.outputs():
        for space in out.axes.get(vid, ()):
            space.mark("output", "an output")
    for axes in out.axes.values():
        for space in axes:
            push_down(space)
    return out


class Rules(Step):
    """The operators that move, join, multiply, reduce or look up units."""

    # layouts
    def op_view(self) -> None:
        vid, shape = self.one(), self.shape(self.outs[0])
        old, origins = self.axes(vid), self.origins(vid)
        new = regroup(old, shape, self.where)
        self.give(new, _regrouped(self.shape(vid), origins, shape))

    op_unsafe_view = op_reshape = op_flatten = op_unflatten = op_view

    def op_permute(self) -> None:
        vid = self.one()
        self._order(vid, [d % len(self.shape(vid)) for d in self.node.args[1]])

    def op_transpose(self) -> None:
        vid = self.one()
        rank = len(self.shape(vid))
        order = list(range(rank))
        if rank:
            a, b = self.node.args[1] % rank, self.node.args[2] % rank
            order[a], order[b] = order[b], order[a]
        self._order(vid, order)

    def op_t(self) -> None:
        self._order(self.one(), list(reversed(range(len(self.shape(self.one()))))))

    def _order(self, vid: int, order: Sequence[int]) -> None:
        self.give([self.axes(vid)[d] for d in order], [self.origins(vid)[d] for d in order])

    def op_unsqueeze(self) -> None:
        vid = self.one()
        at = self.node.args[1] % (len(self.shape(vid)) + 1)
        axes, origins = list(self.axes(vid)), list(self.origins(vid))
        axes.insert(at, Space(1))
        origins.insert(at, NONE)
        self.give(axes, origins)

    def op_squeeze(self) -> None:
        vid = self.one()
        dims = self.arg(1, "dim")
        rank = len(self.shape(vid))
        chosen = range(rank) if dims is None else [d % rank for d in ([dims] if isinstance(dims, int) else dims)]
        kept = [d for d in range(rank) if not (d in set(chosen) and self.shape(vid)[d] == 1)]
        self._order(vid, kept)

    def op_expand(self) -> None:
        vid, shape = self.one(), self.shape(self.outs[0])
        offset = len(shape) - len(self.shape(vid))
        axes: list[Space] = []
        origins: list[Origin] = []
        for at, size in enumerate(shape):
            axis = at - offset
            same = axis >= 0 and self.shape(vid)[axis] == size
            axes.append(self.axes(vid)[axis] if same else Space(size))
            origins.append(self.origins(vid)[axis] if axis >= 0 else NONE)
        self.give(axes, origins)

    def op_select(self) -> None:
        vid = self.one()
        rank = len(self.shape(vid))
        dim, at = self.node.args[1] % rank, self.node.args[2]
        size = self.shape(vid)[dim]
        at %= size
        self._pieces(self.axes(vid)[dim], [1] * size if size <= 64 else [n for n in (at, 1, size - at - 1) if n])
        self._order(vid, [d for d in range(rank) if d != dim])

    def op_unbind(self) -> None:
        vid = self.one()
        rank = len(self.shape(vid))
        dim = self.arg(1, "dim", 0) % rank
        self._pieces(self.axes(vid)[dim], [1] * self.shape(vid)[dim])
        for out in range(len(self.outs)):
            kept = [d for d in range(rank) if d != dim]
            self.give([self.axes(vid)[d] for d in kept], [self.origins(vid)[d] for d in kept], out)

    def _pieces(self, space: Space, sizes: Sequence[int]) -> list[Space]:
        return cut(space, sizes, f"it is cut by {self.where}")

    def op_slice(self) -> None:
        vid = self.one()
        rank = len(self.shape(vid))
        dim, step = self.arg(1, "dim", 0) % rank, self.arg(4, "step", 1)
        size, new = self.shape(vid)[dim], self.shape(self.outs[0])[dim]
        start = self.arg(2, "start") or 0
        start = max(0, min(size, start + size if start < 0 else start))
        axes = list(self.axes(vid))
        if new != size:
            if step != 1:
                fix(axes[dim], f"every {step}th is taken ({self.where})")
                axes[dim] = Space(new)
                fix(axes[dim], f"every {step}th is taken ({self.where})")
            else:
                sizes = [start, new, size - start - new]
                parts = self._pieces(axes[dim], [n for n in sizes if n])
                axes[dim] = parts[1 if start else 0] if new else Space(0)
        self.give(axes, self.origins(vid))

    def op_split(self) -> None:
        vid = self.one()
        dim = self.arg(2, "dim", 0) % len(self.shape(vid))
        sizes = [self.shape(out)[dim] for out in self.outs]
        for out, part in enumerate(self._pieces(self.axes(vid)[dim], sizes)):
            axes = list(self.axes(vid))
            axes[dim] = part
            self.give(axes, self.origins(vid), out)

    op_split_with_sizes = op_unsafe_split = op_unsafe_split_with_sizes = op_chunk = op_split

    def op_cat(self) -> None:
        refs = [r.vid for r in self.node.args[0] if len(self.shape(r.vid)) == len(self.shape(self.outs[0]))]
        rank = len(self.shape(self.outs[0]))
        dim = self.arg(1, "dim", 0) % rank
        axes: list[Space] = []
        origins: list[Origin] = []
        for d in range(rank):
            spaces = [self.axes(vid)[d] for vid in refs]
            if d == dim:
                axes.append(joined(spaces))
            else:
                for vid, other in zip(refs, spaces, strict=True):
                    unify(spaces[0], other, self.where)
                    self._meet_constant(vid, d)
                axes.append(spaces[0])
            for vid in refs:
                self.use(vid, d, "out")
            origins.append(frozenset().union(*(self.origins(vid)[d] for vid in refs)))
        self.give(axes, origins)

    def op_stack(self) -> None:
        refs = [r.vid for r in self.node.args[0]]
        dim = self.arg(1, "dim", 0) % len(self.shape(self.outs[0]))
        for d, space in enumerate(self.axes(refs[0])):
            for vid in refs:
                unify(space, self.axes(vid)[d], self.where)
                self.use(vid, d, "out")
        axes, origins = list(self.axes(refs[0])), list(self.origins(refs[0]))
        axes.insert(dim, Space(len(refs)))
        origins.insert(dim, NONE)
        self.give(axes, origins)

    def op_constant_pad_nd(self) -> None:
        vid, pad = self.one(), list(self.node.args[1])
        axes = list(self.axes(vid))
        for n in range(len(pad) // 2):
            before, after = pad[2 * n], pad[2 * n + 1]
            dim = len(axes) - 1 - n
            if before >= 0 and after >= 0 and (before or after):
                axes[dim] = joined([Space(before), axes[dim], Space(after)])
            elif before or after:
                fix(axes[dim], f"it is cropped ({self.where})")
                axes[dim] = Space(self.shape(self.outs[0])[dim])
        self.give(axes, self.origins(vid))

    def op_as_strided(self) -> None:
        vid = self.one()
        if self.shape(vid) == self.shape(self.outs[0]) and math.prod(self.shape(vid)[2:]) == 1:
            self.give(self.axes(vid), self.origins(vid))  # a pooled map laid out anew: no element changes its place
        else:
            self.unknown()

    def op_glu(self) -> None:
        vid = self.one()
        dim = self.arg(1, "dim", -1) % len(self.shape(vid))
        value, gate = self._pieces(self.axes(vid)[dim], [self.shape(vid)[dim] // 2] * 2)
        unify(value, gate, self.where)
        axes = list(self.axes(vid))
        axes[dim] = value
        self.give(axes)

    def op_roll(self) -> None:
        vid = self.one()
        dims = self.arg(2, "dims", ())
        for d in [dims] if isinstance(dims, int) else dims:
            fix(self.axes(vid)[d], f"positions change places ({self.where})")
        self.give(self.axes(vid), self.origins(vid))

    op_flip = op_roll

    def op_tril(self) -> None:
        for space in self.axes(self.one())[-2:]:
            fix(space, f"only a triangle is kept ({self.where})")
        self.give(self.axes(self.one()), self.origins(self.one()))

    op_triu = op_tril

    def op_overlay(self) -> None:
        """A write in place into a box of the tensor: what is written carries the units of that box."""
        old, new = self.node.args[0].vid, self.node.args[1].vid
        at, take = self.node.args[2], self.node.args[3]
        if at.numel() == math.prod(self.shape(old)) and torch.equal(at, take) and torch.equal(at, _count(at)):
            for space, written in zip(
                self.axes(old), regroup(self.axes(new), self.shape(old), self.where), strict=True
            ):
                unify(space, written, self.where)
            self.give(self.axes(old), self.origins(old))
            return
        box = box_of(self.shape(old), at, take)
        if box is None or [stop - start for start, stop in box] != list(self.shape(new)):
            if self.flow.constant(old) and self.flow.constant(new):
                self.give([Space(size) for size in self.shape(old)])
            else:
                self.unknown()
            return
        for space, written, (start, stop) in zip(self.axes(old), self.axes(new), box, strict=True):
            sizes = [n for n in (start, stop - start, space.size - stop) if n]
            unify(self._pieces(space, sizes)[1 if start else 0], written, self.where)
        self.give(self.axes(old), self.origins(old))

    # products
    def op_mm(self) -> None:
        a, b = (r.vid for r in self.node.args[:2])
        self._contract(a, -1, b, -2)
        self._made(a, [0], b)
        self._made(b, [1], a)
        self.give([self.axes(a)[0], self.axes(b)[1]], [self.origins(a)[0], self.origins(b)[1]])

    def op_bmm(self) -> None:
        a, b = (r.vid for r in self.node.args[:2])
        unify(self.axes(a)[0], self.axes(b)[0], self.where)
        self._contract(a, -1, b, -2)
        self._made(a, [0, 1], b)
        self._made(b, [0, 2], a)
        batch = self.axes(a)[0]
        if all(self.flow.tape.values[vid].data for vid in (a, b)):
            self.mark([batch], "attention")
        origins = [self.origins(a)[0] | self.origins(b)[0], self.origins(a)[1], self.origins(b)[2]]
        self.give([batch, self.axes(a)[1], self.axes(b)[2]], origins)

    def _made(self, vid: int, axes: Sequence[int], data: int) -> None:
        for axis in axes:
            self.use(vid, axis, "out", data)

    def _contract(self, a: int, at: int, b: int, bt: int) -> None:
        unify(self.axes(a)[at], self.axes(b)[bt], self.where)
        self.use(a, at, "in", b)
        self.use(b, bt, "in", a)
        for vid, axis in ((a, at), (b, bt)):
            self._meet_constant(vid, axis)
        if not self.flow.weights_only(a) and not self.flow.weights_only(b):
            self.mark([self.axes(a)[at]], "dot")
        elif self.flow.weights_only(a) and self.flow.weights_only(b):
            fix(self.axes(a)[at], f"weights meet weights ({self.where})")

    def op_convolution(self) -> None:
        x, w = self.node.args[0].vid, self.node.args[1].vid
        transposed, groups = self.node.args[6], self.node.args[8]
        out = self.outs[0]
        xs, ws = self.axes(x), self.axes(w)
        if not self.flow.weights_only(w):
            self.unknown()
            return
        ins, outs = (0, 1) if transposed else (1, 0)
        if groups == 1:
            unify(xs[1], ws[ins], self.where)
            channels = ws[outs]
        else:
            each = [xs[1].size // groups, self.shape(out)[1] // groups]
            count = Space(groups)
            count.mark("groups", self.node.module or "the model")
            self.flow.grouped[self.node.module] = count
            unify(xs[1], product([count, Space(each[0])]), self.where)
            stored = ws[0]
            unify(stored, product([count, Space(stored.size // groups)]), self.where)
            whole = product([count, ws[1]])
            if transposed:
                unify(xs[1], ws[0], self.where)
                channels = whole
            else:
                unify(xs[1], whole, self.where)
                channels = ws[0]
        for axis in range(len(ws)):
            if axis == 0 and groups > 1:
                self.use(w, axis, "out", x)
            else:
                self.use(w, axis, "out" if axis == outs else "in", x)
            if axis > 1:
                fix(ws[axis], f"it is a side of the kernel ({self.where})")
        if len(self.node.args) > 2 and isinstance(self.node.args[2], Ref):
            bias = self.node.args[2].vid
            unify(self.axes(bias)[0], channels, self.where)
            self.use(bias, 0, "add")
        for space in xs[2:]:
            fix(space, f"neighbours are put together ({self.where})")
        self.give([xs[0], channels, *(Space(size) for size in self.shape(out)[2:])])

    # reductions and norms
    def _reduce(self, what: str) -> None:
        vid = self.one()
        rank = len(self.shape(vid))
        dims = self.arg(1, "dim")
        if isinstance(dims, bool):
            dims = None
        listed: Sequence[int] = [dims] if isinstance(dims, int) else dims or range(rank)
        over = {d % rank for d in listed}
        axes = self.axes(vid)
        if self.flow.weights_only(vid):
            for d in over:
                fix(axes[d], f"it is a {what} over weights ({self.where})")
        else:
            self.mark([axes[d] for d in sorted(over)], what)
        shape = self.shape(self.outs[0])
        keep = len(shape) == rank
        new = [Space(1) if d in over else axes[d] for d in range(rank) if keep or d not in over]
        origins = [NONE if d in over else self.origins(vid)[d] for d in range(rank) if keep or d not in over]
        for out in range(len(self.outs)):
            self.give(new, origins, out)

    def op_sum(self) -> None:
        """A sum that is divided by how many there were is a mean."""
        count = math.prod(self.shape(self.one())) / max(1, math.prod(self.shape(self.outs[0])))
        nodes = [self.flow.tape.nodes[n] for n in self.flow.tape.consumers[self.outs[0]]]
        by = [n.args[1] for n in nodes if _name(n.op) == "div" and len(n.args) > 1]
        by += [1 / n.args[1] for n in nodes if _name(n.op) == "mul" and isinstance(n.args[1], float) and n.args[1]]
        mean = len(by) == len(nodes) > 0 and all(isinstance(b, (int, float)) and abs(b - count) < 1e-9 for b in by)
        self._reduce("mean" if mean else "sum")

    def op_mean(self) -> None:
        self._reduce("mean")

    op_var = op_var_mean = op_std = op_mean

    def op_amax(self) -> None:
        self._reduce("max")

    op_amin = op_max = op_min = op_any = op_all = op_amax

    def op_argmax(self) -> None:
        vid = self.one()
        for space in self.axes(vid):
            fix(space, f"the place of one unit is taken ({self.where})")
        self.give([Space(size) for size in self.shape(self.outs[0])])

    def op_linalg_vector_norm(self) -> None:
        vid = self.one()
        dims = self.arg(2, "dim")
        self.node = Node(self.node.op, (Ref(vid), dims), {}, self.node.outs, self.node.module, self.node.inputs)
        self._reduce("sum")

    def op_native_layer_norm(self) -> None:
        vid, over = self.one(), len(self.node.args[1])
        axes = self.axes(vid)
        self.mark(axes[-over:], "norm")
        self.give(axes)
        for out in (1, 2):
            self.give([*axes[:-over], *(Space(1) for _ in range(over))], out=out)

    def op_native_group_norm(self) -> None:
        vid, groups = self.one(), self.node.args[6]
        axes = self.axes(vid)
        count, each = Space(groups), Space(axes[1].size // groups)
        count.mark("groups", self.node.module or "the model")
        self.flow.grouped[self.node.module] = count
        unify(axes[1], product([count, each]), self.where)
        self.mark([each, *axes[2:]], "norm")
        self.give(axes)

    def op_softmax(self) -> None:
        vid = self.one()
        self.mark([self.axes(vid)[self.node.args[1]]], "softmax")
        self.give(self.axes(vid), self.origins(vid))

    op_safe_softmax = op_log_softmax = op_softmax

    def op_cumsum(self) -> None:
        vid = self.one()
        fix(self.axes(vid)[self.node.args[1]], f"their order counts ({self.where})")
        for out in range(len(self.outs)):
            self.give(self.axes(vid), self.origins(vid), out)

    op_sort = op_cumsum

    # tables
    def op_index(self) -> None:
        vid, given = self.one(), list(self.node.args[1])
        picks = [i for i, r in enumerate(given) if isinstance(r, Ref)]
        rank = len(self.shape(vid))
        index = [given[i].vid for i in picks]
        if any(self.flow.tape.values[i].dtype == torch.bool for i in index):
            self.unknown()
            return
        shapes = [self.shape(i) for i in index]
        broad = torch.broadcast_shapes(*shapes)
        looked: list[Space] = [Space(size) for size in broad]
        for i, shape in zip(index, shapes, strict=True):
            for at, size in enumerate(shape):
                to = at + len(broad) - len(shape)
                if size == broad[to] and size > 1:
                    unify(looked[to], self.axes(i)[at], self.where)
        data = any(self.flow.tape.values[i].data for i in index)
        for d in picks:
            self.mark([self.axes(vid)[d]], "lookup" if data else "position")
            self.use(vid, d, "rows")
        rest = [d for d in range(rank) if d not in picks]
        for d in rest:
            self.use(vid, d, "out")
        together = picks == list(range(picks[0], picks[0] + len(picks)))
        at = picks[0] if together else 0
        axes: list[Space] = [self.axes(vid)[d] for d in rest]
        origins: list[Origin] = [self.origins(vid)[d] for d in rest]
        axes[at:at] = looked
        origins[at:at] = [NONE] * len(looked)
        self.give(axes, origins)

    def op_embedding(self) -> None:
        table, index = (r.vid for r in self.node.args[:2])
        self.mark([self.axes(table)[0]], "lookup" if self.flow.tape.values[index].data else "position")
        self.use(table, 0, "rows")
        self.use(table, 1, "out")
        self.give(
            [*self.axes(index), self.axes(table)[1]], [*(NONE for _ in self.shape(index)), self.origins(table)[1]]
        )

    def op_index_select(self) -> None:
        vid = self.one()
        dim = self.node.args[1] % len(self.shape(vid))
        self.mark([self.axes(vid)[dim]], "position")
        axes = list(self.axes(vid))
        axes[dim] = Space(self.shape(self.outs[0])[dim])
        for d in range(len(axes)):
            self.use(vid, d, "rows" if d == dim else "out")
        self.give(axes, self.origins(vid))

    def op_gather(self) -> None:
        vid = self.one()
        if not self.flow.constant(vid):
            self.unknown()
            return
        self.give([Space(size) for size in self.shape(self.outs[0])])

    def op_repeat(self) -> None:
        vid, times = self.one(), list(self.node.args[1])
        axes = [*(Space(1) for _ in range(len(times) - len(self.shape(vid)))), *self.axes(vid)]
        origins = [*(NONE for _ in range(len(times) - len(self.shape(vid)))), *self.origins(vid)]
        new = [axis if n == 1 else product([Space(n), axis]) for axis, n in zip(axes, times, strict=True)]
        self.give(new, origins)


def _count(at: Tensor) -> Tensor:
    return torch.arange(at.numel())


def box_of(shape: Sequence[int], at: Tensor, take: Tensor) -> list[tuple[int, int]] | None:
    """(start, stop) along each axis of the flat positions `at`, where they are a box that is filled in order."""
    if not at.numel() or not torch.equal(take, _count(at)):
        return None
    places = torch.unravel_index(at, list(shape))
    box = [(int(p.min()), int(p.max()) + 1) for p in places]
    if math.prod(stop - start for start, stop in box) != at.numel() or bool((at[1:] <= at[:-1]).any()):
        return None
    return box


def _regrouped(old: Sequence[int], origins: Sequence[Origin], new: Sequence[int]) -> list[Origin]:
    """The origins of the axes after a row-major view."""
    out: list[Origin] = [NONE] * len(new)
    i = j = 0
    a = b = 1
    while i < len(old) or j < len(new):
        start, begun = i, j
        if i < len(old):
            a, i = old[i], i + 1
        if j < len(new):
            b, j = new[j], j + 1
        while a != b and (i < len(old) or j < len(new)):
            if a < b and i < len(old):
                a, i = a * old[i], i + 1
            elif j < len(new):
                b, j = b * new[j], j + 1
            else:
                a, i = a * old[i], i + 1
        union = frozenset().union(*origins[start:i])
        for at in range(begun, j):
            out[at] = union if new[at] > 1 else NONE
        a = b = 1
    return out
