"""Blocks that fold a series by its strongest periods and look at it as an image, as one writes them for oneself.

    zoo graft file:checkpoint.pth#encoder examples/my_timesnet.py

The file is one's own: TimesNet's authors publish no weights. The sizes are Time-Series-Library's defaults.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Inception(nn.Module):
    """The mean of convolutions with windows of 1, 3, 5 ..."""

    def __init__(self, width: int, out: int, kernels: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, out, 2 * i + 1, padding="same") for i in range(kernels))

    def forward(self, x: Tensor) -> Tensor:
        return sum(conv(x) for conv in self.convs) / len(self.convs)


class Fold(nn.Module):
    def __init__(self, width: int, inner: int, kernels: int, periods: int) -> None:
        super().__init__()
        self.periods = periods
        self.wide = Inception(width, inner, kernels)
        self.narrow = Inception(inner, width, kernels)

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        strength = torch.fft.rfft(x, dim=1).abs()
        overall = strength.mean((0, 2))
        chosen = 1 + overall[1:].topk(self.periods).indices
        shares = strength.mean(-1)[:, chosen].softmax(-1)
        y = x
        for i, frequency in enumerate(chosen.tolist()):
            period = length // frequency
            rows = -(-length // period)
            image = F.pad(x.transpose(1, 2), (0, rows * period - length)).unflatten(-1, (rows, period))
            seen = self.narrow(F.gelu(self.wide(image))).flatten(2)[..., :length].transpose(1, 2)
            y = y + shares[:, i, None, None] * seen
        return y


class MyTimesNet(nn.Module):
    """From hidden states [B, T, width] to classes; what makes the states of a series is the person's own."""

    def __init__(
        self,
        width: int = 16,
        inner: int = 32,
        depth: int = 2,
        kernels: int = 6,
        periods: int = 5,
        classes: int = 2,
    ) -> None:
        super().__init__()
        self.folds = nn.ModuleList(Fold(width, inner, kernels, periods) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.judge = nn.Linear(width, classes)

    def forward(self, states: Tensor) -> Tensor:
        for fold in self.folds:
            states = self.norm(fold(states))
        return self.judge(states.mean(1))
