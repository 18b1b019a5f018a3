"""Products in other spellings: one-hot rows, scales that are summed.

Beside each stands a target that is almost the same function, and must be refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery.errors import GraftError
from surgery.mapper.record import record
from surgery.twin import twin

WORDS, KINDS, D, HEADS, TIME, LAYERS = 23, 3, 12, 3, 9, 2


def call(module: nn.Module, x: Any) -> Any:
    return module(*x) if isinstance(x, tuple) else module(x)


def stirred(module: nn.Module, seed: int) -> nn.Module:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=g) * 0.3 + 0.05)
    return module.eval()


def words(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, WORDS, (2, TIME), generator=g), torch.randint(0, KINDS, (2, TIME), generator=g)


def vectors(seed: int) -> Tensor:
    return torch.randn(3, TIME, D, generator=torch.Generator().manual_seed(seed))


def graft(source: nn.Module, target: nn.Module, inputs: Callable[[int], Any]) -> surgery.Report:
    source, target = stirred(source, 1), stirred(target, 2)
    report = surgery.graft(source.state_dict(), target, probe=surgery.Probe(source, call, call, inputs))
    with torch.no_grad():
        torch.testing.assert_close(call(target, inputs(7)), call(source, inputs(7)), rtol=1e-4, atol=1e-4)
    return report


def proven(source: nn.Module, target: nn.Module, inputs: Callable[[int], Any]) -> None:
    assert graft(source, target, inputs).verdict == "proven"


def refused(source: nn.Module, target: nn.Module, inputs: Callable[[int], Any]) -> None:
    with pytest.raises(GraftError):
        graft(source, target, inputs)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


# -- rows that are looked up ------------------------------------------------------------------------------------------
class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word, self.kind, self.place = nn.Embedding(WORDS, D), nn.Embedding(KINDS, D), nn.Embedding(TIME, D)
        self.out = nn.Linear(D, 5)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        x = self.word(ids) + self.kind(kinds) + self.place(torch.arange(ids.shape[1]))
        return self.out(x.tanh())


class OneHot(nn.Module):
    """How: by F.one_hot and @, by comparing, by rows of an identity, or from the other side."""

    def __init__(self, how: str, *, weight: float = 1.0) -> None:
        super().__init__()
        self.head, self.how, self.weight = nn.Linear(D, 5), how, weight
        self.place, self.word = par(TIME, D), par(D, WORDS) if how == "left" else par(WORDS, D)
        self.kind = par(KINDS, D)

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        if self.how == "left":
            b, t = ids.shape
            x = (self.word @ F.one_hot(ids.reshape(-1), WORDS).to(self.word.dtype).T).T.view(b, t, D)
        elif self.how == "compared":
            x = (ids[..., None] == torch.arange(WORDS)).to(self.word.dtype) @ self.word
        elif self.how == "identity":
            x = torch.eye(WORDS)[ids] @ self.word
        else:
            x = F.one_hot(ids, WORDS).to(self.word.dtype) @ self.word
        kind = torch.einsum("btk,kd->btd", F.one_hot(kinds, KINDS).to(x.dtype), self.kind)
        return self.head((self.weight * x + kind + self.place[: ids.shape[1]]).tanh())


@pytest.mark.parametrize("how", ["one_hot", "compared", "identity", "left"])
def test_one_hot_rows_look_up_a_table(how: str) -> None:
    proven(Tables(), OneHot(how), words)
    proven(OneHot(how), Tables(), words)


def test_one_hot_rows_on_both_sides() -> None:
    proven(OneHot("compared"), OneHot("left"), words)


class Soft(OneHot):
    """Almost one-hot: the label is smoothed."""

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        hot = F.one_hot(ids, WORDS).to(self.word.dtype) * (1 - 1e-3) + 1e-3 / WORDS
        kind = F.one_hot(kinds, KINDS).to(hot.dtype) @ self.kind
        return self.head((hot @ self.word + kind + self.place[: ids.shape[1]]).tanh())


class Clipped(OneHot):
    """Knows one word less: the last two are one row."""

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        return super().forward(ids.clamp_max(WORDS - 2), kinds)


def test_a_smoothed_or_clipped_look_up_is_another_function() -> None:
    refused(Tables(), Soft("one_hot"), words)
    with_last = lambda seed: (words(seed)[0].index_fill(1, torch.tensor(0), WORDS - 1), words(seed)[1])  # noqa: E731
    refused(Tables(), Clipped("one_hot"), with_last)


class PlacedByProduct(nn.Module):
    """A bias of places from a table [heads, buckets], as attention has it."""

    def __init__(self, *, turned: bool, far: int = 4) -> None:
        super().__init__()
        self.turned, self.far = turned, far
        self.table = par(HEADS, 8) if turned else par(8, HEADS)
        self.q, self.k = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bucket = (at[None] - at[:, None]).clamp(-self.far, self.far - 1) + self.far
        if self.turned:
            bias = torch.einsum("qkn,hn->hqk", F.one_hot(bucket, 8).to(x.dtype), self.table)
        else:
            bias = self.table[bucket].permute(2, 0, 1)
        q, k = (m(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for m in (self.q, self.k))
        return (q @ k.mT + bias).softmax(-1)


def test_a_table_of_places_by_one_hot_buckets() -> None:
    proven(PlacedByProduct(turned=False), PlacedByProduct(turned=True), vectors)
    proven(PlacedByProduct(turned=True), PlacedByProduct(turned=False), vectors)
    refused(PlacedByProduct(turned=False), PlacedByProduct(turned=True, far=3), vectors)


# -- scales that are summed -------------------------------------------------------------------------------------------
class Mixed(nn.Module):
    """A weighted sum of what the layers give."""

    def __init__(self, how: str, layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(layers))
        self.mix, self.out, self.how = par(layers + 1), nn.Linear(D, 4), how

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(F.gelu(layer(states[-1])))
        w = self.mix.softmax(-1)
        if self.how == "sum":
            y = (torch.stack(states, 1) * w.view(-1, 1, 1)).sum(1)
        elif self.how == "kept":
            y = (w.view(-1, 1, 1, 1) * torch.stack(states)).sum(0, keepdim=True)[0]
        elif self.how == "added":
            y = sum(a * s for a, s in zip(w, states, strict=True))
        else:
            y = torch.einsum("n,nbtd->btd", self.mix.softmax(0), torch.stack(states))
        return self.out(y).log_softmax(-1)


@pytest.mark.parametrize("how", ["sum", "kept"])
def test_a_weighted_sum_of_layers_is_a_product(how: str) -> None:
    proven(Mixed(how), Mixed("einsum"), vectors)
    proven(Mixed("einsum"), Mixed(how), vectors)


@pytest.mark.parametrize("layers", [LAYERS, 8])
def test_values_that_are_scaled_and_added_are_a_product_of_their_stack(layers: int) -> None:
    proven(Mixed("sum", layers), Mixed("added", layers), vectors)
    proven(Mixed("added", layers), Mixed("einsum", layers), vectors)
    proven(Mixed("added", layers), Mixed("added", layers), vectors)


class MixedGates(Mixed):
    """Weighs every layer by itself: no softmax over all of them."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(F.gelu(layer(states[-1])))
        y = (torch.stack(states, 1) * self.mix.sigmoid().view(-1, 1, 1)).sum(1)
        return self.out(y).log_softmax(-1)


