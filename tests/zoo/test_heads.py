"""Fewer and shared heads by --rules, with real models whose classes have no such heads: graft, verify, apply again."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests import tiny_bodies
from tests.zoo.conftest import Zoo

pytest.importorskip("transformers")

MINE = """
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, heads, kv_heads):
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q, self.k, self.v = nn.Linear(24, 6 * heads), nn.Linear(24, 6 * kv_heads), nn.Linear(24, 6 * kv_heads)
        self.out = nn.Linear(6 * heads, 24)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (h.repeat_interleave(self.heads // self.kv_heads, dim=1) for h in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, *heads):
        super().__init__()
        self.attention, self.up, self.down = Attention(*heads), nn.Linear(24, 96), nn.Linear(96, 24)
        self.one, self.two = nn.LayerNorm(24), nn.LayerNorm(24)

    def forward(self, x):
        x = x + self.attention(self.one(x))
        return x + self.down(F.gelu(self.up(self.two(x)), approximate="tanh"))


class Mine(nn.Module):
    def __init__(self, heads=4, kv_heads=2):
        super().__init__()
        self.words, self.places = nn.Embedding(50, 24), nn.Embedding(16, 24)
        self.blocks, self.norm = nn.ModuleList(Block(heads, kv_heads) for _ in range(2)), nn.LayerNorm(24)

    def forward(self, input_ids):
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Pruned(Mine):
    def __init__(self):
        super().__init__(3, 3)
"""


@pytest.mark.parametrize(
    ("of", "rule"),
    [("Mine", 'mha_to_gqa("heads", kv_heads=2)'), ("Pruned", 'prune_heads("h.*.attn", heads=[1])')],
)
def test_gpt2_with_other_heads(zoo: Zoo, of: str, rule: str) -> None:
    model, _ = tiny_bodies.body("gpt2")
    model.save_pretrained(zoo.cwd / "tiny")
    (zoo.cwd / "mine.py").write_text(MINE)
    (zoo.cwd / "rules.txt").write_text(rule + "\n")
    at = Path(zoo.cwd)
    done = zoo("graft", "file:tiny#decoder", f"mine.py:{of}", "--rules", "rules.txt")
    assert done.status == 0, done.out + done.err
    assert "adapted: the same function" in done.out
    assert "before any training its outputs move by" in done.out
    lines = [line for line in done.out.splitlines() if f"{rule.partition('(')[0]}(slice(transformer.h" in line]
    assert len(lines) == (4 if of == "Mine" else 6)  # q, k and v each by itself out of the fused projection
    if of == "Pruned":
        without = zoo("graft", "file:tiny#decoder", f"mine.py:{of}", "-o", "not.safetensors")
        assert without.status == 1
        assert not (at / "not.safetensors").exists()
        return
    verified = zoo("verify", "file:tiny#decoder", f"mine.py:{of}")
    assert verified.status == 0, verified.out + verified.err
    applied = zoo("graft", "file:tiny#decoder", f"mine.py:{of}", "--plan", "mine.graft.toml", "-o", "again.safetensors")
    assert applied.status == 0, applied.out + applied.err
    first, again = load_file(at / "mine.safetensors"), load_file(at / "again.safetensors")
    assert first.keys() == again.keys()
    assert all(bool((first[name] == again[name]).all()) for name in first)
