"""Images and texts in one space, as one writes it for oneself: two towers of one kind of block, and a temperature.

    zoo graft clip examples/my_clip.py

fills both towers and the temperature. The adapter on top of the image is new and still to be trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.before = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.between = nn.LayerNorm(width)
        self.wide = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.merge(y.transpose(1, 2).flatten(2))
        y = self.wide(self.between(x))
        return x + self.narrow(y * torch.sigmoid(1.702 * y))


class Eye(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
        self.first = nn.Parameter(torch.randn(width) * width**-0.5)
        self.places = nn.Parameter(torch.randn((size // patch) ** 2 + 1, width) * width**-0.5)
        self.start = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, heads, causal=False) for _ in range(layers))
        self.end = nn.LayerNorm(width)
        self.out = nn.Linear(width, out, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), 1, -1), x], dim=1) + self.places
        x = self.start(x)
        for block in self.blocks:
            x = block(x)
        return self.out(self.end(x[:, 0]))


class Reader(nn.Module):
    def __init__(self, vocab: int, length: int, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocab, width)
        self.places = nn.Parameter(torch.randn(length, width) * 0.01)
        self.blocks = nn.ModuleList(Block(width, heads, causal=True) for _ in range(layers))
        self.end = nn.LayerNorm(width)
        self.out = nn.Linear(width, out, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids) + self.places[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        # The end of a text is the largest id there is.
        return self.out(self.end(x[torch.arange(len(ids)), ids.argmax(1)]))


class Matcher(nn.Module):
    def __init__(
        self,
        size: int = 224,
        patch: int = 32,
        image_width: int = 768,
        image_layers: int = 12,
        image_heads: int = 12,
        vocab: int = 49408,
        length: int = 77,
        text_width: int = 512,
        text_layers: int = 12,
        text_heads: int = 8,
        out: int = 512,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.eye = Eye(size, patch, image_width, image_layers, image_heads, out)
        self.reader = Reader(vocab, length, text_width, text_layers, text_heads, out)
        self.warmth = nn.Parameter(torch.tensor(2.6592))
        self.classify = nn.Linear(out, classes)  # new: a classifier of images, for which the texts are not needed

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """How well each image fits each text, and classes of the images."""
        seen = self.eye(image)
        fit = F.normalize(seen, dim=-1) @ F.normalize(self.reader(ids), dim=-1).T
        return fit * self.warmth.exp(), self.classify(seen)
