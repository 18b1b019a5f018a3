"""Weights that are products of weights: a norm's scale is a gain times the inverse of a deviation.

A product is a bag of factors: `a * (b * c)` and `(c * a) * b` are one thing. Where a product of the target must equal a
product of the reference, the factors correspond: those that are computed alike to each other (an inverse deviation is
never bent to stand for a gain, nor one epsilon for another), those that are settled to what they are settled to, and
the rest in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from surgery.mapper.affine import Affine
from surgery.mapper.grid import Grid
from surgery.mapper.kinds import base
from surgery.mapper.record import Node, Ref
from surgery.mapper.reference import Reference
from surgery.mapper.terms import Virtual

if TYPE_CHECKING:
    from surgery.mapper.hypothesis import Hypothesis

MOST = 4  # factors that are put in every order


def virtual_holder(p: Affine, numbers: Tensor) -> Virtual | None:
    """The computed weight that holds all of these elements."""
    lo, hi = int(numbers.min()), int(numbers.max())
    if lo < p.real_end:
        return None
    for u in p.virtual.values():
        if u.offset <= lo and hi < u.offset + u.size:
            return u
    return None


def multiplied(p: Affine, u: Virtual) -> tuple[int, int] | None:
    """The two values of weights whose product a computed weight is."""
    v = p.tape.values[u.vid]
    if u.how or v.origin != "node":
        return None
    node: Node = p.tape.nodes[v.node]
    if base(node.op) != "mul" or not all(isinstance(a, Ref) and p.weight_only(a.vid) for a in node.args[:2]):
        return None
    return node.args[0].vid, node.args[1].vid


def factors(p: Affine, numbers: Tensor) -> list[Tensor]:
    """The weight elements whose product each of these elements is: themselves where they are no product."""
    if not numbers.numel():
        return [numbers]
    made = p.product_holder(int(numbers.min()), int(numbers.max())) if isinstance(p, Reference) else None
    if made is not None:  # by spreading a scale out (see spread.py)
        return [g for f in made.at(numbers - made.offset) for g in factors(p, f)]
    u = virtual_holder(p, numbers)
    pair = multiplied(p, u) if u is not None else None
    if u is None or pair is None:
        return [numbers]
    shape, at = p.tape.values[u.vid].shape, numbers - u.offset
    return [f for vid in pair for f in factors(p, p.weight_matrix(vid).dense().expand(shape).reshape(-1)[at])]


def pair(
    h: Hypothesis, mine: list[Tensor], theirs: list[Tensor], settle: Callable[[Hypothesis, Tensor, Tensor], bool]
) -> bool:
    """Make a product of target weights equal to a product of source weights, factor by factor. `settle` makes one
    factor equal to one."""
    ref = h.reference
    left, right = list(mine), list(theirs)
    for a in mine:  # what is settled already
        found = next((b for b in right if h.settled_as(a, b)), None)
        if found is not None:
            left, right = _without(left, a), _without(right, found)
    for a in [a for a in left if virtual_holder(h, a) is not None]:
        kind = _how(h, a)
        for b in [b for b in right if _how(ref, b) == kind]:
            state = h.mark()
            if settle(h, a, b):
                left, right = _without(left, a), _without(right, b)
                break
            h.back_to(state)
        else:
            return False
    if len(left) == 1 and len(right) > 1:
        return settle(h, left[0], ref.multiply([Grid.of(r) for r in right]).flat())
    if len(left) != len(right) or len(left) > MOST:
        return False
    for order in itertools.permutations(right):
        state = h.mark()
        if all(settle(h, a, b) for a, b in zip(left, order, strict=True)):
            return True
        h.back_to(state)
    return False


def _without(items: list[Tensor], one: Tensor) -> list[Tensor]:
    return [x for x in items if x is not one]


def _how(p: Affine, numbers: Tensor) -> str:
    """By what a weight is computed; "" where it is stored."""
    u = virtual_holder(p, numbers)
    if u is None:
        return ""
    return u.how or base(p.tape.nodes[p.tape.values[u.vid].node].op)
