"""A headline writer: T5 of the first version in another spelling, with a head of its own beside the table of words.

zoo graft t5 examples/my_t5.py
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


class RootMeanSquare(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt())


class Distances(nn.Module):
    """A number for each head and each range of distances: near ones one by one, far ones by their logarithm."""

    def __init__(self, heads: int, ranges: int, far: int, both_ways: bool) -> None:
        super().__init__()
        self.table = nn.Embedding(ranges, heads)
        self.ranges, self.far, self.both_ways = ranges, far, both_ways

    def forward(self, queries: int, keys: int) -> Tensor:
        away = torch.arange(keys)[None] - torch.arange(queries)[:, None]
        ranges, start = self.ranges, torch.zeros_like(away)
        if self.both_ways:
            ranges //= 2
            start = (away > 0).long() * ranges
            away = away.abs()
        else:
            away = (-away).clamp_min(0)
        near = ranges // 2
        steps = torch.log(away.clamp_min(1).float() / near) / math.log(self.far / near) * (ranges - near)
        place = start + torch.where(away < near, away, (near + steps.long()).clamp_max(ranges - 1))
        return self.table(place.to(self.table.weight.device)).permute(2, 0, 1)[None]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = RootMeanSquare(width)
        self.ask = nn.Linear(width, inner, bias=False)
        self.answer = nn.Linear(width, 2 * inner, bias=False)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor, memory: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        normed = self.norm(x)
        seen = normed if memory is None else memory
        q = self.ask(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.answer(seen).chunk(2, -1))
        scores = q @ k.transpose(-1, -2)
        if bias is not None:
            scores = scores + bias
        return x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = RootMeanSquare(width)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).relu())


class Headlines(nn.Module):
    def __init__(
        self,
        words: int = 32128,
        width: int = 512,
        heads: int = 8,
        head_width: int = 64,
        feed: int = 2048,
        depth: int = 6,
        ranges: int = 32,
        far: int = 128,
        topics: int = 12,
    ) -> None:
        super().__init__()
        inner = heads * head_width
        self.words = nn.Embedding(words, width)
        self.around = Distances(heads, ranges, far, both_ways=True)
        self.behind = Distances(heads, ranges, far, both_ways=False)
        self.reader = nn.ModuleList(
            nn.ModuleList([Attention(width, heads, inner), Feed(width, feed)]) for _ in range(depth)
        )
        self.read = RootMeanSquare(width)
        self.writer = nn.ModuleList(
            nn.ModuleList([Attention(width, heads, inner), Attention(width, heads, inner), Feed(width, feed)])
            for _ in range(depth)
        )
        self.written = RootMeanSquare(width)
        self.topic = nn.Linear(width, topics)  # new: what the text is about

    def forward(self, ids: Tensor, mask: Tensor, decoder_ids: Tensor) -> tuple[Tensor, Tensor]:
        hidden = (1.0 - mask[:, None, None, :].to(self.words.weight.dtype)) * -1e9
        x = self.words(ids)
        near = self.around(ids.shape[1], ids.shape[1]) + hidden
        for attend, feed in self.reader:
            x = feed(attend(x, bias=near))
        memory = self.read(x)
        length = decoder_ids.shape[1]
        later = torch.full((length, length), -1e9, device=ids.device).triu(1)
        past = self.behind(length, length) + later
        y = self.words(decoder_ids)
        for attend, look, feed in self.writer:
            y = feed(look(attend(y, bias=past), memory, hidden))
        y = self.written(y)
        logits = (y * y.shape[-1] ** -0.5) @ self.words.weight.t()
        return logits, self.topic(memory.mean(1))
