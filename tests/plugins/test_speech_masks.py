"""Speech models grafted into modules of one's own that take a mask of the samples, and heads for classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
import zoo
from tests import tiny_speech
from tests.tiny_speech import CLASSES, LARGE, SPEECH

pytest.importorskip("transformers")

KERNELS, STRIDES = SPEECH["conv_kernel"], SPEECH["conv_stride"]


class Block(nn.Module):
    """Attention and a perceptron, with the norms first or behind the sums."""

    def __init__(self, width: int, heads: int, inner: int, first: bool) -> None:
        super().__init__()
        self.heads, self.first = heads, first
        self.qkv, self.out, self.norm1 = nn.Linear(width, 3 * width), nn.Linear(width, width), nn.LayerNorm(width)
        self.up, self.down, self.norm2 = nn.Linear(width, inner), nn.Linear(inner, width), nn.LayerNorm(width)

    def mix(self, x: Tensor, seen: Tensor | None) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, seen: Tensor | None) -> Tensor:
        if self.first:
            x = x + self.mix(self.norm1(x), seen)
            return x + self.down(F.gelu(self.up(self.norm2(x))))
        x = self.norm1(x + self.mix(x, seen))
        return self.norm2(x + self.down(F.gelu(self.up(x))))


class Listener(nn.Module):
    """wav2vec 2.0 with norms of layers ("large") or of a group, and a head of its own.

    `hidden`: whether frames of padding are set to zero before the positions, as wav2vec 2.0 has it.
    """

    def __init__(self, large: bool, hidden: bool = True, width: int = 16) -> None:
        super().__init__()
        self.large, self.hidden = large, hidden
        sizes = zip((1, 8, 8), KERNELS, STRIDES, strict=True)
        self.ears = nn.ModuleList(nn.Conv1d(n, 8, kernel, stride, bias=large) for n, kernel, stride in sizes)
        self.levels = nn.ModuleList([nn.LayerNorm(8) for _ in KERNELS] if large else [nn.GroupNorm(8, 8)])
        self.scale, self.widen = nn.LayerNorm(8), nn.Linear(8, width)
        self.place = nn.Conv1d(width, width, 8, padding=4, groups=4)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList(Block(width, 4, 24, large) for _ in range(2))
        self.judge = nn.Linear(width, 5)

    def forward(self, wave: Tensor, mask: Tensor | None = None) -> Tensor:
        x = wave[:, None]
        for i, conv in enumerate(self.ears):
            x = conv(x)
            if self.large:
                x = self.levels[i](x.transpose(1, 2)).transpose(1, 2)
            elif i == 0:
                x = self.levels[0](x)
            x = F.gelu(x)
        x = self.widen(self.scale(x.transpose(1, 2)))
        seen = None
        if mask is not None:
            frames = mask.sum(1)
            for kernel, stride in zip(KERNELS, STRIDES, strict=True):
                frames = (frames - kernel) // stride + 1
            own = torch.arange(x.shape[1]) < frames[:, None]
            seen = own[:, None, None]
            if self.hidden:
                x = x.masked_fill(~own[..., None], 0.0)
        x = x + F.gelu(self.place(x.transpose(1, 2))[:, :, : x.shape[1]]).transpose(1, 2)
        x = x if self.large else self.norm(x)
        for block in self.blocks:
            x = block(x, seen)
        return self.judge((self.norm(x) if self.large else x).mean(1))


class Judge(nn.Module):
    """From hidden states to classes; `layers`: how many layers' are mixed first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.squeeze, self.judge = nn.Linear(16, 6), nn.Linear(6, 3)
        self.shares = nn.Parameter(torch.zeros(layers)) if layers else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.shares is not None:
            hidden = torch.einsum("bltw,l->btw", hidden, self.shares.softmax(0))
        return self.judge(self.squeeze(hidden).mean(1))


def saved(name: str, folder: Path, **sizes: Any) -> str:
    tiny_speech.save(tiny_speech.made(name, **SPEECH | sizes), folder)
    return f"file:{folder}"


@pytest.mark.parametrize("sizes", [{}, LARGE], ids=["norm of a group", "norms of layers"])
def test_a_target_that_takes_a_mask_is_run_with_one(sizes: dict[str, Any], tmp_path: Path) -> None:
    report = zoo.graft(f"{saved('Wav2Vec2Model', tmp_path, **sizes)}#encoder", Listener(bool(sizes)))
    assert report.verdict == "proven"
    assert {row.name.partition(".")[0] for row in report.rows if row.status == "new"} == {"judge"}
    assert report.proof is not None
    assert "padded" in report.proof.passes[0].inputs


def test_a_mask_that_hides_too_little_is_refuted(tmp_path: Path) -> None:
    """Padding reaches its neighbours through the convolution of positions; only a padded input shows it."""
    ref = f"{saved('Wav2Vec2Model', tmp_path, **LARGE)}#encoder"
    with pytest.raises(surgery.GraftError) as caught:
        zoo.graft(ref, Listener(True, hidden=False))
    assert caught.value.report.verdict == "refuted"


@pytest.mark.parametrize("layers", [0, SPEECH["num_hidden_layers"] + 1])
def test_a_head_for_classes_alone(layers: int, tmp_path: Path) -> None:
    mixed = {"use_weighted_layer_sum": bool(layers)}
    ref = saved("Wav2Vec2ForSequenceClassification", tmp_path, **CLASSES | mixed)
    report = zoo.graft(f"{ref}#head", Judge(layers))
    assert report.verdict == "proven"
    assert not [row for row in report.rows if row.status == "new"]


def test_classes_are_named(tmp_path: Path) -> None:
    names = {0: "yes", 1: "no", 2: "else"}
    sizes = SPEECH | LARGE | CLASSES | {"id2label": names, "label2id": {name: i for i, name in names.items()}}
    model = tiny_speech.save(tiny_speech.made("HubertForSequenceClassification", **sizes), tmp_path)
    samples = torch.randn(800, generator=torch.Generator().manual_seed(0))
    (tmp_path / "preprocessor_config.json").write_text('{"do_normalize": false, "return_attention_mask": true}')
    loaded = zoo.load(f"file:{tmp_path}")
    assert set(loaded.preprocess(samples)) == {"input_values", "attention_mask"}
    answer = loaded.run(samples)
    with torch.no_grad():
        torch.testing.assert_close(answer, model(samples[None]).logits)
    told = loaded.describe(answer)["top"]
    assert told[0]["class"] == names[int(answer[0].argmax())]
    assert sum(each["probability"] for each in told) == pytest.approx(1, abs=1e-3)
