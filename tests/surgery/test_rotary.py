"""Rotary positions in the spellings there are: half by half, in neighbours, as complex numbers; with shared heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import rules
from surgery.expr import evaluate
from tests import tiny_bodies

pytest.importorskip("transformers")


def angles(t: int, head_dim: int) -> Tensor:
    steps = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.outer(torch.arange(t, dtype=torch.float32), 1 / 10000**steps)[:, None]


def turned(x: Tensor, spelling: str) -> Tensor:
    a = angles(x.shape[1], x.shape[3])
    if spelling == "half":
        c, s = (f(a).repeat(1, 1, 2) for f in (torch.cos, torch.sin))
        one, two = x.chunk(2, dim=-1)
        return x * c + torch.cat([-two, one], dim=-1) * s
    if spelling == "neighbours":
        c, s = a.cos(), a.sin()
        one, two = x[..., ::2], x[..., 1::2]
        return torch.stack([one * c - two * s, one * s + two * c], dim=-1).flatten(-2)
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(a), a)).flatten(-2).type_as(x)


def normed(x: Tensor, gain: Tensor) -> Tensor:
    return gain * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Layer(nn.Module):
    def __init__(self, heads: Sequence[int], spelling: str, fused: bool, d: int = 24, inner: int = 40) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads
        self.spelling, self.fused = spelling, fused
        self.sizes = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        if fused:
            self.qkv = nn.Linear(d, sum(self.sizes), bias=False)
        else:
            self.q, self.k, self.v = (nn.Linear(d, n, bias=False) for n in self.sizes)
        self.out = nn.Linear(self.sizes[0], d, bias=False)
        self.one, self.two = nn.Parameter(torch.ones(d)), nn.Parameter(torch.ones(d))
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, inner), (d, inner), (inner, d)))

    def forward(self, x: Tensor) -> Tensor:
        y = normed(x, self.one)
        parts = self.qkv(y).split(self.sizes, dim=-1) if self.fused else (self.q(y), self.k(y), self.v(y))
        q, k, v = (p.unflatten(-1, (-1, self.head_dim)) for p in parts)
        q, k = turned(q, self.spelling), turned(k, self.spelling)
        times = self.heads // self.kv_heads
        k, v = (t.repeat_interleave(times, dim=2) for t in (k, v))
        y = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = normed(x, self.two)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Mine(nn.Module):
    def __init__(self, heads: Sequence[int], spelling: str, fused: bool = False) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, 24), nn.Parameter(torch.ones(24))
        self.layers = nn.ModuleList(Layer(heads, spelling, fused) for _ in range(2))
        self.head = nn.Linear(24, 50, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        for layer in self.layers:
            x = layer(x)
        got: Tensor = self.head(normed(x, self.norm))
        return got


def probe(model: nn.Module) -> surgery.Probe:
    def run(module: nn.Module, x: Any) -> Any:
        return module(**x, use_cache=False).logits

    return surgery.Probe(model, run, None, [{"input_ids": tiny_bodies.ids(i)} for i in range(3)])


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("spelling", ["half", "neighbours", "complex"])
def test_llama_with_shared_heads(spelling: str, fused: bool) -> None:
    model, _ = tiny_bodies.body("llama")
    mine = Mine((6, 2, 4), spelling, fused)
    report = surgery.graft(model.state_dict(), mine, probe=probe(model))
    assert report.verdict == "proven"
    name = "model.layers.1.self_attn.k_proj.weight"
    theirs = model.state_dict()[name].reshape(2, 2, 2, 24)  # heads, halves, pairs
    meant = theirs if spelling == "half" else theirs.transpose(1, 2)
    row = next(r for r in report.plan.rows if r.target == ("layers.1.qkv.weight" if fused else "layers.1.k.weight"))
    assert row.expr is not None
    made = evaluate(row.expr, model.state_dict().__getitem__)
    assert torch.equal(made[24:32] if fused else made, meant.reshape(8, 24))
    with torch.no_grad():
        ids = tiny_bodies.ids(7)
        assert torch.allclose(mine(ids), model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("spelling", ["half", "neighbours", "complex"])
def test_heads_that_come_to_be_shared(spelling: str) -> None:
    model, _ = tiny_bodies.body("llama_mha")
    asked = [rules.mha_to_gqa("heads", kv_heads=2)]
    report = surgery.graft(model.state_dict(), Mine((4, 2, 6), spelling), probe=probe(model), rules=asked)
    assert report.verdict == "adapted"
    row = next(r for r in report.plan.rows if r.target == "layers.0.k.weight")
    assert str(row.expr).count("mha_to_gqa(model.layers.0.self_attn.k_proj.weight, heads=4, groups=2, axis=0)") == 1


def test_pairs_that_turn_the_other_way_are_refuted() -> None:
    class Other(Mine):
        def forward(self, input_ids: Tensor) -> Tensor:
            return super().forward(input_ids.flip(1)).flip(1)

    model, _ = tiny_bodies.body("llama")
    with pytest.raises(surgery.GraftError, match="refuted"):
        surgery.graft(model.state_dict(), Other((6, 2, 4), "complex"), probe=probe(model))


def test_complex_numbers_that_are_used_as_such() -> None:
    """What a run does with a complex value beside turning it is recorded as it is."""
    from surgery import twin
    from surgery.mapper.record import record

    class Size(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            z = torch.view_as_complex(x.unflatten(-1, (-1, 2)))
            return (z * z).abs() + z.real

    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    tape = record(lambda m, y: m(y), twin.twin(Size()), x)
    (out,) = tape.outputs()
    held = tape.values[out].tensor
    assert held is not None
    assert torch.allclose(held, Size()(x).double(), atol=1e-6)
    assert tape.values[out].data
