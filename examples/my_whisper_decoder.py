"""Speech to text as one writes it for oneself: all of Whisper, in one file.

    zoo graft whisper examples/my_whisper_decoder.py

The sizes are those of whisper-base. Keys have no bias, as in Whisper, and the head is the table of tokens.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor, causal: bool = False) -> Tensor:
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (self.q(x), self.k(memory), self.v(memory))
        )
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
        if causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, float("-inf"))
        return self.o(torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, cross: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.own = Attention(width, heads)
        if cross:
            self.norm2 = nn.LayerNorm(width)
            self.heard = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.own(y, y, causal=memory is not None)
        if memory is not None:
            x = x + self.heard(self.norm2(x), memory)
        return x + self.mlp(self.norm3(x))


class SpeechToText(nn.Module):
    """From log-mel features [B, mels, 2 * frames] and tokens [B, T] to logits [B, T, vocab]."""

    def __init__(
        self,
        vocab: int = 51865,
        mels: int = 80,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        inner: int = 2048,
        frames: int = 1500,
        longest: int = 448,
    ) -> None:
        super().__init__()
        self.first = nn.Conv1d(mels, width, 3, padding=1)
        self.second = nn.Conv1d(width, width, 3, stride=2, padding=1)
        self.times = nn.Embedding(frames, width)
        self.listen = nn.ModuleList(Block(width, heads, inner, cross=False) for _ in range(layers))
        self.listened = nn.LayerNorm(width)
        self.words = nn.Embedding(vocab, width)
        self.order = nn.Parameter(torch.zeros(longest, width))
        self.speak = nn.ModuleList(Block(width, heads, inner, cross=True) for _ in range(layers))
        self.spoken = nn.LayerNorm(width)

    def forward(self, mel: Tensor, tokens: Tensor) -> Tensor:
        heard = F.gelu(self.second(F.gelu(self.first(mel)))).transpose(1, 2) + self.times.weight
        for block in self.listen:
            heard = block(heard)
        heard = self.listened(heard)
        x = self.words(tokens) + self.order[: tokens.shape[1]]
        for block in self.speak:
            x = block(x, heard)
        return self.spoken(x) @ self.words.weight.T
