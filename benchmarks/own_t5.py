"""T5 as a person writes it: keys and values in one matrix, the feed-forward as raw parameters, one table of tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def buckets(queries: int, keys: int, both_ways: bool) -> Tensor:
    """Which of 32 buckets each distance falls into (Raffel et al. 2020): exact when near, logarithmic when far."""
    gap = torch.arange(keys)[None, :] - torch.arange(queries)[:, None]
    n, out = 32, torch.zeros_like(gap)
    if both_ways:
        n = 16
        out = out + (gap > 0).long() * n
        gap = gap.abs()
    else:
        gap = (-gap).clamp_min(0)
    near = n // 2
    far = near + (torch.log(gap.clamp_min(1).float() / near) / math.log(128 / near) * (n - near)).long()
    return out + torch.where(gap < near, gap, far.clamp_max(n - 1))


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale


class Attend(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.norm = Norm(width)
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_kv = nn.Linear(width, 2 * width, bias=False)
        self.to_out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        q = self.to_q(h).unflatten(-1, (self.heads, self.size)).transpose(1, 2)
        kv = self.to_kv(h if memory is None else memory)
        k, v = (t.unflatten(-1, (self.heads, self.size)).transpose(1, 2) for t in kv.chunk(2, -1))
        weights = (q @ k.transpose(-1, -2) + bias).softmax(-1)
        return x + self.to_out((weights @ v).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.norm = Norm(width)
        self.up = nn.Parameter(torch.randn(width, inner) * width**-0.5)
        self.down = nn.Parameter(torch.randn(inner, width) * inner**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(x) @ self.up) @ self.down


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.attend = Attend(width, heads)
        self.cross = Attend(width, heads) if cross else None
        self.feed = Feed(width, inner)

    def forward(self, x: Tensor, bias: Tensor, memory: Tensor | None, hide: Tensor | None) -> Tensor:
        x = self.attend(x, bias)
        if self.cross is not None and memory is not None and hide is not None:
            x = self.cross(x, hide, memory)
        return self.feed(x)


class Tower(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, depth: int, decoder: bool) -> None:
        super().__init__()
        self.decoder = decoder
        self.distance = nn.Embedding(32, heads)
        self.layers = nn.ModuleList(Layer(width, inner, heads, decoder) for _ in range(depth))
        self.norm = Norm(width)

    def forward(self, x: Tensor, hide: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        n = x.shape[1]
        bias = self.distance(buckets(n, n, not self.decoder).to(x.device)).permute(2, 0, 1)[None]
        if self.decoder:
            later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, -1e9)
        elif hide is not None:
            bias = bias + hide
        for layer in self.layers:
            x = layer(x, bias, memory, hide)
        return self.norm(x)


class T5(nn.Module):
    def __init__(self, vocabulary: int, width: int, inner: int, heads: int, depth: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.reader = Tower(width, inner, heads, depth, decoder=False)
        self.writer = Tower(width, inner, heads, depth, decoder=True)

    def forward(self, ids: Tensor, begun: Tensor, mask: Tensor) -> Tensor:
        hide = (~mask)[:, None, None, :] * -1e9
        memory = self.reader(self.tokens(ids), hide)
        return self.writer(self.tokens(begun), hide, memory)
