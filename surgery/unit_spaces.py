"""What an axis carries: a space of units, which reshapes factor and cuts divide, found by unification.

An axis of a tensor carries a sequence of units: the hidden width, the neurons of one MLP, heads times head width. Two
axes that an operator lines up carry the same units, so their spaces are made one (union-find). A view that reads an
axis as several makes it a product of spaces, slow to fast; a split or a concatenation makes it a sum. What is neither
is a leaf: the smallest thing that can be widened, shrunk or pruned on its own.

Sources: Robinson 1965 (unification); Fang et al., arXiv 2301.12900 (dependency graphs of structural pruning).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

Index = np.ndarray  # int64, one old position for each new one


@dataclass(eq=False, slots=True)
class Space:
    """`size` units in order. `form`: "leaf", "product" or "sum" of `parts`; or one with another space (`same`).
    `marks`: what operators do with it, and where: {"norm": ["h.0.ln_1"]}."""

    size: int
    form: str = "leaf"
    parts: list[Space] = field(default_factory=list)
    same: Space | None = None
    marks: dict[str, list[str]] = field(default_factory=dict)

    def mark(self, what: str, where: str) -> None:
        """Note what an operator does with these units; the same twice is one note."""
        seen = find(self).marks.setdefault(what, [])
        if where not in seen:
            seen.append(where)


def find(space: Space) -> Space:
    """The space that stands for all that are one with it."""
    root = space
    while root.same is not None:
        root = root.same
    while space.same is not None:
        space.same, space = root, space.same
    return root


def factors(space: Space) -> list[Space]:
    """The factors, slow to fast; those of one unit are left out, for no layout shows them."""
    space = find(space)
    if space.size == 1:
        return []
    if space.form == "product":
        return [factor for part in space.parts for factor in factors(part)]
    return [space]


def pieces(space: Space) -> list[Space]:
    """The summands, in order."""
    space = find(space)
    if space.form == "sum":
        return [piece for part in space.parts for piece in pieces(part)]
    return [space]


def product(parts: Sequence[Space]) -> Space:
    """The space that an axis carries which holds these, slow to fast."""
    flat = [factor for part in parts for factor in factors(part)]
    if len(flat) == 1:
        return flat[0]
    return Space(math.prod(part.size for part in flat), "product", flat) if flat else Space(1)


def joined(parts: Sequence[Space]) -> Space:
    """The space of these one after the other."""
    flat = [piece for part in parts for piece in pieces(part) if piece.size]
    return flat[0] if len(flat) == 1 else Space(sum(part.size for part in flat), "sum", flat)


def leaves(space: Space) -> Iterator[Space]:
    """The leaves of more than one unit, each as often as it stands there."""
    space = find(space)
    if space.form == "leaf":
        if space.size > 1:
            yield space
        return
    for part in space.parts:
        yield from leaves(part)


def push_down(space: Space) -> None:
    """What was marked on a whole holds of its parts."""
    space = find(space)
    for part in space.parts:
        for what, places in space.marks.items():
            for place in places:
                part.mark(what, place)
        push_down(part)


def _bind(leaf: Space, form: str, parts: list[Space]) -> None:
    leaf.form, leaf.parts = form, parts


def fix(space: Space, why: str) -> None:
    """These units cannot be changed by a rule: `why` names the operator and its module."""
    space.mark("fixed", why)


def unify(a: Space, b: Space, where: str) -> None:
    """Both carry the same units, in the same order. Where their structures do not fit, both are fixed."""
    a, b = find(a), find(b)
    if a is b or a.size == b.size == 1:
        return
    if a.size != b.size:
        fix(a, where)
        fix(b, where)
    elif a.form == "leaf" or b.form == "leaf":
        leaf, other = (a, b) if a.form == "leaf" else (b, a)
        for what, places in leaf.marks.items():
            for place in places:
                other.mark(what, place)
        leaf.same = other
    elif a.form == b.form == "product":
        _unify_products(a, b, where)
    elif a.form == b.form == "sum":
        cuts = sorted({*_ends(a), *_ends(b)})
        sizes = [end - start for start, end in itertools.pairwise([0, *cuts])]
        for one, other in zip(cut(a, sizes, where), cut(b, sizes, where), strict=True):
            unify(one, other, where)
    else:
        whole, summed = (a, b) if a.form == "product" else (b, a)
        first, *rest = factors(whole)
        slow, fast = split(summed, first.size, where)
        unify(slow, first, where)
        unify(fast, product(rest), where)


def _ends(space: Space) -> list[int]:
    return list(np.cumsum([piece.size for piece in pieces(space)]))


def _unify_products(a: Space, b: Space, where: str) -> None:
    mine, yours = factors(a), factors(b)
    while mine and yours:
        one, other = mine.pop(0), yours.pop(0)
        if one.size > other.size:
            slow, fast = split(one, other.size, where)
            one, mine = slow, [*factors(fast), *mine]
        elif one.size < other.size:
            slow, fast = split(other, one.size, where)
            other, yours = slow, [*factors(fast), *yours]
        unify(one, other, where)


def split(space: Space, slow: int, where: str) -> tuple[Space, Space]:
    """The two factors of a space that a view reads as `slow` times the rest. Where that does not go, fixed ones."""
    space = find(space)
    if slow == 1 or slow == space.size:
        return (Space(1), space) if slow == 1 else (space, Space(1))
    if space.size % slow == 0 and space.form == "leaf":
        parts = [Space(slow), Space(space.size // slow)]
        _bind(space, "product", parts)
        return parts[0], parts[1]
    if space.size % slow == 0 and space.form == "product":
        left, rest = slow, factors(space)
        taken: list[Space] = []
        while left > 1:
            factor = rest.pop(0)
            if left % factor.size == 0:
                taken.append(factor)
                left //= factor.size
            elif factor.size % left == 0:
                first, second = split(factor, left, where)
                taken.append(first)
                rest.insert(0, second)
                left = 1
            else:
                return _unsplit(space, slow, where)
        return product(taken), product(rest)
    fast = space.size // slow
    if space.size % slow == 0 and all(end % fast == 0 or _within(space, end, fast) for end in _ends(space)):
        equal = cut(space, [fast] * slow, where)
        for piece in equal[1:]:
            unify(equal[0], piece, where)
        count = Space(slow)
        fix(count, f"it counts the equal parts of one axis ({where})")
        return count, equal[0]
    return _unsplit(space, slow, where)


def _within(space: Space, end: int, fast: int) -> bool:
    """A cut inside an equal part is no obstacle: every part is cut there."""
    return space.size // fast <= 64 and end % fast != 0


def _unsplit(space: Space, slow: int, where: str) -> tuple[Space, Space]:
    fix(space, where)
    parts = (Space(slow), Space(max(1, space.size // slow)))
    for part in parts:
        fix(part, where)
    return parts


def cut(space: Space, sizes: Sequence[int], where: str) -> list[Space]:
    """The pieces of a space that is cut into these sizes. Where a cut goes through a factor, fixed ones."""
    space, sizes = find(space), [int(size) for size in sizes]
    if len(sizes) == 1:
        return [space]
    if space.form == "leaf":
        parts = [Space(size) for size in sizes]
        _bind(space, "sum", [part for part in parts if part.size])
        return parts
    if space.form == "product":
        first, *rest = factors(space)
        unit = space.size // first.size
        if all(size % unit == 0 for size in sizes):
            return [product([part, *rest]) for part in cut(first, [size // unit for size in sizes], where)]
        fix(space, where)
        parts = [Space(size) for size in sizes]
        for part in parts:
            fix(part, where)
        return parts
    ends = set(np.cumsum(sizes).tolist())
    fine: list[Space] = []
    at = 0
    for piece in pieces(space):
        inner = sorted({end - at for end in ends if at < end < at + piece.size} | {piece.size})
        lengths = [end - start for start, end in itertools.pairwise([0, *inner])]
        fine += cut(piece, lengths, where)
        at += piece.size
    out: list[Space] = []
    for size in sizes:
        taken: list[Space] = []
        while sum(part.size for part in taken) < size:
            taken.append(fine.pop(0))
        out.append(joined(taken) if taken else Space(0))
    return out


def regroup(axes: Sequence[Space], shape: Sequence[int], where: str) -> list[Space]:
    """The spaces of the axes after a row-major view as `shape`."""
    rest = [factor for axis in axes for factor in factors(axis)]
    out: list[Space] = []
    for size in shape:
        taken: list[Space] = []
        left = int(size)
        while left > 1:
            if not rest:
                return _opaque(axes, shape, where)
            factor = find(rest.pop(0))
            if factor.form == "product":
                rest = [*factors(factor), *rest]
                continue
            if left % factor.size == 0:
                taken.append(factor)
                left //= factor.size
            elif factor.size % left == 0:
                slow, fast = split(factor, left, where)
                taken.append(slow)
                rest = [*factors(fast), *rest]
                left = 1
            else:
                return _opaque(axes, shape, where)
        out.append(product(taken))
    return out


def _opaque(axes: Sequence[Space], shape: Sequence[int], where: str) -> list[Space]:
    out = [Space(int(size)) for size in shape]
    for space in (*axes, *out):
        fix(space, where)
    return out


def index_of(space: Space, chosen: Mapping[Space, Index]) -> Index:
    """Which old position each new position of an axis takes its values from, where `chosen` says so of some leaves."""
    space = find(space)
    if space.form == "leaf":
        return chosen.get(space, np.arange(space.size))
    if space.form == "product":
        out = np.zeros(1, dtype=np.int64)
        for part in space.parts:
            mine = index_of(part, chosen)
            out = (out[:, None] * find(part).size + mine[None, :]).reshape(-1)
        return out
    starts = np.cumsum([0, *(part.size for part in space.parts)])
    return np.concatenate(
        [index_of(part, chosen) + start for part, start in zip(space.parts, starts[:-1], strict=True)]
    )


def describe(space: Space, name: Mapping[Space, str]) -> str:
    """As a person writes it: "heads*head_dim + heads*head_dim"."""
    space = find(space)
    if space.form == "leaf":
        return name.get(space, str(space.size))
    if space.form == "product":
        texts = [describe(part, name) for part in space.parts]
        return "*".join(f"({text})" if " + " in text else text for text in texts)
    return " + ".join(describe(part, name) for part in space.parts)
