"""Fewer heads and shared heads for classes that cannot have them: what is proven against, and grafts that it proves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import rules, twin
from surgery.body import outputs
from surgery.coupling import coupled
from surgery.proof import GATE
from surgery.stand_in import StandIn
from surgery.surface import relative
from surgery.widths import _masked
from tests import tiny_bodies

pytest.importorskip("transformers")


class Heads(nn.Module):
    """Self-attention with so many query and so many key and value heads."""

    def __init__(self, d: int, heads: int, kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.q, self.kv = nn.Linear(d, heads * head_dim), nn.Linear(d, 2 * kv_heads * head_dim)
        self.out = nn.Linear(heads * head_dim, d)

    def forward(self, x: Tensor, causal: bool) -> Tensor:
        b, t, _ = x.shape
        q = self.q(x).view(b, t, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).view(b, t, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        k, v = (h.repeat_interleave(self.heads // self.kv_heads, dim=1) for h in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, d: int, inner: int, heads: Heads, post: bool) -> None:
        super().__init__()
        self.post, eps = post, 1e-12 if post else 1e-5
        self.heads, self.one, self.two = heads, nn.LayerNorm(d, eps=eps), nn.LayerNorm(d, eps=eps)
        self.up, self.down = nn.Linear(d, inner), nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        if self.post:
            x = self.one(x + self.heads(x, False))
            return self.two(x + self.down(F.gelu(self.up(x))))
        x = x + self.heads(self.one(x), True)
        return x + self.down(F.gelu(self.up(self.two(x)), approximate="tanh"))


class Mine(nn.Module):
    """BERT (post) or GPT-2, written by hand."""

    def __init__(self, heads: int, kv_heads: int, *, post: bool, d: int = 24) -> None:
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(50, d), nn.Embedding(16, d), nn.LayerNorm(d, eps=1e-12)
        self.types, self.end = (nn.Embedding(2, d), nn.Identity()) if post else (None, nn.LayerNorm(d))
        self.norm = nn.LayerNorm(d, eps=1e-12) if post else nn.Identity()
        inner = 40 if post else 96
        self.blocks = nn.ModuleList(Block(d, inner, Heads(d, heads, kv_heads, 6), post) for _ in range(2))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        x = self.norm(x if self.types is None else x + self.types(torch.zeros_like(input_ids)))
        for block in self.blocks:
            x = block(x)
        got: Tensor = self.end(x)
        return got


class Derived(nn.Module):
    """One attention whose number of heads is fixed and whose head width follows from its input."""

    def __init__(self, d: int = 24) -> None:
        super().__init__()
        self.words, self.norm = nn.Embedding(50, d), nn.LayerNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        b, t, c = x.shape
        q, k, v = (f(x).reshape(b, t, 4, c // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        got: Tensor = self.norm(x + self.o(y))
        return got


def derived() -> tiny_bodies.Body:
    return Derived(), {"input_ids": tiny_bodies.ids()}


def body(name: str) -> tiny_bodies.Body:
    torch.manual_seed(0)
    return (tiny_bodies.unsettled(derived()[0]), derived()[1]) if name == "derived" else tiny_bodies.body(name)


def ran(stand_in: StandIn, example: Any) -> Tensor:
    """In float64, as the proof runs it."""
    got = twin.run(stand_in.run, twin.twin(stand_in.module), example)
    return twin.lift(got[0] if isinstance(got, tuple) else got)


@pytest.mark.parametrize("name", ["encoder", "swin", "derived"])
def test_a_run_without_heads_is_that_with_heads_at_zero(name: str) -> None:
    model, example = body(name)
    result = surgery.prune_heads(model, example, "heads", heads=[1])
    assert result.module is None
    assert result.stand_in is not None
    held = result.stand_in.module.state_dict()
    assert {n: tuple(t.shape) for n, t in held.items()} == {row.target: row.shape for row in result.plan.rows}
    coupling = coupled(model, example)
    kept = {group.space: np.delete(np.arange(group.size), 1) for group in coupling.find("heads")}
    zeroed = _masked(coupling, kept)
    meant = outputs(coupling, model, zeroed)[0]
    assert relative(meant, ran(result.stand_in, example)) <= 1e-7  # what storing in float32 costs is nothing here
    assert relative(meant, outputs(coupling, model)[0]) > 1e-2
    # on another input, and as the class itself in the type that it has
    other = {"input_ids": tiny_bodies.ids(3)[:, :5]} if isinstance(example, dict) else example.flip(0)[:1] * 0.5
    exact = ran(result.stand_in, other)
    with torch.no_grad():
        plain = result.stand_in.run(result.stand_in.module, other)
    assert relative(exact, plain.double()) < 1e-5
    assert all(torch.equal(t, held[n]) for n, t in result.stand_in.module.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "neox", "vit", "swin", "derived"])
def test_shared_heads_are_those_that_hold_their_mean(name: str) -> None:
    model, example = body(name)
    result = surgery.mha_to_gqa(model, example, "heads", kv_heads=2)
    assert result.module is None
    assert result.stand_in is not None
    held, called = result.stand_in.module.state_dict(), result.stand_in.names
    for row in result.plan.rows:
        assert tuple(held[called.get(row.target, row.target)].shape) == row.shape
    coupling = coupled(model, example)
    moved = relative(outputs(coupling, model)[0], ran(result.stand_in, example))
    assert result.drift is not None
    assert moved == pytest.approx(result.drift, rel=1e-3) or moved < result.drift


def hidden(model: nn.Module, x: Any) -> Tensor:
    got: Tensor = getattr(model, "transformer", model)(**x).last_hidden_state
    return got


def logits_free(model: nn.Module, x: Any) -> Tensor:
    got: Tensor = model(**x)
    return got


def probe(model: nn.Module, run: Callable[[nn.Module, Any], Any]) -> surgery.Probe:
    return surgery.Probe(model, run, None, [{"input_ids": tiny_bodies.ids(i)} for i in range(3)])


GQA, PRUNED = rules.mha_to_gqa("heads", kv_heads=2), rules.prune_heads("heads", heads=[1])
GRAFTS = [
    ("bert", (4, 2), [GQA]),
    ("bert", (4, 1), [rules.mha_to_gqa("heads", kv_heads=1)]),
    ("bert", (3, 3), [PRUNED]),
    ("gpt2", (4, 2), [GQA]),
    ("gpt2", (3, 3), [PRUNED]),
    ("gpt2", (2, 1), [rules.prune_heads("heads", heads=[0, 3]), rules.mha_to_gqa("heads", kv_heads=1)]),
    ("gpt2", (2, 1), [GQA, PRUNED]),
]


@pytest.mark.parametrize(("name", "heads", "asked"), GRAFTS)
def test_a_graft_by_rule_into_a_model_of_ones_own(
    name: str, heads: tuple[int, int], asked: Sequence[rules.Rule]
) -> None:
    reference, _ = body(name)
    mine = Mine(*heads, post=name == "bert")
    given = probe(reference, hidden)
    report = surgery.graft(reference.state_dict(), mine, probe=given, rules=asked)
    assert report.verdict == "adapted"
    assert report.proof is not None
    assert max(report.proof.passes[0].residuals.values()) <= GATE
    assert any("before any training its outputs move by" in note for note in report.plan.notes)
    # what is not the rule's is exact; and the plan, applied again, is what was proven
    assert all("mha_to_gqa" not in str(row.expr) for row in report.plan.rows if row.target.endswith("q.weight"))
    again = surgery.verify(reference.state_dict(), mine, report.plan, probe=given)
    assert again.verdict == "adapted"


def test_a_head_chosen_otherwise_is_refused() -> None:
    """The plan of one choice is no plan of another."""
    reference, _ = body("derived")
    given = probe(reference, logits_free)
    other = surgery.prune_heads(reference, given, "heads", heads=[2])
    result = surgery.prune_heads(reference, given, "heads", heads=[1])
    assert result.stand_in is not None
    assert other.stand_in is not None
    assert (
        relative(
            ran(result.stand_in, {"input_ids": tiny_bodies.ids()}),
            ran(other.stand_in, {"input_ids": tiny_bodies.ids()}),
        )
        > 1e-2
    )
    mine = Mine(4, 2, post=True)
    with pytest.raises(surgery.GraftError, match="refuted"):
        surgery.graft(body("bert")[0].state_dict(), mine, probe=probe(body("bert")[0], hidden))


class Normed(Derived):
    """Heads that a norm reads together: without one of them it is another norm."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.LayerNorm(24)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.words(input_ids)
        b, t, c = x.shape
        q, k, v = (f(x).reshape(b, t, 4, c // 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        got: Tensor = self.norm(x + self.o(self.inner(y)))
        return got


def test_heads_that_a_norm_reads_together_have_nothing_that_stands_in() -> None:
    torch.manual_seed(0)
    model = tiny_bodies.unsettled(Normed())
    result = surgery.prune_heads(model, {"input_ids": tiny_bodies.ids()}, "heads", heads=[1])
    assert (result.module, result.stand_in) == (None, None)
    with pytest.raises(surgery.SurgeryError, match="no copy of the model runs"):
        surgery.plan(model.state_dict(), Mine(3, 3, post=True), probe=probe(model, logits_free), rules=[PRUNED])
