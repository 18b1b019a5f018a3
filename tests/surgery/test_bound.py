"""What is settled of a tensor: pieces put together one after another, against one number an element."""

from __future__ import annotations

import math
from dataclasses import dataclass

import hypothesis.strategies as st
import torch
from hypothesis import given, settings
from torch import Tensor

from surgery.mapper.bound import Bound, Piece, in_box
from surgery.mapper.grid import Grid, read

VALUES = torch.randn(5000, generator=torch.Generator().manual_seed(0))


def fetch(grid: Grid) -> Tensor:
    """A source of which element n has the value VALUES[n]."""
    return read(VALUES, grid)


def piece(shape: tuple[int, ...], at: Grid, *sources: Grid) -> Piece:
    return Piece(at, sources, shape)


def rows(shape: tuple[int, ...], start: int, n: int, first: int) -> Piece:
    """Some rows of a matrix, from as many rows of a source tensor that begins at `first`."""
    return piece(shape, Grid.whole(0, shape).narrow(0, start, n), Grid.whole(first, (n, *shape[1:])))


def put(b: Bound, *pieces: Piece) -> Bound:
    for p in pieces:
        made = b.with_piece(p)
        assert made is not None
        b = made
    return b


# -- one piece and another --------------------------------------------------------------------------------------------
def test_pieces_that_do_not_meet() -> None:
    b = put(Bound((6, 4)), rows((6, 4), 0, 2, 100))
    assert (b.size, b.covered, b.full, len(b.pieces)) == (24, 8, False, 1)
    more = put(b, rows((6, 4), 4, 2, 200), rows((6, 4), 2, 2, 300))
    assert (more.covered, more.full, len(more.pieces)) == (24, True, 3)
    assert more.ids.reshape(6, 4)[:, 0].tolist() == [100, 104, 300, 304, 200, 204]
    assert (b.covered, len(b.pieces)) == (8, 1)  # the one before is as it was


def test_the_same_again_changes_nothing() -> None:
    b = put(Bound((6, 4)), rows((6, 4), 0, 4, 100))
    assert b.with_piece(rows((6, 4), 0, 4, 100)) is b
    assert b.with_piece(rows((6, 4), 1, 2, 104)) is b  # a part of it
    turned = piece((6, 4), b.pieces[0].at.transpose(0, 1), b.pieces[0].sources[0].transpose(0, 1))
    assert b.with_piece(turned) is b


def test_what_contradicts() -> None:
    b = put(Bound((6, 4)), rows((6, 4), 1, 3, 100))
    for p in (
        rows((6, 4), 1, 3, 101),
        rows((6, 4), 2, 1, 100),  # a part of it
        rows((6, 4), 3, 2, 100),  # a row of it and one more
        rows((6, 4), 0, 6, 100),  # all
        piece((6, 4), Grid.whole(0, (6, 4))),  # zero
    ):
        assert b.with_piece(p) is None
    assert b.covered == 12


def test_zero_contradicts_a_weight_and_agrees_with_zero() -> None:
    zero = piece((4,), Grid.whole(0, (4,)))
    b = put(Bound((4,)), zero)
    assert (b.full, b.ids.tolist()) == (True, [-1] * 4)
    assert b.with_piece(zero) is b
    assert b.with_piece(piece((4,), Grid.whole(1, (2,)))) is b
    assert b.with_piece(piece((4,), Grid.whole(1, (2,)), Grid.whole(0, (2,)).take(0, torch.tensor([0, 0])))) is b
    assert b.with_piece(piece((4,), Grid.whole(1, (2,)), Grid.whole(9, (2,)))) is None


def test_a_larger_piece_takes_in_smaller_ones() -> None:
    small = rows((6, 4), 1, 1, 104), rows((6, 4), 3, 2, 112)
    b = put(Bound((6, 4)), *small, rows((6, 4), 0, 6, 100))
    assert (b.full, len(b.pieces)) == (True, 1)
    assert b.shift == 100


