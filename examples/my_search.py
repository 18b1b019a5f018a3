"""Search for images by sentences, with towers of two different origins and new maps from both into one space.

    zoo graft minilm-encoder examples/my_search.py --into text -o half.safetensors
    zoo graft clip-vision examples/my_search.py --into image --init half.safetensors -o search.safetensors

fills one tower after the other. The two maps and the sharpness are still to be trained.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.look = nn.Linear(width, 2 * width)  # queries and keys
        self.take = nn.Linear(width, width)
        self.give = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k = self.look(x).chunk(2, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (q, k, self.take(x)))
        seen = None if mask is None else mask[:, None, None, :].bool()
        return self.give(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))


class TextLayer(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.attention, self.norm1 = Attention(width, heads), nn.LayerNorm(width, eps=1e-12)
        self.up, self.down, self.norm2 = (
            nn.Linear(width, inner),
            nn.Linear(inner, width),
            nn.LayerNorm(width, eps=1e-12),
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.attention(x, mask))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Sentence(nn.Module):
    def __init__(self, vocab: int, positions: int, width: int, layers: int, heads: int, inner: int) -> None:
        super().__init__()
        self.words, self.places, self.kind = (nn.Embedding(n, width) for n in (vocab, positions, 2))
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.layers = nn.ModuleList(TextLayer(width, heads, inner) for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """One vector per token."""
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.norm(self.words(ids) + self.places(places) + self.kind(torch.zeros_like(ids)))
        for layer in self.layers:
            x = layer(x, mask)
        return x


class ImageLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y = self.up(self.norm2(x))
        return x + self.down(y * torch.sigmoid(1.702 * y))


class Picture(nn.Module):
    def __init__(self, size: int, patch: int, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch, bias=False)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, (size // patch) ** 2 + 1, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.layers = nn.Sequential(*(ImageLayer(width, heads) for _ in range(layers)))
        self.out = nn.Linear(width, out, bias=False)

    def forward(self, image: Tensor) -> Tensor:
        """One vector per image."""
        x = self.patches(image).flatten(2).mT
        x = self.norm1(torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.places)
        return self.out(self.norm2(self.layers(x)[:, 0]))


class Search(nn.Module):
    def __init__(
        self,
        vocab: int = 30522,
        positions: int = 512,
        text_width: int = 384,
        text_layers: int = 6,
        text_heads: int = 12,
        text_inner: int = 1536,
        size: int = 224,
        patch: int = 32,
        image_width: int = 768,
        image_layers: int = 12,
        image_heads: int = 12,
        image_out: int = 512,
        shared: int = 256,
    ) -> None:
        super().__init__()
        self.text = Sentence(vocab, positions, text_width, text_layers, text_heads, text_inner)
        self.image = Picture(size, patch, image_width, image_layers, image_heads, image_out)
        self.from_text, self.from_image = nn.Linear(text_width, shared), nn.Linear(image_out, shared)
        self.sharpness = nn.Parameter(torch.tensor(2.0))

    def forward(self, image: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """How well each image fits each sentence."""
        weight = mask[:, :, None].to(self.sharpness.dtype)
        sentence = (self.text(ids, mask) * weight).sum(1) / weight.sum(1)
        sentence = F.normalize(self.from_text(sentence), dim=-1)
        return F.normalize(self.from_image(self.image(image)), dim=-1) @ sentence.T * self.sharpness.exp()
