"""Images and texts that are matched pair by pair, as one writes it for oneself: attention in einsums, keys and values
in one projection, and a query that is learned where the image is pooled.

    zoo graft siglip examples/my_siglip.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attend(nn.Module):
    """Queries look at a memory."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.memory = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.heads, -1))
        k, v = (part.unflatten(-1, (self.heads, -1)) for part in self.memory(memory).chunk(2, dim=-1))
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k) / q.shape[-1] ** 0.5
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights.softmax(-1), v).flatten(2))


class Feed(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(width, eps=1e-6), Attend(width, heads)
        self.norm2, self.feed = nn.LayerNorm(width, eps=1e-6), Feed(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attend(y, y)
        return x + self.feed(self.norm2(x))


class Pairs(nn.Module):
    def __init__(
        self,
        size: int = 224,
        patch: int = 16,
        vocab: int = 32000,
        length: int = 64,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        inner: int = 3072,
        topics: int = 20,
    ) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, patch, patch)
        self.patch_places = nn.Embedding((size // patch) ** 2, width)
        self.image = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.image_norm = nn.LayerNorm(width, eps=1e-6)
        self.asked = nn.Parameter(torch.randn(1, 1, width))
        self.pool, self.pool_norm, self.pool_feed = (
            Attend(width, heads),
            nn.LayerNorm(width, eps=1e-6),
            Feed(width, inner),
        )
        self.word, self.word_places = nn.Embedding(vocab, width), nn.Embedding(length, width)
        self.text = nn.ModuleList(Layer(width, heads, inner) for _ in range(layers))
        self.text_norm, self.text_out = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, width)
        self.scale, self.shift = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
        self.topic = nn.Linear(width, topics)  # new: still to be trained

    def see(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).mT + self.patch_places.weight
        for layer in self.image:
            x = layer(x)
        x = self.pool(self.asked.expand(len(x), -1, -1), self.image_norm(x))
        return (x + self.pool_feed(self.pool_norm(x)))[:, 0]

    def read(self, ids: Tensor) -> Tensor:
        x = self.word(ids) + self.word_places.weight[: ids.shape[1]]
        for layer in self.text:
            x = layer(x)
        return self.text_out(self.text_norm(x)[:, -1])

    def forward(self, image: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """For each image and text whether they belong together, as logits; and topics of the images."""
        seen, read = self.see(image), self.read(ids)
        fit = F.normalize(seen, dim=-1) @ F.normalize(read, dim=-1).mT
        return fit * self.scale.exp() + self.shift, self.topic(seen)
