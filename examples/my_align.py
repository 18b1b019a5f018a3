"""A convnet for images and an encoder for texts in one space, as one writes it for oneself: an EfficientNet in
functional calls, a text encoder out of torch's own layers, and a temperature that divides.

    zoo graft align examples/my_align.py
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# The stages of EfficientNet: kernel, stride, expansion, channels in, channels out, repeats.
STAGES = (
    (3, 1, 1, 32, 16, 1),
    (3, 2, 6, 16, 24, 2),
    (5, 2, 6, 24, 40, 2),
    (3, 2, 6, 40, 80, 3),
    (5, 1, 6, 80, 112, 3),
    (5, 2, 6, 112, 192, 4),
    (3, 1, 6, 192, 320, 1),
)


def by_eights(channels: float) -> int:
    near = max(8, int(channels + 4) // 8 * 8)
    return near if near >= 0.9 * channels else near + 8


class Conv(nn.Module):
    """Convolution and batch norm. Strided ones pad on the right and at the bottom, as TensorFlow did."""

    def __init__(self, inside: int, outside: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, kernel, stride, bias=False, groups=groups)
        self.norm = nn.BatchNorm2d(outside, eps=1e-3)
        low, high = (kernel // 2 - (stride == 2), kernel // 2)
        self.pads = (low, high, low, high)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(F.pad(x, self.pads)))


class Inverted(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, stride: int, expand: int, skip: bool) -> None:
        super().__init__()
        wide, narrow = inside * expand, max(1, inside // 4)
        self.widen = Conv(inside, wide) if expand > 1 else None
        self.look = Conv(wide, wide, kernel, stride, groups=wide)
        self.squeeze, self.excite = nn.Linear(wide, narrow), nn.Linear(narrow, wide)
        self.narrow = Conv(wide, outside)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.widen is None else F.silu(self.widen(x))
        y = F.silu(self.look(y))
        gate = self.excite(F.silu(self.squeeze(y.mean((2, 3))))).sigmoid()
        y = self.narrow(y * gate[:, :, None, None])
        return x + y if self.skip else y


class Encoder(nn.Module):
    """One layer, normalised after each sum."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        scores = scores.masked_fill(mask[:, None, None, :] == 0, torch.finfo(x.dtype).min)
        x = self.norm1(x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Aligned(nn.Module):
    def __init__(
        self,
        stages: tuple[tuple[int, int, int, int, int, int], ...] = STAGES,
        wider: float = 2.0,
        deeper: float = 3.1,
        vocab: int = 30522,
        positions: int = 512,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        inner: int = 3072,
        labels: int = 5,
    ) -> None:
        super().__init__()
        self.stem = Conv(3, by_eights(32 * wider), 3, 2)
        blocks = []
        for kernel, stride, expand, inside, outside, repeats in stages:
            inside, outside = by_eights(inside * wider), by_eights(outside * wider)
            for i in range(math.ceil(repeats * deeper)):
                first = i == 0
                blocks.append(
                    Inverted(inside if first else outside, outside, kernel, stride if first else 1, expand, not first)
                )
        self.blocks = nn.ModuleList(blocks)
        self.words, self.places, self.kind = (
            nn.Embedding(vocab, width),
            nn.Embedding(positions, width),
            nn.Embedding(2, width),
        )
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(Encoder(width, heads, inner) for _ in range(layers))
        self.shared = nn.Linear(width, outside)
        self.temperature = nn.Parameter(torch.ones(()))
        self.label = nn.Linear(outside, labels)  # new: still to be trained

    def see(self, image: Tensor) -> Tensor:
        x = F.silu(self.stem(image))
        for block in self.blocks:
            x = block(x)
        return x.mean((2, 3))

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.places(places) + self.kind(torch.zeros_like(ids)))
        for layer in self.layers:
            x = layer(x, mask)
        return self.shared(x[:, 0])

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """How well each image fits each text, and labels of the images."""
        seen = self.see(image)
        fit = F.normalize(seen, dim=-1) @ F.normalize(self.read(ids, mask), dim=-1).mT
        return fit / self.temperature, self.label(seen)
