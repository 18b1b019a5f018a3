"""Images that are no square, in a model of one's own, out of transformers' ViT; the inputs by a method of the class."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import tiny_bodies
from tests.zoo.conftest import Zoo

transformers = pytest.importorskip("transformers")

MINE = """
import torch
from torch import nn


class Mine(nn.Module):
    def __init__(self, image=(16, 64), patch=8):
        super().__init__()
        self.image = image
        self.stem = nn.Conv2d(3, 24, patch, patch)
        self.cls = nn.Parameter(torch.zeros(1, 1, 24))
        self.pos = nn.Parameter(torch.zeros(1, 1 + (image[0] // patch) * (image[1] // patch), 24))
        layer = nn.TransformerEncoderLayer(24, 4, 40, 0, "gelu", 1e-12, batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(24, eps=1e-12), enable_nested_tensor=False)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return self.blocks(torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.pos)

    def example(self):
        return torch.randn(2, 3, *self.image)
"""


def test_an_equal_number_of_patches_in_another_grid(zoo: Zoo) -> None:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, image_size=32, patch_size=8
    )
    tiny_bodies.unsettled(transformers.ViTModel(config)).save_pretrained(zoo.cwd / "vit")
    Path(zoo.cwd, "mine.py").write_text(MINE)
    done = zoo("graft", "file:vit#encoder", "mine.py")
    assert done.status == 0, done.out + done.err
    assert "grid=(4, 4), to=(2, 8), prefix=1)" in done.out
    assert "adapted: the same function" in done.out
