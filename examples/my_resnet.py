"""A residual network as one writes it for oneself, with a fresh head over mean and maximum.

zoo graft resnet-body examples/my_resnet.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Normed(nn.Module):
    """A convolution and the norm behind it."""

    def __init__(self, into: int, out: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.filters = nn.Conv2d(into, out, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.filters(x))


class Bottleneck(nn.Module):
    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.narrow = Normed(into, width, 1)
        self.look = Normed(width, width, 3, stride)
        self.widen = Normed(width, out, 1)
        self.skip = Normed(into, out, 1, stride) if stride > 1 or into != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.narrow(x))
        y = self.widen(F.relu(self.look(y)))
        return F.relu(y + self.skip(x))


class Network(nn.Module):
    def __init__(
        self,
        stem: int = 64,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.first = Normed(3, stem, 7, 2)
        blocks, into = [], stem
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                blocks.append(Bottleneck(into, width, 2 if stage and not i else 1))
                into = 4 * width
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(2 * into, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.first(images)), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1))
