"""Models of one's own that normalise the class's token alone after their last block: proven on that, and said so."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
import zoo
from tests.tiny_vision import ROWS, save, shaken
from zoo import cli

timm = pytest.importorskip("timm")

MINE = """
import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.mix = nn.MultiheadAttention(width, heads, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        x = x + self.mix(y, y, y, need_weights=False)[0]
        return x + self.down(F.gelu(self.up(self.second(x))))


class Pictures(nn.Module):
    def __init__(self, pooled: str = "class", before: int = 1, eps: float = 1e-6) -> None:
        super().__init__()
        self.pooled = pooled
        self.cut = nn.Conv2d(3, 16, 8, 8)
        self.extra = nn.Parameter(torch.zeros(1, before, 16))
        self.places = nn.Parameter(torch.zeros(1, before + 16, 16))
        self.blocks = nn.Sequential(Block(16, 4), Block(16, 4))
        self.last = nn.LayerNorm(16, eps=eps)
        self.answer = nn.Linear(16, 3)

    def forward(self, image: Tensor) -> Tensor:
        x = self.cut(image).flatten(2).transpose(1, 2)
        x = self.blocks(torch.cat([self.extra.expand(len(x), -1, -1), x], 1) + self.places)
        if self.pooled == "class":
            return self.answer(self.last(x[:, 0]))
        if self.pooled == "both":
            picture, teacher = self.last(x[:, :2]).unbind(1)
            return self.answer(picture) + self.answer(teacher)
        if self.pooled == "other":
            return self.answer(self.last(x[:, 1]))
        if self.pooled == "mean":
            return self.answer(self.last(x.mean(1)))
        return self.answer(self.last(x)[:, 0])
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for row in ROWS:
        if row.entry in ("vit", "deit"):
            save(row, folder / row.entry)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line on MINE, in this process and an empty folder."""
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(MINE)

    def call(command: str, ref: str, *arguments: str, **sets: object) -> tuple[int, dict[str, Any]]:
        words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
        status = cli.main([command, ref, "mine.py:Pictures", *words, *arguments, "--json"])
        return status, json.loads(capsys.readouterr().out)

    return call


def test_proven_on_the_class_token(saved: Path, run: Any) -> None:
    ref = f"file:{saved / 'vit'}#encoder"
    status, done = run("graft", ref, "-o", "out.safetensors", pooled="class")
    assert (status, done["verdict"]) == (0, "proven")
    assert done["proof"]["passes"][0]["residuals"].keys() == {"class_token"}
    assert "answered for class_token only: the target does not show last_hidden_state" in done["notes"]
    # Rows that stand for other tokens reach the class's through attention.
    assert done["proof"]["not_exercised"] == []
    assert done["counts"]["new"] == 2
    status, done = run("verify", ref, "--weights", "out.safetensors", pooled="class")
    assert (status, done["verdict"]) == (0, "proven")
    assert done["proof"]["passes"][0]["residuals"].keys() == {"class_token"}


def test_what_was_proven_on_all_tokens_is_not_verified_on_fewer(saved: Path, run: Any) -> None:
    ref = f"file:{saved / 'vit'}#encoder"
    status, done = run("graft", ref, "-o", "out.safetensors", pooled="all")
    assert (status, done["verdict"]) == (0, "proven")
    assert done["proof"]["passes"][0]["residuals"].keys() == {"last_hidden_state"}
    assert not any("answered for" in note for note in done["notes"])
    status, done = run("verify", ref, "--weights", "out.safetensors", pooled="class")
    assert (status, done["verdict"]) == (1, "refuted")


@pytest.mark.parametrize("sets", [{"pooled": "other"}, {"pooled": "mean"}, {"pooled": "class", "eps": 1e-5}], ids=str)
def test_another_token_is_refuted(saved: Path, run: Any, sets: dict[str, object]) -> None:
    status, done = run("graft", f"file:{saved / 'vit'}#encoder", "-o", "out.safetensors", **sets)
    assert (status, done["verdict"], done["wrote"]) == (1, "refuted", [])


def test_two_tokens(saved: Path, run: Any) -> None:
    """DeiT's teacher has a token as well; who uses both is proven on both."""
    ref = f"file:{saved / 'deit'}#encoder"
    status, done = run("graft", ref, "-o", "out.safetensors", pooled="both", before=2)
    assert (status, done["verdict"]) == (0, "proven")
    assert done["proof"]["passes"][0]["residuals"].keys() == {"class_token", "distillation_token"}
    status, done = run("graft", ref, "-o", "one.safetensors", pooled="class", before=2)
    assert (status, done["verdict"]) == (0, "proven")
    assert done["proof"]["passes"][0]["residuals"].keys() == {"class_token"}


@pytest.mark.parametrize(
    ("name", "kind", "tokens"),
    [
        ("vit", "ViT", {1}),
        ("deit", "DeiT", {1, 2}),
        ("dinov2", "Dinov2", {1}),
        ("swin", "Swin", set()),
    ],
)
def test_which_tokens_a_library_has(name: str, kind: str, tokens: set[int], tmp_path: Path) -> None:
    """The library's own model says where they stand."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
    if kind != "Swin":
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8}
    model = shaken(
        getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(image_size=32, **sizes))
    )
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint, entry = surgery.open(tmp_path / "model.safetensors"), zoo.find(name)
    view = checkpoint.view(entry.tensors_of(entry.part("encoder"), checkpoint))
    probe = import_module(f"zoo_vision.{name}").encoder_probe(view, config)
    assert {len(less.outputs) for less in probe.narrower} == tokens
    x = probe.inputs(2, "plain")
    with torch.no_grad():
        answer = model(**x).last_hidden_state
        for less in probe.narrower:
            assert less.reference is probe.reference
            for at, value in enumerate(less.run(less.reference, x)):
                torch.testing.assert_close(value, answer[:, at], rtol=1e-4, atol=1e-5)
