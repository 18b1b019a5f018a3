"""A writer with a score of its own: GPT-2's decoder in another spelling, and a head that says how toxic a text is.

zoo graft gpt2-decoder examples/my_gpt2.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """Queries, keys and values apart, one matrix for each head, as in the paper."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        each = width // heads
        self.query = nn.Parameter(torch.randn(heads, width, each) / math.sqrt(width))
        self.key = nn.Parameter(torch.randn(heads, width, each) / math.sqrt(width))
        self.value = nn.Parameter(torch.randn(heads, width, each) / math.sqrt(width))
        self.query_bias = nn.Parameter(torch.zeros(heads, each))
        self.key_bias = nn.Parameter(torch.zeros(heads, each))
        self.value_bias = nn.Parameter(torch.zeros(heads, each))
        self.join = nn.Linear(width, width)

    def forward(self, x: Tensor, future: Tensor) -> Tensor:
        q = torch.einsum("btd,hde->bhte", x, self.query) + self.query_bias[:, None]
        k = torch.einsum("btd,hde->bhte", x, self.key) + self.key_bias[:, None]
        v = torch.einsum("btd,hde->bhte", x, self.value) + self.value_bias[:, None]
        scores = torch.einsum("bhqe,bhke->bhqk", q, k) / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        return self.join((weights @ v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before_attention = nn.LayerNorm(width)
        self.attention = Heads(width, heads)
        self.before_feed = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, future: Tensor) -> Tensor:
        x = x + self.attention(self.before_attention(x), future)
        return x + self.feed(self.before_feed(x))


class Scored(nn.Module):
    def __init__(
        self, words: int = 50257, longest: int = 1024, width: int = 768, heads: int = 12, depth: int = 12
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(words, width)
        self.places = nn.Parameter(torch.randn(longest, width) * 0.01)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.last = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        x = self.words(ids) + self.places[:length]
        future = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        for layer in self.layers:
            x = layer(x, future)
        return self.score(self.last(x)[:, -1]).squeeze(-1)
