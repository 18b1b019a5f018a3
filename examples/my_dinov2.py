"""DINOv2 as a backbone: the picture's vector and the mean over patches, and a linear head to train on them.

zoo graft dinov2-encoder examples/my_dinov2.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.ln_a = nn.LayerNorm(dim, eps=1e-6)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.scale_a = nn.Parameter(torch.ones(dim))
        self.ln_b = nn.LayerNorm(dim, eps=1e-6)
        self.up = nn.Linear(dim, 4 * dim)
        self.down = nn.Linear(4 * dim, dim)
        self.scale_b = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, d = x.shape
        q, k, v = (t.view(b, n, self.heads, -1).transpose(1, 2) for t in self.qkv(self.ln_a(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + self.scale_a * self.proj(y)
        return x + self.scale_b * self.down(F.gelu(self.up(self.ln_b(x))))


class Backbone(nn.Module):
    def __init__(
        self, side: int = 518, patch: int = 14, dim: int = 768, depth: int = 12, heads: int = 12, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, dim, patch, patch)
        self.cls = nn.Parameter(torch.zeros(dim))
        self.pos = nn.Parameter(torch.zeros(1 + (side // patch) ** 2, dim))
        self.layers = nn.ModuleList(Layer(dim, heads) for _ in range(depth))
        self.ln = nn.LayerNorm(dim, eps=1e-6)
        self.probe = nn.Linear(2 * dim, classes)

    def forward(self, img: Tensor) -> Tensor:
        x = self.stem(img).flatten(2).mT
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.pos
        for layer in self.layers:
            x = layer(x)
        x = self.ln(x)
        return self.probe(torch.cat([x[:, 0], x[:, 1:].mean(1)], -1))
