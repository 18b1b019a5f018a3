"""Constants, zeros and masks that one program spells out and the other has in its weights; and almost the same ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import surgery
from surgery.errors import GraftError
from surgery.plan import Plan

VOCAB, WIDTH, HEADS, TIME = 23, 12, 3, 7
EACH = WIDTH // HEADS


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def shaken(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return module.eval()


def call(module: nn.Module, x: Any) -> Any:
    return module(x)


def tokens(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (3, TIME), generator=torch.Generator().manual_seed(seed))


def vectors(seed: int) -> Tensor:
    return torch.randn(3, TIME, WIDTH, generator=torch.Generator().manual_seed(seed))


def grafted(reference: nn.Module, target: nn.Module, x: Callable[[int], Any] = vectors) -> dict[str, str]:
    """The rows of a plan that was proven, as they are written."""
    reference, target = shaken(reference), shaken(target)
    report = surgery.graft(reference.state_dict(), target, probe=surgery.Probe(reference, call, call, x))
    assert report.verdict == "proven"
    with torch.no_grad():
        torch.testing.assert_close(target(x(91)), reference(x(91)), rtol=1e-4, atol=1e-5)
    plan: Plan = report.plan
    return {r.target: str(r.expr) for r in plan.rows if r.expr is not None}


def refused(reference: nn.Module, target: nn.Module, x: Callable[[int], Any] = vectors) -> None:
    reference, target = shaken(reference), shaken(target)
    with pytest.raises(GraftError, match="is required"):
        surgery.graft(reference.state_dict(), target, probe=surgery.Probe(reference, call, call, x))


# -- the scale of attention -------------------------------------------------------------------------------------------
def scaled(scores: Tensor) -> Tensor:
    return scores / math.sqrt(EACH)


class Attention(nn.Module):
    """`scale`: what is done to the scores; `halves`: the scale is taken out of both q and k instead."""

    def __init__(self, scale: Callable[[Tensor], Tensor] | None = scaled, *, halves: bool = False, heads: int = HEADS):
        super().__init__()
        self.scale, self.halves, self.heads = scale, halves, heads
        self.n = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def heads_of(self, m: nn.Linear, x: Tensor) -> Tensor:
        return m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        q, k, v = (self.heads_of(m, y) for m in (self.q, self.k, self.v))
        if self.halves:
            q, k = q * EACH**-0.25, k * EACH**-0.25
        scores = q @ k.mT
        if self.scale is not None:
            scores = self.scale(scores)
        return x + self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Served(nn.Module):
    """One product for all three, keys first, and no scale anywhere. `turned`: scores are keys by queries."""

    def __init__(self, *, turned: bool = False, act: Callable[[Tensor], Tensor] = torch.clone, eps: float = 1e-5):
        super().__init__()
        self.turned, self.act = turned, act
        self.norm = nn.LayerNorm(WIDTH, eps=eps)
        self.kqv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, q, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.kqv(self.norm(x)).chunk(3, -1))
        scores = (k @ q.mT).mT if self.turned else q @ k.mT
        return x + self.act(self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))


@pytest.mark.parametrize("halves", [False, True])
def test_a_scale_that_the_target_has_in_its_queries(halves: bool) -> None:
    found = grafted(Attention(None if halves else scaled, halves=halves), Served())
    assert found["kqv.weight"] == "cat(k.weight, scale(q.weight, by=0.5), v.weight, axis=0)"
    assert found["kqv.bias"] == "cat(k.bias, scale(q.bias, by=0.5), v.bias, axis=0)"
    assert found["out.weight"] == "o.weight"


class Fused(nn.Module):
    """One product for all three, and the scale spelled out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out((scaled(q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_of_a_fused_product_only_the_queries_take_the_scale() -> None:
    found = grafted(Fused(), Attention(None))
    assert found["q.weight"] == f"slice(scale(qkv.weight, by=0.5), axis=0, start=0, stop={WIDTH})"
    assert found["v.weight"] == f"slice(qkv.weight, axis=0, start={2 * WIDTH}, stop={3 * WIDTH})"
    assert found["o.weight"] == "out.weight"


def test_a_scale_goes_into_the_factor_that_stands_first() -> None:
    found = grafted(Attention(), Served(turned=True))
    assert found["kqv.weight"] == "cat(scale(k.weight, by=0.5), q.weight, v.weight, axis=0)"


def test_blocks_that_take_a_scale_alike() -> None:
    found = grafted(nn.Sequential(Attention(), Attention(), Attention()), nn.Sequential(Served(), Served(), Served()))
    assert found["2.kqv.weight"] == "cat(2.k.weight, scale(2.q.weight, by=0.5), 2.v.weight, axis=0)"


@pytest.mark.parametrize(
    "target",
    [
        lambda: Attention(lambda scores: scores * 1.0),
        lambda: Attention(lambda scores: scores / math.sqrt(WIDTH)),
        lambda: Attention(lambda scores: 1.0 * scores, heads=2),
        lambda: Attention(None, heads=2),
        lambda: Served(act=torch.tanh),
        lambda: Served(eps=1e-4),
    ],
    ids=["scale of one", "scale by the width", "two heads and a scale", "two heads", "activation", "eps"],
)
def test_a_target_that_says_another_scale_or_differs_otherwise_is_refused(target: Callable[[], nn.Module]) -> None:
    refused(Attention(), target())


# -- tables and heads -------------------------------------------------------------------------------------------------
class Words(nn.Module):
    """`before`, `after`: constants by which the looked-up rows, and the rows that the head sees, are multiplied."""

    def __init__(
        self,
        before: float | None = None,
        after: float | None = None,
        *,
        tied: bool,
        last: float | None = None,
        gain: bool = True,
    ) -> None:
        super().__init__()
        self.before, self.after, self.last = before, after, last
        self.words, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH, elementwise_affine=gain)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        x = x if self.before is None else x * self.before
        x = self.norm(x + torch.tanh(self.mix(x)))
        x = self.head(x if self.after is None else x * self.after)
        return x if self.last is None else x * self.last


def test_a_head_takes_the_constant_before_it() -> None:
    found = grafted(Words(after=0.3, tied=True), Words(tied=False), tokens)
    assert found["words.weight"] == "words.weight"
    assert found["head.weight"] == "scale(words.weight, by=0.3)"


def test_a_head_takes_the_constant_after_it() -> None:
    found = grafted(Words(last=0.3, tied=False), Words(tied=False), tokens)
    assert found["head.weight"] == "scale(head.weight, by=0.3)"


def test_a_constant_that_only_the_target_spells_out_is_taken_back() -> None:
    target = Words(after=0.5, tied=False, gain=False)
    assert grafted(Words(tied=False, gain=False), target, tokens)["head.weight"] == "scale(head.weight, by=2.0)"


def test_the_same_constant_elsewhere_needs_no_scaling() -> None:
    found = grafted(Words(after=0.3, tied=False), Words(last=0.3, tied=False), tokens)
    assert found["head.weight"] == "head.weight"
    assert found["norm.weight"] == "norm.weight"


def test_where_a_tied_table_cannot_take_a_constant_the_norm_before_it_does() -> None:
    found = grafted(Words(after=0.3, tied=True), Words(tied=True), tokens)
    assert found["norm.weight"] == "scale(norm.weight, by=0.3)"
    assert found["norm.bias"] == "scale(norm.bias, by=0.3)"


def test_a_tied_table_cannot_be_scaled_at_one_end_only() -> None:
    refused(Words(after=0.3, tied=True, gain=False), Words(tied=True, gain=False), tokens)


def test_rows_of_a_table_take_the_constant_that_follows() -> None:
    found = grafted(Words(before=4.0, tied=False), Words(tied=False), tokens)
    assert found["words.weight"] == "scale(words.weight, by=4.0)"
    assert found["mix.weight"] == "mix.weight"


class Typed(nn.Module):
    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(VOCAB, WIDTH), nn.LayerNorm(WIDTH)
        if kinds:
            self.kinds = nn.Embedding(kinds, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        return self.norm(x + self.kinds(torch.zeros_like(ids)) if hasattr(self, "kinds") else x)


def test_a_table_that_the_source_does_without_is_zero_in_all_rows() -> None:
    found = grafted(Typed(0), Typed(4), tokens)
    assert found["kinds.weight"] == f"zeros(shape=(4, {WIDTH}))"


# -- norms ------------------------------------------------------------------------------------------------------------
class HandNorm(nn.Module):
    """The gain before the division, as many write it."""

    def __init__(self, eps: float = 1e-5, *, unbiased: bool = False) -> None:
        super().__init__()
        self.eps, self.unbiased = eps, unbiased
        self.a, self.b = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return self.a * y / torch.sqrt(x.var(-1, keepdim=True, unbiased=self.unbiased) + self.eps) + self.b


def normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), norm, nn.Linear(WIDTH, WIDTH))


def test_a_gain_before_the_division_and_after_it() -> None:
    assert grafted(normed(nn.LayerNorm(WIDTH)), normed(HandNorm()))["1.a"] == "1.weight"
    assert grafted(normed(HandNorm()), normed(nn.LayerNorm(WIDTH)))["1.weight"] == "1.a"


@pytest.mark.parametrize("target", [partial(HandNorm, 1e-4), partial(HandNorm, unbiased=True)], ids=["eps", "sample"])
def test_a_norm_that_is_almost_the_same_is_refused(target: Callable[[], nn.Module]) -> None:
    refused(normed(nn.LayerNorm(WIDTH)), normed(target()))


def test_a_gain_that_is_written_into_is_left_where_it_stands() -> None:
    class Overwritten(HandNorm):
        def forward(self, x: Tensor) -> Tensor:
            y = x - x.mean(-1, keepdim=True)
            z = self.a * y
            y.zero_()  # what z was made of is no more
            return z / torch.sqrt(x.var(-1, keepdim=True, unbiased=False) + self.eps) + self.b

    found = grafted(normed(Overwritten()), normed(Overwritten()))
    assert found["1.a"] == "1.a"


# -- masks over weights -----------------------------------------------------------------------------------------------
class Biased(nn.Module):
    """A learned bias of distance on the scores; `how` the later steps are hidden."""

    def __init__(self, how: str = "added", *, back: bool = False) -> None:
        super().__init__()
        self.how, self.back = how, back
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.far = nn.Parameter(torch.zeros(HEADS, TIME) if how == "filled" else torch.zeros(TIME, HEADS))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
        at = torch.arange(x.shape[1])
        gap = (at[:, None] - at[None]).abs()
        hide = (at[:, None] > at[None]) if self.back else (at[:, None] < at[None])
        scores = q @ k.mT / math.sqrt(EACH)
        if self.how == "filled":
            bias = self.far[:, gap].masked_fill(hide, -1e9)
        else:
            bias = self.far[gap].permute(2, 0, 1)
            if self.how == "chosen":
                bias = torch.where(hide, torch.finfo(x.dtype).min, bias)
            elif self.how == "added":
                bias = bias + torch.zeros(hide.shape, dtype=x.dtype).masked_fill(hide, -math.inf)
        scores = scores + bias
        if self.how == "last":
            scores = scores.masked_fill(hide, -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("theirs", ["added", "filled", "chosen", "last"])
@pytest.mark.parametrize("ours", ["added", "filled", "chosen", "last"])
def test_a_mask_over_a_learned_bias(ours: str, theirs: str) -> None:
    found = grafted(Biased(theirs), Biased(ours))
    turned = (ours == "filled") != (theirs == "filled")
    assert found["far"] == ("transpose(far)" if turned else "far")


@pytest.mark.parametrize("ours", ["added", "filled", "last"])
def test_a_mask_that_hides_the_other_side_is_refused(ours: str) -> None:
    refused(Biased("chosen"), Biased(ours, back=True))


# -- products of weights ----------------------------------------------------------------------------------------------
class Pooled(nn.Module):
    """Attention of a learned query, by the library."""

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.att = (
            nn.Parameter(torch.randn(1, 1, WIDTH)),
            nn.MultiheadAttention(WIDTH, HEADS, batch_first=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.att(self.seed.expand(len(x), -1, -1), x, x, need_weights=False)[0]


class Kernel(nn.Module):
    """The same by hand, kernels [width, heads, each]."""

    def __init__(self, *, per: float | None = math.sqrt(EACH)) -> None:
        super().__init__()
        self.per = per
        self.seed = nn.Parameter(torch.randn(WIDTH))
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, HEADS, EACH)) for _ in range(3))
        self.b, self.c, self.d = (nn.Parameter(torch.randn(HEADS, EACH)) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        seed = self.seed.expand(len(x), -1)
        q = torch.einsum("bd,dhk->bhk", seed, self.q) + self.b
        k, v = (torch.einsum("btd,dhk->bthk", x, w) + c for w, c in ((self.k, self.c), (self.v, self.d)))
        w = torch.einsum("bhk,bthk->bht", q, k)
        w = (w if self.per is None else w / self.per).softmax(-1)
        return self.o(torch.einsum("bht,bthk->bhk", w, v).flatten(1)).unsqueeze(1)


def test_a_learned_query_in_another_spelling() -> None:
    found = grafted(Pooled(), Kernel())
    assert found["seed"] == f"reshape(seed, shape=({WIDTH},))"
    assert found["q"].startswith("reshape(transpose(slice(att.in_proj_weight")


def test_keys_take_the_scale_of_a_learned_query() -> None:
    found = grafted(Pooled(), Kernel(per=None))
    assert "scale" not in found["q"]
    assert found["k"].startswith("reshape(transpose(slice(scale(att.in_proj_weight, by=0.5)")


def test_a_learned_query_with_another_scale_is_refused() -> None:
    refused(Pooled(), Kernel(per=2 * math.sqrt(EACH)))
