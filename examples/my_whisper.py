"""A tagger of sounds as one writes it for oneself: Whisper's encoder, pooled by attention, and a head for tags.

    zoo graft whisper-encoder examples/my_whisper.py

The sizes are those of whisper-base; queries, keys and values share a projection, and the head is still to be trained.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def sinusoids(length: int, width: int) -> Tensor:
    """[length, width]: sines, then cosines, at wavelengths up to 10000."""
    rates = torch.exp(-math.log(10000) / (width // 2 - 1) * torch.arange(width // 2))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_mix = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.before_mlp = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.before_mix(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class SoundTagger(nn.Module):
    """From log-mel features [B, mels, 2 * positions] to tags [B, tags]."""

    def __init__(
        self,
        mels: int = 80,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        inner: int = 2048,
        positions: int = 1500,
        tags: int = 50,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv1d(mels, width, 3, padding=1),
            nn.GELU(),
            nn.Conv1d(width, width, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.places = nn.Parameter(sinusoids(positions, width))
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.attend = nn.Linear(width, 1)
        self.tags = nn.Linear(width, tags)

    def encode(self, mel: Tensor) -> Tensor:
        """One vector per frame."""
        x = self.stem(mel).transpose(1, 2) + self.places
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, mel: Tensor) -> Tensor:
        x = self.encode(mel)
        return self.tags((self.attend(x).softmax(dim=1) * x).sum(dim=1))
