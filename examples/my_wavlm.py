"""Who speaks, as one writes it for oneself: WavLM's body, mean and deviation over time, and an embedding of voices.

    zoo graft wavlm-encoder examples/my_wavlm.py

The sizes are those of wavlm-base. The bias by distance is one table for all layers, turned to [heads, buckets], and
keys and values share a projection.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

KERNELS, STRIDES = (10, 3, 3, 3, 3, 2, 2), (5, 2, 2, 2, 2, 2, 2)


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.gate = nn.Linear(width // heads, 8)
        self.gate_scale = nn.Parameter(torch.ones(heads))
        self.norm1 = nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, width))
        self.norm2 = nn.LayerNorm(width)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        # How much of the bias a frame wants is a matter of what is in it.
        a, b = torch.sigmoid(self.gate(self.split(x)).unflatten(-1, (2, 4)).sum(-1)).unbind(-1)
        amount = a * (b * self.gate_scale[:, None] - 1) + 2
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = self.split(self.q(x)), self.split(k), self.split(v)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=amount[..., None] * bias)
        x = self.norm1(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.ffn(x))


class Voices(nn.Module):
    """From a waveform [B, samples] at 16 kHz to a voice's vector [B, size]."""

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
        buckets: int = 320,
        farthest: int = 800,
        size: int = 192,
    ) -> None:
        super().__init__()
        ins = (1, *(channels for _ in kernels[1:]))
        self.farthest = farthest
        self.distance = nn.Parameter(torch.zeros(heads, buckets))
        self.front = nn.ModuleList(
            nn.Conv1d(n, channels, kernel, stride, bias=False)
            for n, kernel, stride in zip(ins, kernels, strides, strict=True)
        )
        self.level = nn.GroupNorm(channels, channels)
        self.scale = nn.LayerNorm(channels)
        self.widen = nn.Linear(channels, width)
        self.place = nn.Conv1d(width, width, reach, padding=reach // 2, groups=groups)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.voice = nn.Linear(2 * width, size)

    def bias(self, length: int) -> Tensor:
        """[heads, length, length]: near distances have a row each, far ones share rows, the two directions differ."""
        place = torch.arange(length, device=self.distance.device)
        away = place[None] - place[:, None]
        half = self.distance.shape[1] // 2
        near = half // 2
        log = torch.log(away.abs().clamp_min(1) / near) / math.log(self.farthest / near)
        far = (near + (log * (half - near)).long()).clamp_max(half - 1)
        return self.distance[:, (away > 0) * half + torch.where(away.abs() < near, away.abs(), far)]

    def encode(self, wave: Tensor) -> Tensor:
        """One vector per frame of 20 ms."""
        x = wave[:, None]
        for i, conv in enumerate(self.front):
            x = conv(x)
            x = F.gelu(self.level(x) if i == 0 else x)
        x = self.widen(self.scale(x.mT))
        x = self.norm(x + F.gelu(self.place(x.mT)[..., : x.shape[1]]).mT)
        bias = self.bias(x.shape[1])
        for layer in self.layers:
            x = layer(x, bias)
        return x

    def forward(self, wave: Tensor) -> Tensor:
        x = self.encode(wave)
        spread = (x - x.mean(1, keepdim=True)).pow(2).mean(1).sqrt()
        return F.normalize(self.voice(torch.cat([x.mean(1), spread], dim=-1)), dim=-1)
