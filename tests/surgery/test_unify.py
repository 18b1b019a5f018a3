"""Where two sums meet: what is settled makes the target compute the reference's value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import twin
from surgery.mapper.align import align_values, function
from surgery.mapper.hypothesis import Hypothesis
from surgery.mapper.record import record
from surgery.mapper.reference import Reference
from surgery.mapper.rows import match_rows
from surgery.mapper.unify import Match, unify

HEADS, WIDTH = 2, 6


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class Does(nn.Module):
    """A module of one function and a few parameters, of other values at each time."""

    def __init__(self, f: Callable[..., Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.f = f
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Any:
        return self.f(self, x)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def sides(target: nn.Module, source: nn.Module, x: Tensor) -> Hypothesis:
    def tape_of(module: nn.Module) -> Any:
        with torch.no_grad():
            return record(lambda m, x: m(x), twin.twin(module), x)

    return Hypothesis(tape_of(target), Reference(tape_of(source)), {}, set())


def ways(h: Hypothesis, mine: int = 0, theirs: int = 0) -> list[Match]:
    """The ways to make one output of the target equal to one of the reference."""
    ref = h.reference
    i, j = h.tape.outputs()[mine], ref.tape.outputs()[theirs]
    return unify(h.terms(i), h.tape.values[i].shape, ref.terms(j), ref.tape.values[j].shape)


def settled(h: Hypothesis, m: Match, name: str) -> Tensor:
    assert h.settle(m.assignments)
    value = h.value_of(name)
    assert value is not None
    return value.double()


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a, b.detach().double())


def heads(t: Tensor) -> Tensor:
    return t.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def test_pieces_of_a_fused_projection() -> None:
    fused = Does(
        lambda m, x: tuple(heads(t) for t in F.linear(x, m.w, m.b).chunk(3, -1)), w=(3 * WIDTH, WIDTH), b=(3 * WIDTH,)
    )
    apart = Does(
        lambda m, x: tuple(heads(x @ w + b) for w, b in ((m.q, m.c), (m.k, m.d), (m.v, m.e))),
        **dict.fromkeys("qkv", (WIDTH, WIDTH)),
        **dict.fromkeys("cde", (WIDTH,)),
    )
    h = sides(fused, apart, rand(2, 4, WIDTH))
    for piece in range(3):
        (m,) = ways(h, piece, piece)
        assert (m.missing, m.zeros) == (0, 0)
        assert h.settle(m.assignments)
    assert equal(settled(h, m, "w"), torch.cat([apart.q.t(), apart.k.t(), apart.v.t()]))
    assert equal(settled(h, m, "b"), torch.cat([apart.c, apart.d, apart.e]))
    assert all(h.known(vid) is not None for vid in h.tape.outputs())


def test_heads_that_lie_otherwise() -> None:
    """The three projections of each head side by side: rows of the source's in another order."""
    woven = Does(
        lambda m, x: F.linear(x, m.w).view(2, 4, HEADS, 3, -1).permute(3, 0, 2, 1, 4).unbind(0), w=(3 * WIDTH, WIDTH)
    )
    apart = Does(lambda m, x: tuple(heads(x @ w) for w in (m.q, m.k, m.v)), **dict.fromkeys("qkv", (WIDTH, WIDTH)))
    h = sides(woven, apart, rand(2, 4, WIDTH))
    for piece in range(3):
        (m,) = ways(h, piece, piece)
        assert h.settle(m.assignments)
    by_head = torch.stack([w.t().unflatten(0, (HEADS, -1)) for w in (apart.q, apart.k, apart.v)], 1)
    assert equal(settled(h, m, "w"), by_head.reshape(3 * WIDTH, WIDTH))


