"""A spotter of keywords as one writes it for oneself: HuBERT's body, the largest value over time, and a head.

    zoo graft hubert-encoder examples/my_hubert.py

The sizes are those of hubert-base-ls960. Convolutions are called as functions of weights that the module keeps, time
comes before channels between them, and attention is written out as sums over named axes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        size = width // heads
        self.query = nn.Parameter(torch.randn(heads, width, size) / width**0.5)
        self.key = nn.Parameter(torch.randn(heads, width, size) / width**0.5)
        self.value = nn.Parameter(torch.randn(heads, width, size) / width**0.5)
        self.biases = nn.Parameter(torch.zeros(3, heads, 1, size))
        self.merge = nn.Linear(width, width)
        self.ln_a = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.ln_b = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            torch.einsum("btw,hws->bhts", x, weight) + bias
            for weight, bias in zip((self.query, self.key, self.value), self.biases, strict=True)
        )
        seen = (torch.einsum("bhqs,bhks->bhqk", q, k) * q.shape[-1] ** -0.5).softmax(-1)
        mixed = torch.einsum("bhqk,bhks->bqhs", seen, v).flatten(2)
        x = self.ln_a(x + self.merge(mixed))
        return self.ln_b(x + self.ffn(x))


class KeywordSpotter(nn.Module):
    """From a waveform [B, samples] at 16 kHz to logits [B, words]."""

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
        words: int = 35,
    ) -> None:
        super().__init__()
        ins = (1, *(channels for _ in kernels[1:]))
        self.strides = strides
        self.filters = nn.ParameterList(
            torch.randn(channels, n, kernel) / (n * kernel) ** 0.5 for n, kernel in zip(ins, kernels, strict=True)
        )
        self.level = nn.GroupNorm(channels, channels)
        self.bridge = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, width))
        self.order = weight_norm(nn.Conv1d(width, width, reach, padding=reach // 2, groups=groups), dim=2)
        self.ready = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.words = nn.Linear(width, words)

    def encode(self, samples: Tensor) -> Tensor:
        """One vector per frame of 20 ms."""
        x = samples.unsqueeze(1)
        for i, (weight, stride) in enumerate(zip(self.filters, self.strides, strict=True)):
            x = F.conv1d(x, weight, stride=stride)
            x = F.gelu(self.level(x)) if i == 0 else F.gelu(x)
        x = self.bridge(x.mT)
        x = self.ready(x + F.gelu(self.order(x.mT)[..., : x.shape[1]]).mT)
        for layer in self.layers:
            x = layer(x)
        return x

    def forward(self, samples: Tensor) -> Tensor:
        return self.words(self.encode(samples).amax(dim=1))
