"""Swin as one writes it for oneself: windows by reshaping, biases looked up by pair, a fresh head.

zoo graft swin-encoder examples/my_swin.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class WindowBlock(nn.Module):
    """Attention within windows of `size` squared tokens, all of them moved by `shift` before and back after."""

    def __init__(self, dim: int, heads: int, side: int, size: int, shift: int) -> None:
        super().__init__()
        self.heads, self.size, self.shift = heads, size, shift
        self.pre = nn.LayerNorm(dim)
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.merge = nn.Linear(dim, dim)
        self.bias = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        self.post = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        place = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")).flatten(1)
        apart = place[:, :, None] - place[:, None, :] + size - 1
        self.register_buffer("pair", apart[0] * (2 * size - 1) + apart[1], persistent=False)
        self.register_buffer("apart", self._strangers(side), persistent=False)

    def _strangers(self, side: int) -> Tensor:
        """Which tokens of a window came from opposite edges: they do not see each other."""
        edge = torch.arange(side)
        region = (edge >= side - self.size).long() + (edge >= side - self.shift).long() * (self.shift > 0)
        region = self._windows((3 * region[:, None] + region)[None, :, :, None])[..., 0]
        return region[:, None, :, None] != region[:, None, None, :]

    def _windows(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B * windows, tokens of one, C]"""
        b, h, w, c = x.shape
        x = x.view(b, h // self.size, self.size, w // self.size, self.size, c).transpose(2, 3)
        return x.reshape(-1, self.size * self.size, c)

    def forward(self, x: Tensor) -> Tensor:
        b, h, w, c = x.shape
        y = self._windows(torch.roll(self.pre(x), (-self.shift, -self.shift), (1, 2)))
        q, k, v = (f(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        score = q @ k.mT * q.shape[-1] ** -0.5 + self.bias[self.pair].permute(2, 0, 1)
        if self.shift:
            score = score.masked_fill(self.apart.repeat(b, 1, 1, 1), -100.0 * 1e4)
        y = self.merge((score.softmax(-1) @ v).transpose(1, 2).flatten(2))
        y = y.view(b, h // self.size, w // self.size, self.size, self.size, c).transpose(2, 3).reshape(b, h, w, c)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        return x + self.down(F.gelu(self.up(self.post(x))))


class Halve(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.mix = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        corners = [x[:, i::2, j::2] for j in (0, 1) for i in (0, 1)]
        return self.mix(self.norm(torch.cat(corners, -1)))


class Pyramid(nn.Module):
    def __init__(
        self,
        side: int = 224,
        dim: int = 96,
        depths: tuple[int, ...] = (2, 2, 6, 2),
        heads: tuple[int, ...] = (3, 6, 12, 24),
        window: int = 7,
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, dim, 4, 4)
        self.cut_norm = nn.LayerNorm(dim)
        side //= 4
        layers: list[nn.Module] = []
        for stage, (depth, count) in enumerate(zip(depths, heads, strict=True)):
            if stage:
                layers.append(Halve(dim))
                dim, side = 2 * dim, side // 2
            size = min(window, side)
            for i in range(depth):
                layers.append(WindowBlock(dim, count, side, size, size // 2 if i % 2 and side > size else 0))
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut_norm(self.cut(images).permute(0, 2, 3, 1))
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean((1, 2)))
