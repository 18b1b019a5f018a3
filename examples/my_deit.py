"""A distilled vision transformer: two tokens of its own before the patches, and a fresh head on the mean of all.

    zoo graft deit.tiny-distilled-encoder examples/my_deit.py

Attention is torch's own module; the tokens are one parameter.
"""

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Student(nn.Module):
    def __init__(
        self, side: int = 224, patch: int = 16, width: int = 192, depth: int = 12, heads: int = 3, classes: int = 5
    ) -> None:
        super().__init__()
        self.cut = nn.Conv2d(3, width, patch, patch)
        self.own = nn.Parameter(torch.zeros(1, 1, width))
        self.teacher = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 2 + (side // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.cut(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.own.expand(len(x), -1, -1), self.teacher.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x + self.places))
        return self.head(x.mean(1))
