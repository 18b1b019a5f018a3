"""A forecaster over patches as one writes it for oneself: own attention, mean pooling, a head still to be trained.

    zoo graft patchtst-encoder examples/my_patchtst.py

fills all but the head. The sizes are those of the published model.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Norm(nn.BatchNorm1d):
    """Batch normalisation over the last axis of [N, patches, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.before = Norm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.between = Norm(width)
        self.up = nn.Linear(width, inner)
        self.down = nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.between(x))))


class MyPatchTST(nn.Module):
    def __init__(
        self,
        context_length: int = 512,
        patch_length: int = 12,
        patch_stride: int = 12,
        d_model: int = 128,
        num_attention_heads: int = 16,
        num_hidden_layers: int = 3,
        ffn_dim: int = 512,
        horizon: int = 24,
    ) -> None:
        super().__init__()
        self.length, self.stride = patch_length, patch_stride
        count = (context_length - patch_length) // patch_stride + 1
        self.start = context_length - (patch_length + patch_stride * (count - 1))
        self.patch = nn.Linear(patch_length, d_model)
        self.place = nn.Parameter(torch.zeros(count, d_model))
        self.blocks = nn.ModuleList(Block(d_model, num_attention_heads, ffn_dim) for _ in range(num_hidden_layers))
        self.forecast = nn.Linear(d_model, horizon)

    def encode(self, series: Tensor) -> Tensor:
        """[B, T, channels] -> [B, channels, patches, width]; each channel goes its own way."""
        mean = series.mean(1, keepdim=True)
        spread = (series.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        x = ((series - mean) / spread)[:, self.start :].transpose(1, 2).unfold(-1, self.length, self.stride)
        batch, channels = x.shape[:2]
        x = (self.patch(x) + self.place).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return x.unflatten(0, (batch, channels))

    def forward(self, series: Tensor) -> Tensor:
        return self.forecast(self.encode(series).mean(2)).transpose(1, 2)
