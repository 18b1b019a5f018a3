"""Experts in place of MLPs, on the command line: GPT-2 into an own module, and Llama by a third party's plugin."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import surgery
from tests.surgery.test_experts import SIZES, llama
from tests.zoo.conftest import ON_DISK, Done, calling

transformers = pytest.importorskip("transformers")

Run = Callable[..., Done]

MINE = """
import torch
from torch import nn
from torch.nn import functional as F


class Experts(nn.Module):
    def __init__(self, width, count, chosen):
        super().__init__()
        self.choose = nn.Linear(width, count, bias=False)
        self.up = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(4 * width, width) for _ in range(count))
        self.chosen = chosen

    def forward(self, x):
        flat = x.flatten(0, 1)
        best, which = self.choose(flat).topk(self.chosen, dim=-1)
        share = best.softmax(-1)
        out = torch.zeros_like(flat)
        for n, (up, down) in enumerate(zip(self.up, self.down)):
            token, slot = torch.where(which == n)
            made = down(F.gelu(up(flat[token]), approximate="tanh"))
            out = out.index_add(0, token, made * share[token, slot, None])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, width, heads, count, chosen):
        super().__init__()
        self.heads = heads
        self.n1, self.n2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mix = Experts(width, count, chosen)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.n1(x)).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mix(self.n2(x))


class Sparse(nn.Module):
    def __init__(self, words=40, places=24, width=16, heads=4, depth=2, count=4, chosen=2):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(places, width)
        self.blocks = nn.ModuleList(Block(width, heads, count, chosen) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        x = self.words(ids) + self.places(torch.arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x)
        return self.norm(x)
"""


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)

    return calling(capsys)


def test_gpt2_into_own_experts(zoo: Run, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=4, n_positions=24, vocab_size=40, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "gpt2")
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "rules.txt").write_text('dense_to_moe("h.*.mlp", experts=4, top_k=2)\n')
    given = ("file:gpt2#decoder", "mine.py:Sparse")
    done = zoo("graft", *given, "--rules", "rules.txt", "--json")
    assert (done.status, done.json["verdict"]) == (0, "proven"), done.err
    plan = surgery.Plan.load(tmp_path / "mine.graft.toml")
    assert plan.rules == ('dense_to_moe("h.*.mlp", experts=4, top_k=2)',)
    assert str(plan["blocks.0.mix.choose.weight"].expr) == "normal(shape=(4, 16), std=0.02, seed=0)"
    done = zoo("verify", *given)
    assert done.status == 0, done.out + done.err
    again = ("--plan", "mine.graft.toml", "--to-file", "-o", "again.safetensors")
    done = zoo("graft", "file:gpt2#decoder", *again)  # no module is needed
    assert done.status == 0, done.err
    assert (tmp_path / "again.safetensors").read_bytes()[-999:] == (tmp_path / "mine.safetensors").read_bytes()[-999:]
    # as many as the module has not
    (tmp_path / "rules.txt").write_text('dense_to_moe("h.*.mlp", experts=3, top_k=2)\n')
    assert zoo("graft", *given, "--rules", "rules.txt", "-o", "three.safetensors").status == 1
    (tmp_path / "rules.txt").write_text('dense_to_moe("h.*.attn", experts=4)\n')
    done = zoo("graft", *given, "--rules", "rules.txt", "-o", "three.safetensors")
    assert done.status == 2
    assert "Name m" in done.err
    assert not (tmp_path / "three.safetensors").exists()


def test_llama_into_mixtral(zoo: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ON_DISK / "llama")
    model: transformers.PreTrainedModel = llama()  # type: ignore[assignment]
    model.save_pretrained(tmp_path / "llama")
    (tmp_path / "mine.py").write_text(
        "from transformers import MixtralConfig, MixtralForCausalLM\n\n\nclass Mine(MixtralForCausalLM):\n"
        "    def __init__(self):\n"
        f"        super().__init__(MixtralConfig(**{SIZES}, num_local_experts=4, num_experts_per_tok=2))\n"
        '        self.set_experts_implementation("eager")\n'
    )
    (tmp_path / "rules.txt").write_text('dense_to_moe("model.layers.*.mlp", experts=4, top_k=2)\n')
    done = zoo("graft", "file:llama", "mine.py:Mine", "--rules", "rules.txt", "--json")
    assert (done.status, done.json["verdict"]) == (0, "proven"), done.err
    assert (tmp_path / "mine.safetensors").is_file()
    done = zoo("verify", "file:llama", "mine.py:Mine")
    assert done.status == 0, done.out + done.err
