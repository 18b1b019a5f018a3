"""From numbered elements to expressions: each evaluates to exactly the elements that it stands for."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor, nn

from surgery import twin
from surgery.expr import Name, evaluate, infer, parse
from surgery.mapper.completion import complete
from surgery.mapper.hypothesis import Bound
from surgery.mapper.record import record
from surgery.mapper.reference import Reference
from surgery.mapper.render import Renderer, Unrenderable

SHAPES: dict[str, tuple[int, ...]] = {
    "q.weight": (4, 6),
    "k.weight": (4, 6),
    "v.weight": (4, 6),
    "w": (6, 5),
    "t": (8,),
    "b": (4,),
    "kernel": (3, 2, 2, 2),
    "one": (1,),
}


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            *path, leaf = name.split(".")
            place: nn.Module = self
            for part in path:
                place = place._modules.get(part) or nn.Module()
                setattr(self, part, place)
            place.register_parameter(leaf, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        return sum((p.sum() * x for p in self.parameters()), x)


MODULE = Holder()
STATE = {name: t.detach().double() for name, t in MODULE.state_dict().items()}
REFERENCE = Reference(record(lambda m, x: m(x), twin.twin(MODULE), torch.ones(2)))
FIRST = {name: first for first, _, name in REFERENCE.names}
NUMBERS = {name: torch.arange(FIRST[name], FIRST[name] + t.numel()).reshape(t.shape) for name, t in STATE.items()}


def renderer() -> Renderer:
    return Renderer(REFERENCE, {name: Name(name) for name in STATE})


def rendered(ids: Tensor) -> str:
    """The expression of these elements, after it was checked to give them."""
    expr = renderer().bound(Bound.dense(ids.reshape(-1), [], tuple(ids.shape)))
    flat = torch.zeros(REFERENCE.real_end, dtype=torch.float64)
    for name, numbers in NUMBERS.items():
        flat[numbers] = STATE[name]
    want = torch.where(ids > 0, flat[ids.clamp_min(0)], 0.0)
    assert infer(expr, lambda n: tuple(STATE[n].shape)) == tuple(ids.shape)
    assert torch.equal(evaluate(expr, STATE.__getitem__).double(), want)
    assert parse(str(expr)) == expr
    return str(expr)


# -- what people write ------------------------------------------------------------------------------------------------
q, k, v = (NUMBERS[f"{n}.weight"] for n in "qkv")
w, t, b, kernel = (NUMBERS[n] for n in ("w", "t", "b", "kernel"))
READS: dict[str, tuple[Tensor, str]] = {
    "a name": (w, "w"),
    "transposed": (w.t(), "transpose(w)"),
    "joined": (torch.cat([q, k, v]), "cat(q.weight, k.weight, v.weight, axis=0)"),
    "joined, then transposed": (torch.cat([q, k]).t(), "cat(transpose(q.weight), transpose(k.weight), axis=1)"),
    "a slice": (w[2:5], "slice(w, axis=0, start=2, stop=5)"),
    "columns": (w[:, 1:3], "slice(w, axis=1, start=1, stop=3)"),
    "per head": (
        torch.cat([q[:2], k[:2], v[:2], q[2:], k[2:], v[2:]]),
        "interleave(q.weight, k.weight, v.weight, groups=2, axis=0)",
    ),
    "per head, transposed": (
        torch.cat([q[:2], k[:2], q[2:], k[2:]]).t(),
        "interleave(transpose(q.weight), transpose(k.weight), groups=2, axis=1)",
    ),
    "a flat vector": (b.reshape(1, 1, 4), "reshape(b, shape=(1, 1, 4))"),
    "axes of a kernel": (kernel.permute(2, 3, 1, 0), "permute(kernel, dims=(2, 3, 1, 0))"),
    "a flattened kernel": (kernel.reshape(3, 8), "reshape(kernel, shape=(3, 8))"),
    "a bias that is zero in its middle": (
        torch.cat([b, torch.full((4,), -1), b]),
        "cat(b, zeros(shape=(4,)), b, axis=0)",
    ),
    "all zero": (torch.full((3, 2), -1), "zeros(shape=(3, 2))"),
    "one row for all": (b.expand(3, 4), "repeat(reshape(b, shape=(1, 4)), times=(3, 1))"),
    "columns in reverse": (w.flip(1), "flip(w, axis=1)"),
    "a kernel turned round": (
        kernel.flip(2, 3).transpose(0, 1),
        "flip(flip(permute(kernel, dims=(1, 0, 2, 3)), axis=2), axis=3)",
    ),
    "rows in an order of their own": (w[[4, 0, 2, 1, 5, 3]], "take(w, index=(4, 0, 2, 1, 5, 3), axis=0)"),
    "columns for pairs": (
        w[:, torch.tensor([[1, 0], [3, 1]])],
        "reshape(take(w, index=(1, 0, 3, 1), axis=1), shape=(6, 2, 2))",
    ),
    "rows for pairs, moved": (
        w[torch.tensor([[1, 0], [3, 1]])].permute(2, 0, 1),
        "reshape(transpose(take(w, index=(1, 0, 3, 1), axis=0)), shape=(5, 2, 2))",
    ),
    "a kernel within a larger one": (
        torch.nn.functional.pad(kernel, (1, 0, 0, 1), value=-1),
        "cat(zeros(shape=(3, 2, 3, 1)), cat(kernel, zeros(shape=(3, 2, 1, 2)), axis=2), axis=3)",
    ),
}


@pytest.mark.parametrize("name", READS)
def test_expressions_are_those_that_people_write(name: str) -> None:
    ids, want = READS[name]
    assert rendered(ids) == want


def test_a_sum_of_two() -> None:
    expr = renderer().bound(Bound.dense(q.reshape(-1), [k.reshape(-1)], (4, 6)))
    assert str(expr) == "add(q.weight, k.weight)"


def test_links_stand_in_for_names() -> None:
    links = {name: Name(name) for name in STATE} | {"w": parse("transpose(file.w)")}
    made = Renderer(REFERENCE, links)
    assert str(made.bound(Bound.dense(w.reshape(-1), [], (6, 5)))) == "transpose(file.w)"
    assert (
        str(made.bound(Bound.dense(w[1:2].reshape(-1), [], (1, 5))))
        == "slice(transpose(file.w), axis=0, start=1, stop=2)"
    )


def test_what_is_open_or_unknown_is_not_rendered() -> None:
    ids = w.reshape(-1).clone()
    ids[3] = 0
    with pytest.raises(Unrenderable, match="open"):
        renderer().bound(Bound.dense(ids, [], (6, 5)))
    with pytest.raises(Unrenderable, match="not in the checkpoint"):
        Renderer(REFERENCE, {}).bound(Bound.dense(w.reshape(-1), [], (6, 5)))
    scattered = torch.cat([w.reshape(-1), q.reshape(-1)])[
        torch.randperm(54, generator=torch.Generator().manual_seed(0))
    ]
    with pytest.raises(Unrenderable):
        renderer().bound(Bound.dense(scattered, [], (54,)))


# -- random compositions ----------------------------------------------------------------------------------------------
def permuted(draw: st.DrawFn, a: Tensor) -> Tensor:
    return a.permute(draw(st.permutations(range(a.ndim))))


def sliced(draw: st.DrawFn, a: Tensor) -> Tensor:
    axis = draw(st.integers(0, a.ndim - 1))
    start = draw(st.integers(0, a.shape[axis] - 1))
    return a.narrow(axis, start, draw(st.integers(1, a.shape[axis] - start)))


def reshaped(draw: st.DrawFn, a: Tensor) -> Tensor:
    """Two neighbouring axes as one, or one as two."""
    axis = draw(st.integers(0, a.ndim - 1))
    if a.ndim > 1 and axis < a.ndim - 1 and draw(st.booleans()):
        return a.flatten(axis, axis + 1)
    n = a.shape[axis]
    left = draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
    return a.unflatten(axis, (left, n // left)) if a.ndim < 4 else a


def flipped(draw: st.DrawFn, a: Tensor) -> Tensor:
    return a.flip(draw(st.integers(0, a.ndim - 1)))


@st.composite
def pieces(draw: st.DrawFn) -> Tensor:
    a = NUMBERS[draw(st.sampled_from([n for n in NUMBERS if n != "one"]))]
    for step in draw(st.lists(st.sampled_from([permuted, sliced, reshaped]), max_size=3)):
        a = step(draw, a)
    return a


@st.composite
def read_backwards(draw: st.DrawFn) -> Tensor:
    """A view of one tensor, then backwards along some of its axes."""
    return flipped(draw, flipped(draw, draw(pieces())))


@given(st.one_of(pieces(), read_backwards()))
@example(NUMBERS["q.weight"].reshape(-1)[:10].reshape(2, 5))  # its axes divide none of the tensor's
@example(NUMBERS["w"][:, 1:3].reshape(12)[4:7])  # a run in a part of a tensor
@settings(max_examples=150, deadline=None)
def test_any_view_of_one_tensor_is_rendered(ids: Tensor) -> None:
    rendered(ids)


@st.composite
def joined(draw: st.DrawFn) -> Tensor:
    """Tensors of one shape, turned alike, one after another or in turns along an axis, then moved."""
    names = draw(st.permutations([f"{n}.weight" for n in "qkv"]))[: draw(st.integers(2, 3))]
    order = draw(st.permutations(range(2)))
    parts = [NUMBERS[n].permute(order) for n in names]
    axis = draw(st.integers(0, 1))
    groups = draw(st.sampled_from([g for g in (1, 2, 3) if parts[0].shape[axis] % g == 0]))
    made = torch.cat([c for cut in zip(*(p.chunk(groups, axis) for p in parts), strict=True) for c in cut], axis)
    move: Callable[[Tensor], Tensor] = draw(
        st.sampled_from([lambda a: a, lambda a: a.t(), lambda a: a.unsqueeze(0), lambda a: a.unsqueeze(-1)])
    )
    return move(made)


@given(joined())
@settings(max_examples=100, deadline=None)
def test_joined_and_interleaved_tensors_are_rendered(ids: Tensor) -> None:
    rendered(ids)


@st.composite
def anything(draw: st.DrawFn) -> Tensor:
    """Any joining of pieces, moved: some have no expression."""
    a = draw(pieces())
    axis = draw(st.integers(0, a.ndim - 1))
    for _ in range(draw(st.integers(0, 2))):
        other = draw(pieces())
        if other.numel() % (a.numel() // a.shape[axis]) == 0:
            shape = [n if i != axis else other.numel() * a.shape[axis] // a.numel() for i, n in enumerate(a.shape)]
            if math.prod(shape) == other.numel():
                a = torch.cat([a, other.reshape(shape)], axis)
    return draw(st.sampled_from([permuted, sliced, reshaped]))(draw, a)


@st.composite
def looked_up(draw: st.DrawFn) -> Tensor:
    """Lines of one tensor in any order, for one axis or for two, moved: some are read as something simpler."""
    a = NUMBERS[draw(st.sampled_from(["w", "q.weight", "kernel"]))]
    axis = draw(st.integers(0, a.ndim - 1))
    index = draw(st.lists(st.integers(0, a.shape[axis] - 1), min_size=4, max_size=4))
    made = a.index_select(axis, torch.tensor(index))
    return permuted(draw, made.unflatten(axis, (2, 2)) if draw(st.booleans()) and a.ndim < 4 else made)


@given(looked_up())
@settings(max_examples=150, deadline=None)
def test_lines_that_were_looked_up_are_rendered(ids: Tensor) -> None:
    rendered(ids)


@given(anything())
@settings(max_examples=200, deadline=None)
def test_what_is_rendered_is_right(ids: Tensor) -> None:
    with contextlib.suppress(Unrenderable):
        rendered(ids)


# -- completion -------------------------------------------------------------------------------------------------------
def some_rows(a: Tensor, rows: list[int]) -> Tensor:
    ids = torch.zeros_like(a)
    ids[rows] = a[rows]
    return ids


def completed(ids: Tensor) -> Tensor:
    return complete(Bound.dense(ids.reshape(-1), [], tuple(ids.shape)), REFERENCE).ids.reshape(ids.shape)


@pytest.mark.parametrize("rows", [[0], [2], [0, 1, 2], [1, 4], [5]])
def test_a_table_met_in_part_is_completed(rows: list[int]) -> None:
    assert torch.equal(completed(some_rows(w, rows)), w)


def test_columns_are_completed_too() -> None:
    assert torch.equal(completed(some_rows(w, [1, 2]).t()), w.t())


def test_rows_with_an_offset() -> None:
    """Places that are counted from two, as BART does."""
    want = torch.cat([torch.zeros(2, 5, dtype=torch.int64), w])
    assert torch.equal(completed(some_rows(want, [2, 3])), want)
    assert torch.equal(completed(some_rows(w[2:], [0, 1])), w[2:])


def test_a_table_of_two_tables() -> None:
    both = torch.cat([q, k])
    assert torch.equal(completed(some_rows(both, [1, 2, 5])), both)


def test_conflicting_claims_stay_open() -> None:
    """Row 1 could be the first table's second or the second's first."""
    ids = torch.zeros(3, 6, dtype=torch.int64)
    ids[0], ids[2] = q[0], k[1]
    out = completed(ids)
    assert torch.equal(out[[0, 2]], ids[[0, 2]])
    assert not out[1].any()


def test_rows_that_follow_no_law_stay_open() -> None:
    ids = torch.zeros(6, 5, dtype=torch.int64)
    ids[0], ids[1], ids[3] = w[4], w[1], w[2]
    assert torch.equal(completed(ids), ids)


def test_scattered_holes_stay_open() -> None:
    ids = w.clone()
    ids[1, 2] = 0
    ids[3, 0] = 0
    assert torch.equal(completed(ids), ids)


def test_addends_are_completed_together() -> None:
    bound = complete(
        Bound.dense(some_rows(q, [1, 2]).reshape(-1), [some_rows(k, [1, 2]).reshape(-1)], (4, 6)), REFERENCE
    )
    assert torch.equal(bound.ids.reshape(4, 6), q)
    assert torch.equal(bound.more[0].reshape(4, 6), k)