def test_of_an_overlap_the_rest_is_kept() -> None:
    b = put(Bound((6, 4)), rows((6, 4), 0, 3, 100), rows((6, 4), 2, 3, 108))
    assert (b.covered, len(b.pieces)) == (20, 2)
    assert b.ids.tolist() == [*range(100, 120), *[0] * 4]
    larger = put(b, rows((6, 4), 1, 5, 104))  # more than what it meets
    assert larger.full
    assert larger.ids.tolist() == list(range(100, 124))
    assert sum(p.at.numel() for p in larger.pieces) == 24


# -- any pieces -------------------------------------------------------------------------------------------------------
@dataclass
class Case:
    """What a tensor is to become, and pieces of that."""

    shape: tuple[int, ...]
    truth: Grid
    pieces: list[Piece]


def box(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    out = []
    for n in shape:
        start = draw(st.integers(0, n - 1))
        out.append((start, draw(st.integers(1, n - start))))
    return out


def part(draw: st.DrawFn, shape: tuple[int, ...], truth: Grid) -> Piece:
    """A box of it, lines in another order, or any elements."""
    at, source = Grid.whole(0, shape), truth
    how = draw(st.sampled_from(["box", "lines", "any"]))
    if how == "any" or not shape:
        n = math.prod(shape)
        some = torch.tensor(draw(st.permutations(range(n)))[: draw(st.integers(1, n))])
        return Piece(Grid.of(at.flat()[some]), (Grid.of(source.flat()[some]),), shape)
    for axis, (start, n) in enumerate(box(draw, shape)):
        if how == "box":
            at, source = at.narrow(axis, start, n), source.narrow(axis, start, n)
        else:
            index = torch.tensor(draw(st.permutations(range(shape[axis])))[:n])
            at, source = at.take(axis, index), source.take(axis, index)
    dims = draw(st.permutations(range(len(shape))))
    at, source = at.permute(dims), source.permute(dims)
    if draw(st.booleans()):
        at, source = at.reshape(-1), source.reshape(-1)
    return Piece(at, (source,), shape)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    if draw(st.booleans()) or not shape:
        truth = Grid.whole(draw(st.integers(1, 99)), shape)
    else:  # from a tensor of another layout
        dims = draw(st.permutations(range(len(shape))))
        theirs = [0] * len(shape)
        for a, d in enumerate(dims):
            theirs[d] = shape[a]
        truth = Grid.whole(draw(st.integers(1, 99)), theirs).permute(dims)
    assert truth.shape == shape
    return Case(shape, truth, [part(draw, shape, truth) for _ in range(draw(st.integers(1, 4)))])


@given(cases(), st.data())
@settings(max_examples=150, deadline=None)
def test_pieces_of_one_truth(c: Case, data: st.DataObject) -> None:
    b, settled = Bound(c.shape), torch.zeros(math.prod(c.shape), dtype=torch.bool)
    for p in c.pieces:
        known = bool(settled[p.at.flat()].all())
        made = b.with_piece(p)
        assert made is not None
        assert known or made is not b
        b = made
        settled[p.at.flat()] = True
        assert torch.equal(b.ids, torch.where(settled, c.truth.flat(), 0))
        assert (b.covered, b.full) == (int(settled.sum()), bool(settled.all()))  # so they do not overlap
    positions = torch.tensor(data.draw(st.lists(st.integers(0, b.size - 1), min_size=1, max_size=9)))
    ids, more = b.lookup(positions)
    assert torch.equal(ids, b.ids[positions])
    assert more == []
    expected = torch.where(settled, VALUES[c.truth.flat()].double(), 7.0).reshape(c.shape)
    assert torch.equal(b.partly(fetch, torch.tensor(7.0)).double(), expected)
    if b.full:
        assert torch.equal(b.value(fetch), VALUES[c.truth.dense()])
        assert b.value(fetch).dtype == VALUES.dtype
        plain = c.truth.same(Grid.whole(c.truth.first, c.shape))
        assert b.shift == (c.truth.first if plain else None)
    else:
        assert b.shift is None


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_one_other_element_contradicts(c: Case, data: st.DataObject) -> None:
    b = put(Bound(c.shape), *c.pieces)
    p = part(data.draw, c.shape, c.truth)
    wrong = p.sources[0].flat().clone()
    at = data.draw(st.integers(0, len(wrong) - 1))
    wrong[at] += 1
    made = b.with_piece(Piece(p.at, (Grid.of(wrong.reshape(p.at.shape)),), c.shape))
    assert (made is None) == (int(b.ids[p.at.flat()[at]]) != 0)


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_places_in_a_piece(c: Case, data: st.DataObject) -> None:
    p = c.pieces[0]
    at = p.at.flat().tolist()
    for x in range(math.prod(c.shape)):
        assert p.lookup(torch.tensor([x])).tolist() == [at.index(x) if x in at else -1]
    places = torch.tensor(data.draw(st.lists(st.integers(0, len(at) - 1), min_size=1, max_size=5)))
    (numbers,) = p.numbers(places)
    assert torch.equal(numbers, p.sources[0].flat()[places])
    if p.masks is not None:
        inside = torch.ones(c.shape, dtype=torch.bool)
        for a, m in enumerate(p.masks):
            inside &= m.reshape([-1 if b == a else 1 for b in range(len(c.shape))])
        assert torch.nonzero(inside.reshape(-1)).flatten().tolist() == sorted(at)
    assert p.whole == (len(at) == math.prod(c.shape))
    for q in c.pieces[1:]:
        if p.apart_from(q):
            assert not set(at) & set(q.at.flat().tolist())


def test_places_in_a_large_piece() -> None:
    """One that is not looked up element by element."""
    shape = (80, 90)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    whole = Grid.whole(0, shape)
    for at in (
        whole.narrow(0, 7, 60).take(1, order[:85]).transpose(0, 1),
        whole.narrow(1, 3, 80).reshape(4, 20, 80).permute((2, 1, 0)),
    ):
        p = Piece(at, (at.shifted(100),), shape)
        assert p.masks is not None
        assert p.at.numel() > 4096
        positions = torch.arange(80 * 90)
        expected = torch.full((80 * 90,), -1, dtype=torch.int64)
        expected[at.flat()] = torch.arange(at.numel())
        assert torch.equal(p.lookup(positions), expected)
        ids, _ = Bound(shape, [p]).lookup(positions)
        assert torch.equal(ids, torch.where(expected >= 0, positions + 100, 0))


# -- values -----------------------------------------------------------------------------------------------------------
def test_a_value_as_it_is_needs_no_memory() -> None:
    for p in (
        piece((6, 4), Grid.whole(0, (6, 4)), Grid.whole(50, (6, 4))),
        piece((6, 4), Grid.whole(0, (6, 4)), Grid.whole(50, (4, 6)).transpose(0, 1)),  # a transposed layer
        piece((6, 4), Grid.whole(0, (6, 4)).transpose(0, 1), Grid.whole(50, (4, 6))),
    ):
        b = put(Bound((6, 4)), p)
        value = b.value(fetch)
        assert torch.equal(value.reshape(-1), VALUES[b.ids])
        assert value.untyped_storage().data_ptr() == VALUES.untyped_storage().data_ptr()


@given(cases(), st.data())
@settings(max_examples=150, deadline=None)
def test_sums_and_zeros(c: Case, data: st.DataObject) -> None:
    """Against one addend an element, and written down as that."""
    n = math.prod(c.shape)
    draw = data.draw
    ids = torch.tensor(draw(st.lists(st.sampled_from([-1, 0, 3, 8, 70]), min_size=n, max_size=n)))
    extra = torch.tensor(draw(st.lists(st.sampled_from([5, 6, 90]), min_size=n, max_size=n)))
    more = [torch.where(ids > 0, extra, 0)] if draw(st.booleans()) and bool((ids > 0).any()) else []
    b = Bound.dense(ids, more, c.shape)
    assert torch.equal(b.ids, ids)
    assert len(b.more) == len(more)
    assert all(torch.equal(a, e) for a, e in zip(b.more, more, strict=True))
    assert b.covered == int((ids != 0).sum())
    found, others = b.lookup(torch.arange(n))
    assert torch.equal(found, ids)
    assert all(torch.equal(a, e) for a, e in zip(others, more, strict=True))
    expected = torch.where(ids > 0, VALUES[ids.clamp_min(0)].double(), 0.0)
    for m in more:
        expected = expected + torch.where(ids > 0, VALUES[m].double(), 0.0)
    other = torch.rand(c.shape, generator=torch.Generator().manual_seed(2))
    got = b.partly(fetch, other)
    assert torch.equal(
        got.double(), torch.where((ids == 0).reshape(c.shape), other.double(), expected.reshape(c.shape))
    )
    if b.full:
        assert torch.equal(b.value(fetch).double(), expected.reshape(c.shape))


def test_shift() -> None:
    shape = (6, 4)
    assert Bound(shape).shift is None
    assert put(Bound(shape), rows(shape, 0, 4, 100)).shift is None  # not all of it
    assert put(Bound(shape), rows(shape, 0, 4, 100), rows(shape, 4, 2, 116)).shift == 100
    assert put(Bound(shape), rows(shape, 0, 4, 100), rows(shape, 4, 2, 117)).shift is None
    whole = Grid.whole(0, shape)
    assert put(Bound(shape), piece(shape, whole, whole.shifted(3), whole.shifted(50))).shift is None  # a sum
    assert put(Bound(shape), piece(shape, whole)).shift is None
    assert put(Bound(()), piece((), Grid.whole(0, ()), Grid.whole(9, ()))).shift == 9


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_a_box_in_the_tensors_own_order(c: Case, data: st.DataObject) -> None:
    if not c.shape:
        return
    where = box(data.draw, c.shape)
    at, source = Grid.whole(0, c.shape), c.truth
    for axis, (start, n) in enumerate(where):
        at, source = at.narrow(axis, start, n), source.narrow(axis, start, n)
    wanted = source.dense()
    plain = in_box(Piece(at, (source,), c.shape), source, where)
    assert plain is not None
    assert torch.equal(plain.dense(), wanted)
    dims = data.draw(st.permutations(range(len(c.shape))))
    split = at.permute(dims).unsqueeze(data.draw(st.integers(0, len(dims))))
    other = source.permute(dims).reshape(*split.shape)
    for a, s in ((at.permute(dims), source.permute(dims)), (split, other)):
        got = in_box(Piece(a, (s,), c.shape), s, where)
        assert got is not None
        assert torch.equal(got.dense(), wanted)


@given(cases(), st.data())
@settings(max_examples=100, deadline=None)
def test_no_box_or_the_right_one(c: Case, data: st.DataObject) -> None:
    p = c.pieces[0]
    where = [(0, n) for n in c.shape] if p.whole else box(data.draw, c.shape)
    if not c.shape or p.at.numel() != math.prod(n for _, n in where):
        return
    got = in_box(p, p.sources[0], where)
    wanted = c.truth
    inside = Grid.whole(0, c.shape)
    for axis, (start, n) in enumerate(where):
        wanted, inside = wanted.narrow(axis, start, n), inside.narrow(axis, start, n)
    if got is not None:
        assert torch.equal(got.dense(), wanted.dense())
        assert sorted(p.at.flat().tolist()) == sorted(inside.flat().tolist())


def test_sums_contradict_each_other_in_any_addend() -> None:
    """a is not a + b, and a + b is not a + c; b + a is a + b."""
    whole = Grid.whole(0, (4,))
    half, shape = whole.narrow(0, 0, 2), (4,)
    one = Bound(shape).with_piece(Piece(whole, (whole.shifted(1),), shape))
    assert one is not None
    assert one.with_piece(Piece(whole, (whole.shifted(1), whole.shifted(50)), shape)) is None
    two = Bound(shape).with_piece(Piece(half, (half.shifted(1), half.shifted(50)), shape))
    assert two is not None
    assert two.with_piece(Piece(whole, (whole.shifted(1), whole.shifted(60)), shape)) is None
    assert two.with_piece(Piece(whole, (whole.shifted(1),), shape)) is None
    assert two.with_piece(Piece(whole, (whole.shifted(50), whole.shifted(1)), shape)) is not None
