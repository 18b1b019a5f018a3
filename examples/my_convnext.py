"""ConvNeXt in channels-last form throughout, with a fresh head.

zoo graft convnext-body examples/my_convnext.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.look = nn.Conv2d(dim, dim, 7, padding=3, groups=dim)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C]"""
        y = self.look(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.scale * self.down(F.gelu(self.up(self.norm(y))))


class Shrink(nn.Module):
    """Squares of pixels become one, and are normalised before or after."""

    def __init__(self, into: int, out: int, size: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.norm = nn.LayerNorm(out if first else into, eps=1e-6)
        self.merge = nn.Conv2d(into, out, size, size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.first:
            x = self.norm(x)
        x = self.merge(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return self.norm(x) if self.first else x


class Network(nn.Module):
    def __init__(
        self, dims: tuple[int, ...] = (96, 192, 384, 768), depths: tuple[int, ...] = (3, 3, 9, 3), classes: int = 5
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
            layers.append(Shrink(dims[i - 1] if i else 3, dim, 2 if i else 4, first=not i))
            layers += [Block(dim) for _ in range(depth)]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(dims[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.amax((1, 2)))
