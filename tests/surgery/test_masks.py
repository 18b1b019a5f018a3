"""Masked scores are told from activations that are merely large."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from surgery.mapper.masks import masked
from surgery.mapper.record import fingerprint, same
from tests.surgery.test_spellings import D, graft, tokens

INF = float("inf")


@given(
    seed=st.integers(0, 99),
    scale=st.floats(0.1, 300),
    how=st.sampled_from([-1e4, -1e9, torch.finfo(torch.float32).min, -INF]),
)
def test_whatever_stands_for_never_has_one_fingerprint(seed: int, scale: float, how: float) -> None:
    g = torch.Generator().manual_seed(seed)
    scores = torch.rand(6, 6, generator=g, dtype=torch.float64) * scale
    never = torch.ones(6, 6).triu(1).bool()
    shown = masked(scores + torch.where(never, how, 0.0))
    assert torch.equal(shown, never)
    a, b = fingerprint(scores + torch.where(never, how, 0.0)), fingerprint(scores.masked_fill(never, -INF))
    assert a is not None
    assert b is not None
    assert same(a, b)


@pytest.mark.parametrize("scale", [5e3, 1e5, 1e8])
def test_what_is_large_is_not_masked(scale: float) -> None:
    x = torch.randn(64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * scale
    assert not masked(x).any()
    x[3, 5] = -INF
    assert masked(x).sum() == 1


class Large(nn.Module):
    """Activations of `scale`, and positions added to them."""

    def __init__(self, scale: float, first: bool) -> None:
        super().__init__()
        self.scale, self.first = scale, first
        self.a, self.b, self.c, self.n = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, 4), nn.LayerNorm(D)
        self.place = nn.Parameter(torch.zeros(9, D))

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.a(x) * self.scale)
        x = self.place + x if self.first else x + self.place
        return self.c(self.n(x + F.gelu(self.b(x))))


@pytest.mark.parametrize("scale", [1e4, 3e5])
@pytest.mark.parametrize("first", [False, True])
def test_large_activations_are_evidence(scale: float, first: bool) -> None:
    report = graft(Large(scale, False), Large(scale, first), tokens)
    assert all(row.sources == (row.name,) for row in report.rows)
