"""A value in parts: where a program cuts it up, so that each part may come from a place of its own.

One program takes the sigmoid of three gates at once, another of one at a time. As a whole such a value need not occur
in the other program; its parts do.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.mapper.affine import Affine
from surgery.mapper.kinds import base
from surgery.mapper.record import Node, Ref
from surgery.mapper.terms import Term

MOST = 16  # parts of one value
CUTS = frozenset({"slice", "split", "unsafe_split", "split_with_sizes", "unsafe_split_with_sizes", "chunk"})


@dataclass(frozen=True)
class Part:
    """Consecutive lines of a value along one axis."""

    axis: int
    start: int
    length: int

    def of(self, terms: list[Term]) -> list[Term]:
        """The terms of this part of a sum."""
        found = [t.mapped(self.cut) for t in terms]
        return [t for t in found if t.kind == "known" or bool((getattr(t, t.tensors()[-1]) != 0).any())]

    def cut(self, x: Tensor) -> Tensor:
        return x.narrow(self.axis, self.start, self.length)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.length if a == self.axis else n for a, n in enumerate(whole))


def cut_up(p: Affine, vid: int) -> list[Part]:
    """The parts into which the program cuts a value once an elementwise operator has seen it."""
    found = _cut_up(p, vid)
    if found is None:
        return []
    axis, edges = found
    bounds = sorted({0, p.tape.values[vid].shape[axis], *edges})
    if not 2 < len(bounds) <= MOST + 1:
        return []
    return [Part(axis, a, b - a) for a, b in itertools.pairwise(bounds)]


def seen_as(p: Affine, vid: int, part: Tensor) -> list[Tensor]:
    """A part of a value, and what the elementwise operators that consume the value make of the part."""
    out = [part]
    for c in p.tape.consumers[vid]:
        node = p.tape.nodes[c]
        if _elementwise(node, p, vid):
            out.append(p.run(node, {vid: part}))
    return out


def _cut_up(p: Affine, vid: int) -> tuple[int, set[int]] | None:
    axes: set[int] = set()
    edges: set[int] = set()
    for c in p.tape.consumers[vid]:
        node = p.tape.nodes[c]
        if not _elementwise(node, p, vid):
            return None
        for d in p.tape.consumers[node.outs[0]]:
            cut = _edges(p, p.tape.nodes[d])
            if cut is None:
                return None
            axes.add(cut[0])
            edges |= cut[1]
    return (axes.pop(), edges) if len(axes) == 1 else None


def _elementwise(node: Node, p: Affine, vid: int) -> bool:
    return (
        torch.Tag.pointwise in getattr(node.op, "tags", ())
        and node.inputs == (vid,)
        and len(node.outs) == 1
        and p.tape.values[node.outs[0]].shape == p.tape.values[vid].shape
    )


def _edges(p: Affine, node: Node) -> tuple[int, set[int]] | None:
    """(axis, where it is cut) of an operator that cuts its argument up."""
    if base(node.op) not in CUTS or not isinstance(node.args[0], Ref):
        return None
    shape = p.tape.values[node.args[0].vid].shape
    if base(node.op) == "slice":
        axis = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
        if len(node.args) > 4 and node.args[4] != 1:
            return None
        start, end = [*node.args[2:4], None, None][:2]
        a, b, _ = slice(start, end).indices(shape[axis])
        return axis, {a, b}
    axis = (node.args[2] if len(node.args) > 2 else 0) % len(shape)
    sizes = [p.tape.values[o].shape[axis] for o in node.outs if o >= 0]
    return axis, set(itertools.accumulate(sizes)) if math.prod(shape) else set()