class MixedLast(Mixed):
    """Takes the last layer twice, and leaves the input out."""

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for layer in self.layers:
            states.append(F.gelu(layer(states[-1])))
        states[0] = states[-1]
        return self.out(sum(a * s for a, s in zip(self.mix.softmax(-1), states, strict=True))).log_softmax(-1)


def test_a_sum_that_is_weighted_otherwise_is_another_function() -> None:
    refused(Mixed("sum"), MixedGates("sum"), vectors)
    refused(Mixed("added"), MixedGates("sum"), vectors)
    refused(Mixed("sum"), MixedLast("added"), vectors)
    refused(Mixed("added"), MixedLast("added"), vectors)


class Scored(nn.Module):
    """Pools by scores: a Linear to one number, or a vector that scales and is summed; a vector for each head."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.inner = how, nn.Linear(D, D)
        self.score = nn.Linear(D, 1, bias=False) if how == "linear" else par(D)
        self.heads = par(HEADS, D // HEADS) if how != "linear" else par(HEADS, D // HEADS, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x).tanh()
        h = y.unflatten(-1, (HEADS, -1))
        if self.how == "linear":
            w = self.score(y)
            a = (h.permute(2, 0, 1, 3).flatten(1, 2) @ self.heads).view(HEADS, *x.shape[:2]).permute(1, 2, 0)
        else:
            w = (y * self.score).sum(-1, keepdim=True)
            a = (h * self.heads).sum(-1)
        return torch.cat([(w.softmax(1) * x).sum(1), a.softmax(1).flatten(1)], 1)


def test_scores_by_a_vector_or_by_a_matrix() -> None:
    proven(Scored("linear"), Scored("vector"), vectors)
    proven(Scored("vector"), Scored("linear"), vectors)


def test_results_are_laid_out_as_the_program_expects_them() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.s = par(D, WORDS), par(TIME, 1)

        def forward(self, ids: Tensor, x: Tensor) -> tuple[Tensor, ...]:
            a = (self.w @ F.one_hot(ids[0], WORDS).to(self.w.dtype).T).view(-1)
            return a, (x * self.s).sum(1).view(-1), (x.mT * self.s[:, 0]).sum((-1,), keepdim=True).view(-1)

    m = stirred(Views(), 3)
    x = words(1)[0], vectors(1)
    tape = record(call, twin(m, {}), x)
    for vid, y in zip(tape.outputs(), m.double()(x[0], x[1].double()), strict=True):
        torch.testing.assert_close(tape.values[vid].tensor, y)
