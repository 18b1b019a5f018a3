"""A sentence classifier as one writes it for oneself: an encoder, mean pooling, a head that is still to be trained.

    zoo graft minilm-encoder examples/my_encoder.py

fills the encoder with pretrained weights. Nothing here was written with those weights in mind, except for the sizes.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, hidden: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.proj = nn.Linear(hidden, hidden)
        self.dropout = dropout

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        # Padding is hidden as a key, for every query: what stands at a padded position is nobody's business.
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask[:, None, None, :].bool(), dropout_p=self.dropout if self.training else 0.0
        )
        return self.proj(y.transpose(1, 2).reshape(batch, length, hidden))


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int, ffn: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.mix = Attention(hidden, heads, dropout)
        self.norm1 = nn.LayerNorm(hidden, eps=eps)
        self.ffn = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(), nn.Linear(ffn, hidden))
        self.norm2 = nn.LayerNorm(hidden, eps=eps)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.mix(x, mask)))
        return self.norm2(x + self.drop(self.ffn(x)))


class SentenceClassifier(nn.Module):
    def __init__(
        self,
        vocab: int = 30522,
        hidden: int = 384,
        layers: int = 6,
        heads: int = 12,
        ffn: int = 1536,
        positions: int = 512,
        types: int = 2,
        eps: float = 1e-12,
        dropout: float = 0.1,
        classes: int = 3,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, hidden)
        self.places = nn.Embedding(positions, hidden)
        self.types = nn.Embedding(types, hidden)
        self.norm = nn.LayerNorm(hidden, eps=eps)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(hidden, heads, ffn, eps, dropout) for _ in range(layers))
        self.head = nn.Linear(hidden, classes)

    def encode(self, ids: Tensor, mask: Tensor) -> Tensor:
        """One vector per token."""
        places = torch.arange(ids.shape[1], device=ids.device)
        # One sentence at a time, so every token is of the first type.
        x = self.tokens(ids) + self.places(places) + self.types(torch.zeros_like(ids))
        x = self.drop(self.norm(x))
        for block in self.blocks:
            x = block(x, mask)
        return x

    def pool(self, x: Tensor, mask: Tensor) -> Tensor:
        weight = mask[:, :, None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1)

    def embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """One vector of length 1 per sentence; their dot product is the cosine similarity."""
        return F.normalize(self.pool(self.encode(ids, mask), mask), dim=-1)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.head(self.pool(self.encode(ids, mask), mask))


def example() -> tuple[Tensor, Tensor]:
    """Inputs for forward: two sentences, the second one padded."""
    ids = torch.randint(0, 30522, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return ids, mask