def test_a_bias_that_is_a_sum() -> None:
    one = Does(lambda m, x: x @ m.w + m.b, w=(WIDTH, 5), b=(5,))
    two = Does(lambda m, x: x @ m.w + m.c + m.d, w=(WIDTH, 5), c=(5,), d=(5,))
    h = sides(one, two, rand(4, WIDTH))
    (m,) = ways(h)
    assert m.missing == 0
    assert equal(settled(h, m, "b"), two.c.double() + two.d.double())
    assert equal(settled(h, m, "w"), two.w)


def test_two_biases_for_one() -> None:
    two = Does(lambda m, x: x @ m.w + m.c + m.d, w=(WIDTH, 5), c=(5,), d=(5,))
    one = Does(lambda m, x: x @ m.w + m.b, w=(WIDTH, 5), b=(5,))
    h = sides(two, one, rand(4, WIDTH))
    (m,) = ways(h)
    assert m.zeros == 1
    c, d = settled(h, m, "c"), settled(h, m, "d")
    assert equal(c + d, one.b)
    assert not d.any() or not c.any()


def test_two_biases_for_two_could_change_places() -> None:
    def module() -> nn.Module:
        return Does(lambda m, x: x @ m.w + m.c + m.d, w=(WIDTH, 5), c=(5,), d=(5,))

    mine, theirs = module(), module()
    h = sides(mine, theirs, rand(4, WIDTH))
    (m,) = ways(h)
    assert m.swapped
    assert equal(settled(h, m, "c") + settled(h, m, "d"), theirs.c.double() + theirs.d.double())


def test_a_bias_that_the_source_does_not_have_is_zero() -> None:
    h = sides(nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 5, bias=False), rand(4, WIDTH))
    (m,) = ways(h)
    assert m.zeros == 1
    assert not settled(h, m, "bias").any()


def test_a_bias_without_a_place_is_missing() -> None:
    h = sides(nn.Linear(WIDTH, 5, bias=False), nn.Linear(WIDTH, 5), rand(4, WIDTH))
    assert [m.missing for m in ways(h)] == [1]


def test_class_token_and_positions() -> None:
    mine = Does(
        lambda m, x: torch.cat([m.token.expand(len(x), -1, -1), x @ m.w], 1) + m.places[None, : x.shape[1] + 1],
        token=(1, 1, 5),
        w=(WIDTH, 5),
        places=(9, 5),
    )
    theirs = Does(
        lambda m, x: torch.cat([m.first.expand(len(x), 1, 5), F.linear(x, m.proj)], 1) + m.pos,
        first=(5,),
        proj=(5, WIDTH),
        pos=(1, 5, 5),
    )
    h = sides(mine, theirs, rand(2, 4, WIDTH))
    m = min(ways(h), key=lambda m: m.penalty)
    assert (m.missing, m.zeros) == (0, 0)
    assert equal(settled(h, m, "w"), theirs.proj.t())
    assert equal(settled(h, m, "token").reshape(-1), theirs.first)
    bound = h.bound["places"]
    assert bound.ids.reshape(9, 5)[:5].all()
    assert not bound.ids.reshape(9, 5)[5:].any(), "no input reached the other places"
    assert h.known(h.tape.outputs()[0]) is not None


def test_gain_and_bias_of_a_norm() -> None:
    mine = nn.LayerNorm(WIDTH)
    theirs = Does(lambda m, x: m.b + m.g * F.layer_norm(x, (WIDTH,)), g=(WIDTH,), b=(WIDTH,))
    h = sides(mine, theirs, rand(2, 4, WIDTH))
    (m,) = ways(h)
    assert equal(settled(h, m, "weight"), theirs.g)
    assert equal(settled(h, m, "bias"), theirs.b)


def test_columns_in_another_order() -> None:
    order = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    mine = Does(lambda m, x: x[:, order] @ m.w, w=(WIDTH, 5))
    theirs = Does(lambda m, x: x @ m.w, w=(WIDTH, 5))
    h = sides(mine, theirs, rand(4, WIDTH))
    (m,) = ways(h)
    assert equal(settled(h, m, "w"), theirs.w[order])


