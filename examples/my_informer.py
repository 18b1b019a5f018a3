"""An encoder of series that halves its length layer by layer, as one writes it for oneself, and a small head.

    zoo graft informer-encoder examples/my_informer.py

The sizes are those of informer-tourism-monthly. It takes features, [B, T, F]: lagged values, time features and what is
known of the series. It attends to all keys: where a series is short, an Informer's sparse attention does the same.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.merge = nn.Linear(width, width)
        self.norm_a = nn.LayerNorm(width)
        self.grow = nn.Linear(width, inner)
        self.shrink = nn.Linear(inner, width)
        self.norm_b = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k, v = self.key_value(x).unflatten(-1, (2, self.heads, -1)).unbind(2)
        weights = torch.einsum("bqhd,bkhd->bhqk", q / math.sqrt(q.shape[-1]), k).softmax(-1)
        x = self.norm_a(x + self.merge(torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)))
        return self.norm_b(x + self.shrink(F.gelu(self.grow(x))))


class Halve(nn.Module):
    """A convolution around the ends, and the greater of neighbours."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(F.pad(x.transpose(1, 2), (1, 1), mode="circular"))
        return F.max_pool1d(F.elu(self.norm(y)), 3, 2, 1).transpose(1, 2)


class MyInformer(nn.Module):
    def __init__(
        self,
        feature_size: int = 22,
        d_model: int = 32,
        encoder_layers: int = 4,
        encoder_attention_heads: int = 2,
        encoder_ffn_dim: int = 32,
        positions: int = 48,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(feature_size, d_model, bias=False)
        self.places = nn.Embedding(positions, d_model)
        self.norm = nn.LayerNorm(d_model)
        self.layers = nn.ModuleList(
            Layer(d_model, encoder_attention_heads, encoder_ffn_dim) for _ in range(encoder_layers)
        )
        self.halves = nn.ModuleList(Halve(d_model) for _ in range(encoder_layers - 1))
        self.judge = nn.Linear(d_model, classes)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(self.project(features) + self.places.weight[: features.shape[1]])
        for i, layer in enumerate(self.layers):
            x = layer(x)
            if i < len(self.halves):
                x = self.halves[i](x)
        return self.judge(x.mean(1))
