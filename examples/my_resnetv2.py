"""A residual network that normalises before it convolves, as one writes it for oneself, with a fresh head.

zoo graft resnetv2-body examples/my_resnetv2.py
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Filtered(nn.Module):
    """A norm, and behind it a convolution."""

    def __init__(self, into: int, out: int, size: int, stride: int = 1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(into)
        self.filters = nn.Conv2d(into, out, size, stride, size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.filters(F.relu(self.norm(x)))


class Bottleneck(nn.Module):
    """The skip takes what the first norm gives where sizes change, and else the input itself."""

    def __init__(self, into: int, width: int, stride: int) -> None:
        super().__init__()
        out = 4 * width
        self.norm = nn.BatchNorm2d(into)
        self.narrow = nn.Conv2d(into, width, 1, bias=False)
        self.look = Filtered(width, width, 3, stride)
        self.widen = Filtered(width, out, 1)
        self.skip = nn.Conv2d(into, out, 1, stride, bias=False) if stride > 1 or into != out else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(x))
        x = x if self.skip is None else self.skip(y)
        return x + self.widen(self.look(self.narrow(y)))


class Network(nn.Module):
    def __init__(
        self,
        stem: int = 64,
        widths: tuple[int, ...] = (64, 128, 256, 512),
        depths: tuple[int, ...] = (3, 4, 6, 3),
        classes: int = 5,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, stem, 7, 2, 3, bias=False)
        blocks, into = [], stem
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for i in range(depth):
                blocks.append(Bottleneck(into, width, 2 if stage and not i else 1))
                into = 4 * width
        self.blocks = nn.ModuleList(blocks)
        self.last = nn.BatchNorm2d(into)
        self.head = nn.Linear(into, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = F.max_pool2d(self.first(images), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(F.relu(self.last(x)).mean((2, 3)))
