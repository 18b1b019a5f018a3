"""Learned queries that are projected once, or once an item of the batch; and targets that are almost the same."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tests.surgery.test_products import HEADS, D, par, proven, refused, vectors


class Pool(nn.Module):
    """Attention of one learned query, in torch's module."""

    def __init__(self, queries: int = 1, *, weights: bool = True) -> None:
        super().__init__()
        self.probe, self.weights = par(1, queries, D), weights
        self.att = nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.att(self.probe.repeat(len(x), 1, 1), x, x, need_weights=self.weights)[0].flatten(1)


class OwnPool(nn.Module):
    """The query is projected once; it is scaled before, after, or not at all."""

    def __init__(self, queries: int = 1, *, scale: float = 1.0, biased: bool = True) -> None:
        super().__init__()
        self.query, self.q, self.scale = par(queries, D), par(D, D), scale
        self.q_bias = par(D) if biased else None
        self.kv, self.o = nn.Linear(D, 2 * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.kv(x).unflatten(-1, (2 * HEADS, -1)).chunk(2, 2)
        q = self.query @ self.q
        q = (q if self.q_bias is None else q + self.q_bias).unflatten(-1, (HEADS, -1))
        w = torch.einsum("qhd,bshd->bhqs", q, k) * self.scale / math.sqrt(D // HEADS)
        return self.o(torch.einsum("bhqs,bshd->bqhd", w.softmax(-1), v).flatten(2)).flatten(1)


@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("weights", [True, False])
def test_a_learned_query_that_is_projected_once_or_once_an_item(queries: int, weights: bool) -> None:
    proven(Pool(queries, weights=weights), OwnPool(queries), vectors)
    proven(OwnPool(queries), Pool(queries, weights=weights), vectors)


def test_a_learned_query_by_either_path_of_torchs_attention() -> None:
    proven(Pool(weights=True), Pool(weights=False), vectors)
    proven(Pool(weights=False), Pool(weights=True), vectors)


def test_a_query_without_its_bias_is_another_function() -> None:
    refused(Pool(), OwnPool(biased=False), vectors)
    refused(Pool(2), OwnPool(1), vectors)
