"""An encoder that relates a series to itself at other times, as one writes it for oneself, and a small head.

    zoo graft autoformer-encoder examples/my_autoformer.py

The sizes are those of autoformer-tourism-monthly. It takes features, [B, T, F]: lagged values, time features and what
is known of the series.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def season(x: Tensor, window: int) -> Tensor:
    """What is left of a series without its moving average."""
    ends = (window - 1) // 2
    smooth = F.avg_pool1d(F.pad(x.transpose(1, 2), (ends, ends), mode="replicate"), window, 1)
    return x - smooth.transpose(1, 2)


class Correlate(nn.Module):
    """Values of the delays at which queries and keys agree most, weighted by how much they do."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).chunk(3, dim=-1)
        length = x.shape[1]
        spectrum = torch.fft.rfft(q, dim=1) * torch.fft.rfft(k, dim=1).conj()
        agreement = torch.fft.irfft(spectrum, n=length, dim=1).mean(-1)
        score, delay = agreement.topk(int(self.factor * math.log(length)), dim=1)
        at = (torch.arange(length, device=x.device)[None, None] + delay[:, :, None]) % length
        rows = torch.arange(len(x), device=x.device)[:, None, None]
        return self.out(torch.einsum("bk,bktd->btd", score.softmax(-1), v[rows, at]))


class Layer(nn.Module):
    def __init__(self, width: int, inner: int, window: int, factor: int) -> None:
        super().__init__()
        self.window = window
        self.correlate = Correlate(width, factor)
        self.first = nn.LayerNorm(width)
        self.grow = nn.Linear(width, inner)
        self.shrink = nn.Linear(inner, width)
        self.last = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = season(self.first(x + self.correlate(x)), self.window)
        x = self.last(season(x + self.shrink(F.gelu(self.grow(x))), self.window))
        return x - x.mean(1, keepdim=True)


class MyAutoformer(nn.Module):
    def __init__(
        self,
        feature_size: int = 22,
        d_model: int = 64,
        encoder_layers: int = 4,
        encoder_ffn_dim: int = 32,
        positions: int = 48,
        moving_average: int = 25,
        autocorrelation_factor: int = 3,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.project = nn.Linear(feature_size, d_model, bias=False)
        self.places = nn.Parameter(torch.zeros(positions, d_model), requires_grad=False)
        self.norm = nn.LayerNorm(d_model)
        self.layers = nn.ModuleList(
            Layer(d_model, encoder_ffn_dim, moving_average, autocorrelation_factor) for _ in range(encoder_layers)
        )
        self.judge = nn.Linear(d_model, classes)

    def forward(self, features: Tensor) -> Tensor:
        x = self.norm(self.project(features) + self.places[: features.shape[1]])
        for layer in self.layers:
            x = layer(x)
        return self.judge(x.amax(1))
