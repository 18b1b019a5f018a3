"""A listener for emotions as one writes it for oneself: wav2vec 2.0 under mean and deviation, and a head of its own.

    zoo graft wav2vec2-encoder examples/my_wav2vec2.py

The sizes are those of wav2vec2-base; queries, keys and values share a projection.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


class Block(nn.Module):
    """Attention and a perceptron, each with its norm behind the sum."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.norm1(x + self.out(mixed))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Emotions(nn.Module):
    """From a waveform [B, samples] at 16 kHz to logits [B, classes]."""

    def __init__(
        self,
        channels: int = 512,
        kernels: tuple[int, ...] = KERNELS,
        strides: tuple[int, ...] = STRIDES,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        inner: int = 3072,
        reach: int = 128,
        groups: int = 16,
        classes: int = 7,
    ) -> None:
        super().__init__()
        ins = (1, *(channels for _ in kernels[1:]))
        self.ears = nn.ModuleList(
            nn.Conv1d(n, channels, kernel, stride, bias=False)
            for n, kernel, stride in zip(ins, kernels, strides, strict=True)
        )
        self.level = nn.GroupNorm(channels, channels)
        self.scale = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, width)
        # One weight, and not a length times a direction: what is grafted is their product.
        self.place = nn.Conv1d(width, width, reach, padding=reach // 2, groups=groups)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.head = nn.Linear(2 * width, classes)

    def encode(self, wave: Tensor) -> Tensor:
        """One vector per frame of 20 ms."""
        x = wave[:, None]
        for i, conv in enumerate(self.ears):
            x = conv(x)
            x = F.gelu(self.level(x) if i == 0 else x)
        x = self.widen(self.scale(x.transpose(1, 2)))
        place = self.place(x.transpose(1, 2))[:, :, : x.shape[1]]  # an even kernel gives one frame too many
        x = self.norm(x + F.gelu(place).transpose(1, 2))
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, wave: Tensor) -> Tensor:
        x = self.encode(wave)
        spread = (x - x.mean(1, keepdim=True)).pow(2).mean(1).sqrt()
        return self.head(torch.cat([x.mean(1), spread], dim=-1))
