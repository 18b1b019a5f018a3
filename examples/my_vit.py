"""A vision transformer as one writes it for oneself, with mean pooling and a head that is still to be trained.

    zoo graft vit-encoder examples/my_vit.py

Its projections are one matrix, its attention is written as sums, and nothing here has timm's names. The same file takes
DeiT (`zoo graft deit-encoder ...`): that has this form, and these sizes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int, wide: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_mixing = nn.LayerNorm(width, eps=1e-6)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.before_thinking = nn.LayerNorm(width, eps=1e-6)
        self.widen = nn.Linear(width, wide)
        self.narrow = nn.Linear(wide, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        y = self.before_mixing(x)
        q = self.query(y).view(b, n, self.heads, -1)
        k, v = self.key_value(y).view(b, n, 2, self.heads, -1).unbind(2)
        seen = torch.einsum("bqhd,bkhd->bhqk", q * q.shape[-1] ** -0.5, k).softmax(-1)
        x = x + self.out(torch.einsum("bhqk,bkhd->bqhd", seen, v).reshape(b, n, c))
        return x + self.narrow(F.gelu(self.widen(self.before_thinking(x))))


class PictureClassifier(nn.Module):
    def __init__(
        self,
        side: int = 224,
        patch: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
        wide: int = 3072,
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.summary = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 1 + (side // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads, wide) for _ in range(depth))
        self.last = nn.LayerNorm(width, eps=1e-6)
        self.answer = nn.Linear(width, classes)

    def encode(self, images: Tensor) -> Tensor:
        """One vector for each patch, and before them one for the picture."""
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.summary.expand(len(x), -1, -1), x], 1) + self.places
        for block in self.blocks:
            x = block(x)
        return self.last(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.answer(self.encode(images).mean(1))
