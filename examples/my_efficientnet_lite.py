"""EfficientNet-Lite0 as one writes it for oneself: for a phone, with a head for ten digits that is still to be trained.

    zoo graft efficientnet.lite0-body examples/my_efficientnet_lite.py

The published weights were trained with TensorFlow, which pads by as much as the stride leaves over, more on the right
and below, and whose norms have an epsilon of 1e-3: both are part of the function.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# kernel, stride, how many times wider inside, channels, how many
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)


def padded(x: Tensor, kernel: int, stride: int) -> Tensor:
    """As TensorFlow's "SAME" pads."""
    sides: list[int] = []
    for n in (x.shape[-1], x.shape[-2]):
        missing = max((-(-n // stride) - 1) * stride + kernel - n, 0)
        sides += [missing // 2, missing - missing // 2]
    return F.pad(x, sides)


class Step(nn.Module):
    """A convolution without bias, and its norm."""

    def __init__(self, into: int, out: int, kernel: int, stride: int = 1, *, each: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, 1 if each else into, kernel, kernel))
        nn.init.kaiming_normal_(self.weight, mode="fan_out")
        self.norm = nn.BatchNorm2d(out, eps=1e-3)
        self.stride, self.groups = stride, into if each else 1

    def forward(self, x: Tensor) -> Tensor:
        x = padded(x, self.weight.shape[-1], self.stride)
        return self.norm(F.conv2d(x, self.weight, stride=self.stride, groups=self.groups))


class Bottleneck(nn.Module):
    def __init__(self, into: int, out: int, kernel: int, stride: int, wider: int) -> None:
        super().__init__()
        inside = into * wider
        self.widen = Step(into, inside, 1) if wider > 1 else None
        self.look = Step(inside, inside, kernel, stride, each=True)
        self.narrow = Step(inside, out, 1)
        self.skips = into == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.widen is None else F.relu6(self.widen(x))
        y = self.narrow(F.relu6(self.look(y)))
        return x + y if self.skips else y


class Digits(nn.Module):
    def __init__(self, stages: tuple[tuple[int, ...], ...] = STAGES, last: int = 1280, classes: int = 10) -> None:
        super().__init__()
        self.first = Step(3, 32, 3, 2)
        blocks, into = [], 32
        for kernel, stride, wider, out, many in stages:
            for i in range(many):
                blocks.append(Bottleneck(into, out, kernel, stride if i == 0 else 1, wider))
                into = out
        self.blocks = nn.ModuleList(blocks)
        self.last = Step(into, last, 1)
        self.classify = nn.Linear(last, classes)

    def features(self, x: Tensor) -> Tensor:
        x = F.relu6(self.first(x))
        for block in self.blocks:
            x = block(x)
        return F.relu6(self.last(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))