def test_patches_as_a_product() -> None:
    def patches(m: nn.Module, x: Tensor) -> Tensor:
        cut = x.unflatten(2, (2, 2)).unflatten(4, (3, 2))  # channel, row, in row, column, in column
        return cut.permute(0, 2, 4, 3, 5, 1).reshape(len(x), 6, 12) @ m.w + m.b

    mine, theirs = Does(patches, w=(12, 5), b=(5,)), nn.Conv2d(3, 5, 2, stride=2)
    h = sides(mine, theirs, rand(2, 3, 4, 6))
    m = min(ways(h), key=lambda m: m.penalty)
    assert equal(settled(h, m, "w"), theirs.weight.permute(2, 3, 1, 0).reshape(12, 5))
    assert equal(settled(h, m, "b"), theirs.bias)


def test_kernels_of_one_geometry() -> None:
    def conv(**geometry: Any) -> nn.Module:
        return nn.Conv1d(4, 4, 3, **geometry)

    mine, theirs = conv(groups=2, padding=1), conv(groups=2, padding=1)
    h = sides(mine, theirs, rand(2, 4, 9))
    m = ways(h)[0]
    assert equal(settled(h, m, "weight"), theirs.weight)
    assert not ways(sides(conv(groups=2, dilation=2), conv(groups=2), rand(2, 4, 9)))
    assert not ways(sides(conv(groups=2, stride=2), conv(groups=2), rand(2, 4, 9)))


def test_other_rows_do_not_meet() -> None:
    mine, theirs = Does(lambda m, x: (x + 1) @ m.w, w=(WIDTH, 5)), Does(lambda m, x: x @ m.w, w=(WIDTH, 5))
    assert not ways(sides(mine, theirs, rand(4, WIDTH)))


def test_what_is_settled_is_not_settled_otherwise() -> None:
    mine = Does(lambda m, x: (x @ m.w, (x * 2) @ m.w), w=(WIDTH, WIDTH))
    theirs = Does(lambda m, x: (x @ m.a, (x * 2) @ m.b), a=(WIDTH, WIDTH), b=(WIDTH, WIDTH))
    h = sides(mine, theirs, rand(4, WIDTH))
    first, second = ways(h, 0, 0)[0], ways(h, 1, 1)[0]
    assert h.settle(first.assignments)
    assert h.settle(first.assignments)
    assert not h.settle(second.assignments)


# -- the pieces -------------------------------------------------------------------------------------------------------
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 4), st.data())
@settings(max_examples=50, deadline=None)
def test_rows_are_found_among_rows(n: int, k: int, more: int, data: st.DataObject) -> None:
    y = torch.randn(n + more, k, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).double()
    chosen = torch.tensor(data.draw(st.permutations(range(n + more)))[:n])
    columns = torch.tensor(data.draw(st.permutations(range(k))))
    x = y[chosen][:, columns]
    found = match_rows(x, torch.arange(n), y)
    assert found is not None
    there = torch.arange(k) if found.columns is None else found.columns
    assert torch.equal(y[found.rows][:, there], x)
    assert match_rows(x + 1e-3, torch.arange(n), y) is None


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
@settings(max_examples=50, deadline=None)
def test_values_are_found_in_another_layout(shape: list[int], data: st.DataObject) -> None:
    b = torch.randn(shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 999)))).double()
    a = b.permute(data.draw(st.permutations(range(len(shape)))))
    at = next(align_values(a, b))
    assert torch.equal(b.reshape(-1)[at], a.reshape(-1))
    assert not list(align_values(a + 1.0, b))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_a_function_maps_each_to_one(pairs: list[tuple[int, int]]) -> None:
    a, b = (torch.tensor([p[i] for p in pairs], dtype=torch.int64) for i in (0, 1))
    found = function(a, b)
    if len(dict(pairs)) < len(set(pairs)):
        assert found is None
    else:
        assert found is not None
        assert dict(zip(found[0].tolist(), found[1].tolist(), strict=True)) == dict(pairs)
