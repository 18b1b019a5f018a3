"""A tagger: RoBERTa's encoder in torch's own layers, and a head that gives each token a label.

zoo graft roberta-encoder examples/my_roberta.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

PADDING = 1  # RoBERTa's positions start behind its padding token's


class Tagger(nn.Module):
    """One label for each token."""

    def __init__(
        self, words: int = 50265, longest: int = 512, width: int = 768, heads: int = 12, depth: int = 12, tags: int = 9
    ) -> None:
        super().__init__()
        self.word = nn.Embedding(words, width, padding_idx=PADDING)
        self.place = nn.Embedding(longest + 2, width)
        self.kind = nn.Parameter(torch.zeros(1, width))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.tags = nn.Linear(width, tags)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        real = (ids != PADDING).long()
        x = self.word(ids) + self.place(real.cumsum(1) * real + PADDING) + self.kind
        return self.tags(self.encoder(self.norm(x), src_key_padding_mask=mask == 0))
