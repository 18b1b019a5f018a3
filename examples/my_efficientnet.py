"""EfficientNet-B0 as one writes it for oneself, with a fresh head.

zoo graft efficientnet-body examples/my_efficientnet.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class ConvNorm(nn.Module):
    """A convolution, its norm, and SiLU where it is asked for."""

    def __init__(
        self, into: int, out: int, size: int = 1, stride: int = 1, groups: int = 1, active: bool = True
    ) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(out, into // groups, size, size) * 0.05)
        self.norm = nn.BatchNorm2d(out)
        self.stride, self.groups, self.active = stride, groups, active

    def forward(self, x: Tensor) -> Tensor:
        pad = self.kernel.shape[-1] // 2
        y = self.norm(F.conv2d(x, self.kernel, None, self.stride, pad, 1, self.groups))
        return F.silu(y) if self.active else y


class Gate(nn.Module):
    """How much of each channel goes on, told by the whole picture."""

    def __init__(self, channels: int, narrow: int) -> None:
        super().__init__()
        self.squeeze = nn.Linear(channels, narrow)
        self.excite = nn.Linear(narrow, channels)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.excite(F.silu(self.squeeze(x.mean((2, 3))))).sigmoid()
        return x * gate[:, :, None, None]


class Block(nn.Module):
    def __init__(self, into: int, out: int, size: int, stride: int, expand: int) -> None:
        super().__init__()
        wide = into * expand
        self.expand = ConvNorm(into, wide) if expand > 1 else None
        self.depth = ConvNorm(wide, wide, size, stride, groups=wide)
        self.gate = Gate(wide, into // 4)
        self.project = ConvNorm(wide, out, active=False)
        self.add = stride == 1 and into == out

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else self.expand(x)
        y = self.project(self.gate(self.depth(y)))
        return x + y if self.add else y


# (how many blocks, kernel, stride of the first, how much wider within, channels)
B0 = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Network(nn.Module):
    def __init__(
        self, stem: int = 32, stages: tuple[tuple[int, ...], ...] = B0, last: int = 1280, classes: int = 5
    ) -> None:
        super().__init__()
        self.stem = ConvNorm(3, stem, 3, 2)
        blocks, into = [], stem
        for count, size, stride, expand, out in stages:
            for i in range(count):
                blocks.append(Block(into, out, size, 1 if i else stride, expand))
                into = out
        self.blocks = nn.Sequential(*blocks)
        self.last = ConvNorm(into, last)
        self.head = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(images))).mean((2, 3)))
