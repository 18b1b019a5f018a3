"""Repeated blocks: what settled a value of one block is tried on the same value of the next.

A network of 48 layers is one block 48 times. Once a value of one block is settled, the same value of the next block
comes, by all likelihood, from the next block of the source: the names with their numbers moved on. That is tried first
and checked by what it computes; only where the check fails is the search done again.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from surgery.mapper.grid import Grid
from surgery.mapper.unify import Assignment

if TYPE_CHECKING:
    from surgery.mapper.affine import Affine
    from surgery.mapper.hypothesis import Hypothesis
    from surgery.mapper.reference import Reference

Where = tuple[str, Grid, float]  # elements of a tensor, by its name, times a constant


@dataclass(frozen=True)
class Recipe:
    """How the open tensors of a value were settled: by name, so that it can be read with other numbers. `occurs`: what
    that computed was a value of the reference (not a multiple of one). `folds`: the weights took a constant that the
    reference multiplies by later. `constants`: those of the tensors that keep their own values."""

    names: tuple[str, ...]
    steps: tuple[tuple[Where, tuple[Where, ...]], ...]
    occurs: bool
    folds: bool = False
    constants: tuple[str, ...] = ()


MOST = 4  # recipes that look alike (first and second norm of a block) are kept side by side


def noted(old: Sequence[Recipe], new: Recipe) -> tuple[Recipe, ...]:
    """The recipes for one kind of value, the latest first."""
    return (new, *old[: MOST - 1])


def pattern(name: str) -> str:
    return re.sub(r"\d+", "#", name)


def numbers(name: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", name)]


def renumbered(name: str, values: Sequence[int]) -> str:
    left = iter(values)
    return re.sub(r"\d+", lambda _: str(next(left)), name)


def _named(p: Affine, grid: Grid) -> Where | None:
    held = p.holder(grid.lo)
    if held is None or grid.hi >= held[0] + held[1]:
        return None
    return held[2], grid.shifted(-held[0]), 1.0


def _source(ref: Reference, grid: Grid) -> Where | None:
    if (plain := _named(ref, grid)) is not None:
        return plain
    for (first, by), offset in ref.multiples.items():
        held = ref.holder(first)
        if held is not None and held[0] == first and offset <= grid.lo and grid.hi < offset + held[1]:
            return held[2], grid.shifted(-offset), by
    return None


def recipe(
    h: Hypothesis, names: Sequence[str], assignments: Sequence[Assignment], *, occurs: bool, folds: bool = False
) -> Recipe | None:
    """The assignments by names; None where one speaks of computed weights or of several tensors at once."""
    steps = []
    for a in assignments:
        if not a.target.numel():
            continue
        target = _named(h, a.target)
        sources = [_source(h.reference, s) for s in a.sources]
        if target is None or any(s is None for s in sources):
            return None
        steps.append((target, tuple(s for s in sources if s is not None)))
    return Recipe(tuple(names), tuple(steps), occurs, folds, tuple(n for n in names if n in h.constant))


def moved_on(r: Recipe, names: Sequence[str], h: Hypothesis) -> Iterator[tuple[list[Assignment], list[str]]]:
    """The recipe for other open tensors of the same patterns, and which of these keep their own values: the numbers in
    their names say by how much the source's move on."""
    put: dict[str, str] = {}
    steps: set[int] = set()
    for old, new in zip(r.names, names, strict=True):
        steps |= {b - a for a, b in zip(numbers(old), numbers(new), strict=True)} - {0}
        put[old] = new
    constants = [put[n] for n in r.constants]
    if len(steps) != 1 or not all(n in h.maybe for n in constants):
        return
    (step,) = steps
    if constants and not r.steps:
        yield [], constants
    most = max((len(numbers(n)) for _, sources in r.steps for n, _, _ in sources), default=0)
    for place in range(most):
        made = _at(r, put, h, place, step)
        if made is not None:
            yield made, constants


def _at(r: Recipe, put: dict[str, str], h: Hypothesis, place: int, step: int) -> list[Assignment] | None:
    """The recipe with number `place` of every source name moved on by `step`."""
    out = []
    for (target, at, _), sources in r.steps:
        if (
            target not in put
            or (mine := _placed(h, put[target], at, h.tape.values[h.tape.params[target]].shape)) is None
        ):
            return None
        theirs = []
        for name, grid, by in sources:
            values = numbers(name)
            if len(values) > place:
                values[place] += step
            have = h.reference.tape.values[h.reference.tape.params[name]].shape
            found = _placed(h.reference, renumbered(name, values), grid, have)
            if found is None:
                return None
            theirs.append(h.reference.times(found, by))
        out.append(Assignment(mine, theirs))
    return out


def _placed(p: Affine, name: str, local: Grid, shape: tuple[int, ...]) -> Grid | None:
    """Elements of another tensor of this shape."""
    vid = p.tape.params.get(name)
    if vid is None or p.tape.values[vid].shape != shape:
        return None
    return local.shifted(p.offset[vid])
