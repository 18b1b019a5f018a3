"""CLIP with a ResNet for images, as OpenAI made it and open_clip has it (RN50 and its like)."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
import zoo
from tests.tiny_clip import MODEL_CFG, PREPROCESS, SHARED, Tiny, shaken

SIZE, STEM, LAYERS = 64, 8, (1, 2, 1, 1)
CFG: dict[str, Any] = {
    **MODEL_CFG,
    "vision_cfg": {"image_size": SIZE, "layers": list(LAYERS), "width": STEM, "head_width": 64},
}


def resnet() -> Tiny:
    """In open_clip's own form, with its configuration."""
    from open_clip.model import CLIP

    torch.manual_seed(0)
    model = shaken(CLIP(**CFG))
    config = json.dumps({"model_cfg": CFG, "preprocess_cfg": PREPROCESS}).encode()
    return Tiny(model, {"open_clip_model.safetensors": save(model.state_dict()), "open_clip_config.json": config})


@pytest.fixture(scope="module")
def made() -> Tiny:
    return resnet()


def part_of(entry: zoo.Entry, part: str, checkpoint: surgery.Checkpoint, config: Any) -> zoo.PartProbe:
    text = entry.part(part).probe
    assert text is not None
    module, _, name = text.partition(":")
    found = getattr(import_module(module), name)(
        checkpoint.view(entry.tensors_of(entry.part(part), checkpoint)), config
    )
    assert isinstance(found, zoo.PartProbe)
    return found


class Bottleneck(nn.Module):
    """Its stride is a mean over neighbours, before the last convolution and on the way round."""

    def __init__(self, came: int, width: int, stride: int) -> None:
        super().__init__()
        self.squeeze, self.norm1 = nn.Conv2d(came, width, 1, bias=False), nn.BatchNorm2d(width)
        self.look, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.widen, self.norm3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.stride = stride
        self.round = nn.Conv2d(came, 4 * width, 1, bias=False) if stride > 1 or came != 4 * width else None
        self.norm4 = nn.BatchNorm2d(4 * width) if self.round is not None else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.squeeze(x)))
        y = F.avg_pool2d(F.relu(self.norm2(self.look(y))), self.stride)
        y = self.norm3(self.widen(y))
        if self.round is not None and self.norm4 is not None:
            x = self.norm4(self.round(F.avg_pool2d(x, self.stride)))
        return F.relu(y + x)


class Photographs(nn.Module):
    """The image tower as one writes it for oneself: a stem of three convolutions, and attention in place of a mean."""

    def __init__(self, heads: int = 4, out: int = SHARED, labels: int = 3) -> None:
        super().__init__()
        stem = ((3, STEM // 2, 2), (STEM // 2, STEM // 2, 1), (STEM // 2, STEM, 1))
        self.stem = nn.ModuleList(nn.Conv2d(n, m, 3, stride, 1, bias=False) for n, m, stride in stem)
        self.levels = nn.ModuleList(nn.BatchNorm2d(m) for _, m, _ in stem)
        came, blocks = STEM, []
        for i, count in enumerate(LAYERS):
            for j in range(count):
                blocks.append(Bottleneck(came, STEM * 2**i, 2 if i and not j else 1))
                came = 4 * STEM * 2**i
        self.blocks = nn.ModuleList(blocks)
        self.heads = heads
        self.place = nn.Parameter(torch.zeros((SIZE // 32) ** 2 + 1, came))
        self.query, self.key, self.value = nn.Linear(came, came), nn.Linear(came, came), nn.Linear(came, came)
        self.out = nn.Linear(came, out)
        self.label = nn.Linear(out, labels)

    def embed(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.stem, self.levels, strict=True):
            x = F.relu(norm(conv(x)))
        x = F.avg_pool2d(x, 2)
        for block in self.blocks:
            x = block(x)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat([x.mean(1, keepdim=True), x], 1) + self.place
        q, k, v = self.query(x[:, :1]), self.key(x), self.value(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))

    def forward(self, image: Tensor) -> Tensor:
        return self.label(self.embed(image))


def test_the_tower_of_ones_own_can_hold_these_weights(made: Tiny) -> None:
    """Filled by hand it computes what open_clip computes, so a graft into it has an answer."""
    own, theirs = Photographs(heads=made.model.visual.attnpool.num_heads).eval(), made.model.visual
    known = theirs.state_dict()
    pairs: dict[str, str] = {}
    for i in range(3):
        pairs |= {f"stem.{i}": f"conv{i + 1}", f"levels.{i}": f"bn{i + 1}"}
    at = 0
    for i, count in enumerate(LAYERS):
        for j in range(count):
            for k, (conv, norm) in enumerate((("squeeze", "norm1"), ("look", "norm2"), ("widen", "norm3")), 1):
                pairs |= {f"blocks.{at}.{conv}": f"layer{i + 1}.{j}.conv{k}"}
                pairs |= {f"blocks.{at}.{norm}": f"layer{i + 1}.{j}.bn{k}"}
            pairs |= {f"blocks.{at}.round": f"layer{i + 1}.{j}.downsample.0"}
            pairs |= {f"blocks.{at}.norm4": f"layer{i + 1}.{j}.downsample.1"}
            at += 1
    pairs |= {name: f"attnpool.{name[0]}_proj" for name in ("query", "key", "value")} | {"out": "attnpool.c_proj"}
    filled = {"place": known["attnpool.positional_embedding"]}
    for name in own.state_dict():
        owner, _, leaf = name.rpartition(".")
        if owner in pairs:
            filled[name] = known[f"{pairs[owner]}.{leaf}"]
    own.load_state_dict({**own.state_dict(), **filled})
    assert set(own.state_dict()) - set(filled) == {"label.weight", "label.bias"}
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(own.embed(x), theirs(x), rtol=1e-4, atol=1e-4)


def test_it_is_recognised(made: Tiny, tmp_path: Path) -> None:
    import zoo_clip

    warned: list[str] = []
    host = zoo.Host({"clip": zoo_clip}, switches="", warn=warned.append)
    checkpoint = surgery.open(made.at(tmp_path))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    for each in ({}, config):
        assert [found.entry for found in host.recognise(each, checkpoint)] == ["clip"]
    assert warned == []


def test_both_towers_compute_what_the_library_does(made: Tiny, tmp_path: Path) -> None:
    entry = zoo.find("clip")
    checkpoint = surgery.open(made.at(tmp_path))
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    for part, key, encode in (
        ("vision", "pixel_values", made.model.encode_image),
        ("text", "input_ids", made.model.encode_text),
    ):
        probe = part_of(entry, part, checkpoint, config)
        for variant in probe.variants:
            x = probe.inputs(5, variant)
            with torch.no_grad():
                (got,) = probe.run(probe.reference, x)
                torch.testing.assert_close(got, encode(x[key]), rtol=1e-5, atol=1e-5)


def test_into_a_tower_of_ones_own(made: Tiny, tmp_path: Path) -> None:
    made.at(tmp_path)
    report = zoo.graft(
        f"file:{tmp_path / made.weights}#vision", Photographs(heads=made.model.visual.attnpool.num_heads)
    )
    assert report.verdict == "proven"
    assert {row.name.partition(".")[0] for row in report.rows if row.status == "new"} == {"label"}
