"""Grids of numbers: whatever is done to one, it holds what the same steps make of a dense tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from surgery.mapper.grid import Grid, axes, cut, read

SHAPES = st.lists(st.integers(1, 4), max_size=4).filter(lambda s: math.prod(s) <= 64)
FIRSTS = st.integers(-5, 1000)


def numbers(first: int, shape: list[int]) -> Tensor:
    return torch.arange(first, first + math.prod(shape)).reshape(shape)


def factored(draw: st.DrawFn, n: int) -> list[int]:
    """A shape of n elements."""
    shape = []
    while n > 1 and len(shape) < 5:
        d = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
        shape.append(d)
        n //= d
    return [*shape, n] if n > 1 else shape


def step(draw: st.DrawFn, g: Grid, t: Tensor, ops: tuple[str, ...]) -> tuple[Grid, Tensor]:
    """One step, on both."""
    op = draw(st.sampled_from(ops))
    axis = draw(st.integers(0, t.ndim - 1)) if t.ndim else 0
    if op == "reshape":
        shape = factored(draw, t.numel())
        return g.reshape(*shape), t.reshape(shape)
    if op == "permute" and t.ndim:
        dims = draw(st.permutations(range(t.ndim)))
        return g.permute(dims), t.permute(dims)
    if op == "unsqueeze":
        axis = draw(st.integers(0, t.ndim))
        return g.unsqueeze(axis), t.unsqueeze(axis)
    if op == "expand" and t.numel() <= 64:
        shape = [draw(st.integers(1, 3)) if n == 1 else n for n in t.shape]
        shape = [draw(st.integers(1, 2)), *shape] if not t.ndim or draw(st.booleans()) else shape
        return g.expand(shape), t.expand(shape)
    if not t.ndim:
        return g, t
    if op == "take":
        index = torch.tensor(draw(st.lists(st.integers(0, t.shape[axis] - 1), min_size=1, max_size=4)))
        return g.take(axis, index), t.index_select(axis, index)
    if op == "lines":  # in another order, none of them twice
        index = torch.tensor(draw(st.permutations(range(t.shape[axis]))))[: draw(st.integers(1, t.shape[axis]))]
        return g.take(axis, index), t.index_select(axis, index)
    if op == "narrow":
        start = draw(st.integers(0, t.shape[axis] - 1))
        length = draw(st.integers(1, t.shape[axis] - start))
        return g.narrow(axis, start, length), t.narrow(axis, start, length)
    if op == "cat" and t.numel() <= 64:
        start, by = draw(st.integers(0, t.shape[axis] - 1)), draw(st.sampled_from([0, 7, 500]))
        more = g.narrow(axis, start, t.shape[axis] - start).shifted(by)
        return Grid.cat([g, more], axis), torch.cat([t, t.narrow(axis, start, t.shape[axis] - start) + by], axis)
    return g, t


EVERY = ("reshape", "permute", "expand", "take", "narrow", "unsqueeze", "cat")
APART = ("reshape", "permute", "lines", "narrow", "unsqueeze")  # no number comes to stand twice
BOXES = ("permute", "expand", "take", "narrow", "unsqueeze")  # an axis stays an axis


@st.composite
def chains(draw: st.DrawFn, ops: tuple[str, ...] = EVERY, first: int | None = None) -> tuple[Grid, Tensor, list[int]]:
    """A grid, the same as a tensor, and the shape that both began with."""
    shape = draw(SHAPES)
    at = draw(FIRSTS) if first is None else first
    g, t = Grid.whole(at, shape), numbers(at, shape)
    for _ in range(draw(st.integers(0, 5))):
        g, t = step(draw, g, t, ops)
    return g, t, shape


@given(chains())
@settings(max_examples=150, deadline=None)
def test_steps_on_a_grid_are_steps_on_its_numbers(made: tuple[Grid, Tensor, list[int]]) -> None:
    g, t, _ = made
    assert g.shape == tuple(t.shape)
    assert (g.ndim, g.numel()) == (t.ndim, t.numel())
    assert torch.equal(g.dense(), t)
    assert torch.equal(g.flat(), t.reshape(-1))
    assert (g.lo, g.hi, g.first) == (int(t.min()), int(t.max()), int(t.reshape(-1)[0]))
    assert g.holes == (int(t.min()) <= 0)
    assert g.injective == (len(torch.unique(t)) == t.numel())
    for p in g.parts:  # each on axes of its own, from zero up
        assert (p.ndim, int(p.min())) == (g.ndim, 0)
    for p, q in itertools.combinations(g.parts, 2):
        assert not any(m > 1 and n > 1 for m, n in zip(p.shape, q.shape, strict=True))


@given(chains(APART))
@settings(max_examples=100, deadline=None)
def test_moving_elements_makes_none_stand_twice(made: tuple[Grid, Tensor, list[int]]) -> None:
    assert made[0].injective


@given(chains())
@settings(max_examples=100, deadline=None)
def test_even_steps(made: tuple[Grid, Tensor, list[int]]) -> None:
    """Strides say it all where there are some, and there are some wherever the steps are even."""
    g, t, _ = made
    even = t.reshape(-1)[0].clone()
    for a, n in enumerate(t.shape):
        by = int((t.narrow(a, 1, 1) - t.narrow(a, 0, 1)).reshape(-1)[0]) if n > 1 else 0
        even = even + (torch.arange(n) * by).reshape([-1 if b == a else 1 for b in range(t.ndim)])
    assert (g.strides is not None) == torch.equal(even.expand(t.shape), t)
    if g.strides is not None:
        assert torch.equal(Grid.strided(g.first, g.shape, g.strides).dense(), t)


@given(chains())
@settings(max_examples=150, deadline=None)
def test_the_same_numbers_written_down_otherwise(made: tuple[Grid, Tensor, list[int]]) -> None:
    g, t, _ = made
    other = Grid.of(t)
    assert g.same(g)
    assert g.same(other)
    assert other.same(g)
    assert other.key() == Grid.of(t.clone()).key()
    assert g.key() == g.shifted(3).shifted(-3).key()
    for changed in (g.shifted(1), g.unsqueeze(0)):
        assert not g.same(changed)
        assert g.key() != changed.key()
    u = t.clone().reshape(-1)
    u[-1] += 1
    assert not g.same(Grid.of(u.reshape(t.shape)))
    assert other.key() != Grid.of(u.reshape(t.shape)).key()


@given(chains(), st.data())
@settings(max_examples=100, deadline=None)
def test_numbers_at_coordinates(made: tuple[Grid, Tensor, list[int]], data: st.DataObject) -> None:
    g, t, _ = made
    flat = torch.tensor(data.draw(st.lists(st.integers(0, t.numel() - 1), min_size=1, max_size=6)))
    where = list(torch.unravel_index(flat, t.shape)) if t.ndim else []
    assert torch.equal(g.at(where), t[tuple(where)] if where else t)


@given(chains(), st.data())
@settings(max_examples=100, deadline=None)
def test_once_keeps_the_first_of_equal_lines(made: tuple[Grid, Tensor, list[int]], data: st.DataObject) -> None:
    g, t, _ = made
    if t.ndim < 2:  # no lines
        return
    axis = data.draw(st.integers(0, t.ndim - 1))
    lines = [t.select(axis, i) for i in range(t.shape[axis])]
    first = [i for i, x in enumerate(lines) if not any(torch.equal(x, y) for y in lines[:i])]
    assert torch.equal(g.once(axis).dense(), t.index_select(axis, torch.tensor(first)))


@given(chains(), st.data())
@settings(max_examples=100, deadline=None)
def test_which_numbers_it_holds(made: tuple[Grid, Tensor, list[int]], data: st.DataObject) -> None:
    g, t, _ = made
    some = data.draw(st.lists(st.integers(int(t.min()) - 3, int(t.max()) + 3), max_size=6)) if t.numel() else [0]
    for number in [*some, *t.reshape(-1)[:4].tolist()]:
        assert (number in g) == bool((t == number).any())


# -- reading and placing ----------------------------------------------------------------------------------------------
@given(chains(first=0))
@settings(max_examples=100, deadline=None)
def test_reading_at_positions(made: tuple[Grid, Tensor, list[int]]) -> None:
    g, t, _ = made
    flat = torch.rand(max(g.hi + 1, 1) + 3)[3:]  # a tensor that begins somewhere in its storage
    got = read(flat, g)
    assert torch.equal(got, flat[t])
    if g.strides is not None and min(g.strides, default=0) >= 0:
        assert got.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()


def test_reading_backwards_copies() -> None:
    back = Grid.whole(0, (2, 3)).take(1, torch.tensor([2, 1, 0]))
    assert back.strides == (3, -1)
    assert read(torch.arange(6), back).tolist() == [[2, 1, 0], [5, 4, 3]]


def placed(g: Grid, shape: list[int], box: list[Tensor]) -> Tensor:
    """The flat positions that coordinates stand for."""
    out = torch.zeros((), dtype=torch.int64)
    for a, (n, x) in enumerate(zip(shape, box, strict=True)):
        assert x.ndim == g.ndim
        assert 0 <= int(x.min()) <= int(x.max()) < n
        out = out + x * math.prod(shape[a + 1 :])
    return out.expand(g.shape)


@given(chains((*APART, "expand", "take"), first=0))
@settings(max_examples=100, deadline=None)
def test_coordinates_of_positions(made: tuple[Grid, Tensor, list[int]]) -> None:
    g, t, shape = made
    box = axes(g, shape)
    if box is not None:
        assert torch.equal(placed(g, shape, box), t)


@given(chains(BOXES, first=0))
@settings(max_examples=100, deadline=None)
def test_what_keeps_its_axes_has_coordinates(made: tuple[Grid, Tensor, list[int]]) -> None:
    g, t, shape = made
    box = axes(g, shape)
    assert box is not None
    assert torch.equal(placed(g, shape, box), t)


def test_no_product_of_index_sets() -> None:
    assert axes(Grid.of(torch.tensor([0, 4])), (2, 3)) is None  # a diagonal
    assert axes(Grid.of(torch.tensor([1, 2, 3])), (2, 3)) is None  # across the end of a row


# -- several tensors --------------------------------------------------------------------------------------------------
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_borders_of_matrices_side_by_side(heights: list[int], width: int, turned: bool) -> None:
    """Stacked matrices are parted along their rows, where each begins."""
    edges = [1, *(1 + width * n for n in itertools.accumulate(heights))]
    whole = Grid.cat([Grid.whole(e, (n, width)) for e, n in zip(edges[:-1], heights, strict=True)], 0)
    found = cut(whole.transpose(0, 1) if turned else whole, edges[:-1])
    if width == 1 and sum(heights) == 1:  # one number has no axis
        assert found is None
    elif len(heights) == 1:
        assert found is None or len(found[1]) == 1
    else:
        starts = [0, *itertools.accumulate(heights)]
        assert found == (int(turned), list(zip(starts[:-1], heights, strict=True)))


@given(chains(first=1), st.lists(st.integers(2, 40), max_size=3, unique=True))
@settings(max_examples=100, deadline=None)
def test_every_run_is_of_one_tensor(made: tuple[Grid, Tensor, list[int]], more: list[int]) -> None:
    g, t, _ = made
    edges = [1, *more]
    found = cut(g, edges)
    if found is None:
        return
    axis, runs = found
    assert [at for at, _ in runs] == [0, *itertools.accumulate(n for _, n in runs)][:-1]
    assert sum(n for _, n in runs) == t.shape[axis]
    owners = torch.bucketize(t.contiguous(), torch.tensor(sorted(edges)), right=True)
    each = [torch.unique(owners.narrow(axis, at, n)).tolist() for at, n in runs]
    assert all(len(o) == 1 for o in each)
    assert all(a != b for a, b in itertools.pairwise(each))


def test_no_axis_parts_what_is_mixed() -> None:
    assert cut(Grid.whole(1, (2, 4)), [1, 3]) is None  # the border lies within a row


# -- nothing, and one -------------------------------------------------------------------------------------------------
def test_one_number() -> None:
    g = Grid.whole(7, ())
    assert (g.shape, g.lo, g.hi, g.first, g.numel(), g.injective, g.strides) == ((), 7, 7, 7, 1, True, ())
    assert g.dense().tolist() == 7
    assert g.reshape(1, 1).dense().tolist() == [[7]]
    assert g.expand((2, 2)).dense().tolist() == [[7, 7], [7, 7]]
    assert not g.expand((2,)).injective
    assert axes(g.shifted(-7), ()) == []
    assert read(torch.tensor([3.0]), g.shifted(-7)).tolist() == 3.0


@pytest.mark.parametrize(
    "f",
    [
        lambda g: g.reshape(0),
        lambda g: g.reshape(-1, 2, 3),
        lambda g: g.permute((1, 0, 2)) if isinstance(g, Grid) else g.permute(1, 0, 2),
        lambda g: g.narrow(0, 1, 1),
        lambda g: g.unsqueeze(3),
    ],
)
def test_no_numbers(f: Callable[..., Grid]) -> None:
    g, t = f(Grid.whole(5, (2, 0, 3))), f(numbers(5, [2, 0, 3]))
    assert g.shape == tuple(t.shape)
    assert torch.equal(g.dense(), t)
    assert g.numel() == 0
    assert g.injective
    assert g.same(f(Grid.whole(5, (2, 0, 3))))


def test_nothing_beside_something() -> None:
    some, none = Grid.whole(1, (2, 3)), Grid.whole(9, (2, 0))
    assert Grid.cat([none, some], 1).same(some)
    assert Grid.cat([some, none], 1).same(some)
    assert Grid.cat([none, none], 1).shape == (2, 0)
    assert some.narrow(0, 1, 0).shape == (0, 3)


def test_grids_of_no_axis_and_of_no_element() -> None:
    scalar = Grid.whole(3, ())
    assert scalar.permute(()).dense().item() == scalar.expand(()).dense().item() == 3
    empty = Grid.whole(1, (0, 3))
    assert empty.first == 1
    assert empty.strides == (0, 0)
    assert axes(empty, (0, 3)) is None
    assert Grid.whole(5, (2, 0, 3)).reshape(0).same(Grid.of(torch.zeros(0)))
