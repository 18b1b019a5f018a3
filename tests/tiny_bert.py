"""A BERT small enough to search and prove in seconds, saved as transformers saves it; and modules that are one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 24,
}

# The names are a person's own, keys and values share a projection, and there is a head that no checkpoint knows.
MINE = """
import math

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, dim, heads, inner):
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(dim, dim)
        self.wkv = nn.Linear(dim, 2 * dim)
        self.wo = nn.Linear(dim, dim)
        self.ln1 = nn.LayerNorm(dim, eps=1e-12)
        self.up = nn.Linear(dim, inner)
        self.down = nn.Linear(inner, dim)
        self.ln2 = nn.LayerNorm(dim, eps=1e-12)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x, mask):
        k, v = self.wkv(x).chunk(2, dim=-1)
        q, k, v = self.split(self.wq(x)), self.split(k), self.split(v)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask[:, None, None, :] == 0, float("-inf"))
        x = self.ln1(x + self.wo((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return self.ln2(x + self.down(F.gelu(self.up(x))))


class Tagger(nn.Module):
    def __init__(self, vocab=40, dim=16, depth=2, heads=4, inner=32, longest=24, tags=5):
        super().__init__()
        self.word = nn.Embedding(vocab, dim)
        self.place = nn.Embedding(longest, dim)
        self.kind = nn.Embedding(2, dim)
        self.ln = nn.LayerNorm(dim, eps=1e-12)
        self.layers = nn.ModuleList(Layer(dim, heads, inner) for _ in range(depth))
        self.tag = nn.Linear(dim, tags)

    def forward(self, ids, mask, kinds):
        place = torch.arange(ids.shape[1], device=ids.device)
        x = self.ln(self.word(ids) + self.place(place) + self.kind(kinds))
        for layer in self.layers:
            x = layer(x, mask)
        return self.tag(x)
"""

PAIR = """
import torch
from torch import nn

from mine import Tagger


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = Tagger(), Tagger()
        self.both = nn.Linear(10, 2)

    def forward(self, a, b, seen):
        kinds = torch.zeros_like(a)
        return self.both(torch.cat([self.left(a, seen, kinds), self.right(b, seen, kinds)], -1))


def example():
    ids = torch.randint(0, 40, (2, 6), generator=torch.Generator().manual_seed(0))
    return ids, ids.flip(0), torch.ones_like(ids)
"""


def save(folder: Path, name: str = "BertModel", *, seed: int = 0) -> Any:
    """Save a seeded model of that class, and give it back."""
    import torch
    import transformers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, name)(transformers.BertConfig(**SIZES)).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # so that no bias is zero, and no LayerNorm the identity
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model
