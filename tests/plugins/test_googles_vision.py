"""Google's own files of ViT (.npz): shown, run and grafted; timm's own loader is what says what such a file means."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import surgery
import zoo
from zoo import cli
from zoo.api import host

timm = pytest.importorskip("timm")

SIDE, PATCH, WIDTH, HEADS, WIDE, DEPTH, CLASSES = 32, 8, 16, 4, 60, 2, 5


def arrays(*, classes: int = CLASSES, logits: int = 0) -> dict[str, Any]:
    """All arrays of a published file, under its names and in its shapes; `logits`: width of a layer before the head."""
    draw = numpy.random.default_rng(0)

    def normal(*shape: int, mean: float = 0.0) -> Any:
        return (mean + 0.3 * draw.normal(size=shape)).astype(numpy.float32)

    found = {
        "embedding/kernel": normal(PATCH, PATCH, 3, WIDTH),
        "embedding/bias": normal(WIDTH),
        "cls": normal(1, 1, WIDTH),
        "Transformer/posembed_input/pos_embedding": normal(1, 1 + (SIDE // PATCH) ** 2, WIDTH),
        "Transformer/encoder_norm/scale": normal(WIDTH, mean=1),
        "Transformer/encoder_norm/bias": normal(WIDTH),
    }
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention, dense = f"{block}/MultiHeadDotProductAttention_1", f"{block}/MlpBlock_3/Dense_"
        for norm in (0, 2):
            found[f"{block}/LayerNorm_{norm}/scale"] = normal(WIDTH, mean=1)
            found[f"{block}/LayerNorm_{norm}/bias"] = normal(WIDTH)
        for name in ("query", "key", "value"):
            found[f"{attention}/{name}/kernel"] = normal(WIDTH, HEADS, WIDTH // HEADS)
            found[f"{attention}/{name}/bias"] = normal(HEADS, WIDTH // HEADS)
        found[f"{attention}/out/kernel"] = normal(HEADS, WIDTH // HEADS, WIDTH)
        found[f"{attention}/out/bias"] = normal(WIDTH)
        found |= {f"{dense}0/kernel": normal(WIDTH, WIDE), f"{dense}0/bias": normal(WIDE)}
        found |= {f"{dense}1/kernel": normal(WIDE, WIDTH), f"{dense}1/bias": normal(WIDTH)}
    if logits:
        found |= {"pre_logits/kernel": normal(WIDTH, logits), "pre_logits/bias": normal(logits)}
    if classes:
        found |= {"head/kernel": normal(logits or WIDTH, classes), "head/bias": normal(classes)}
    return found


def saved(path: Path, **options: int) -> Path:
    numpy.savez(path, **arrays(**options))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return saved(tmp_path / "Ti_8.npz")


def timms(path: Path, classes: int = CLASSES) -> Any:
    """The model as a user of timm makes it from such a file."""
    model = timm.models.vision_transformer.VisionTransformer(
        SIDE, PATCH, num_classes=classes, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_ratio=WIDE / WIDTH
    )
    model.load_pretrained(str(path))
    return model.eval()


def probe_of(path: Path, part: str | None) -> zoo.PartProbe:
    entry, checkpoint = zoo.find("vit"), surgery.open(path)
    found = None if part is None else entry.part(part)
    text = entry.probe if found is None else found.probe
    assert text is not None
    if found is not None:
        checkpoint = checkpoint.view(entry.tensors_of(found, checkpoint))
    module, _, name = text.partition(":")
    made = getattr(import_module(module), name)(checkpoint, {})
    assert isinstance(made, zoo.PartProbe)
    return made


def test_shown(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", f"file:{file}", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert [part["name"] for part in done["parts"]] == ["patch", "encoder", "head"]
    checkpoint, entry = surgery.open(file), zoo.find("vit")
    held = [set(entry.tensors_of(part, checkpoint)) for part in entry.parts]
    assert held[1] | held[2] == set(checkpoint)
    assert held[0] < held[1]
    assert not held[1] & held[2]


def test_the_reference_is_what_timm_makes_of_the_file(file: Path) -> None:
    model, whole = timms(file), probe_of(file, None)
    for variant in whole.variants:
        pixels = whole.inputs(3, variant)
        assert pixels["pixel_values"].shape[2:] == (SIDE, SIDE)
        with torch.no_grad():
            features = model.forward_features(pixels["pixel_values"])
            got = whole.run(whole.reference, pixels)
            torch.testing.assert_close(got, (features, model(pixels["pixel_values"])))
            encoder, head, patch = (probe_of(file, part) for part in ("encoder", "head", "patch"))
            torch.testing.assert_close(encoder.run(encoder.reference, pixels)[0], features)
            torch.testing.assert_close(
                head.run(head.reference, {"hidden_states": features})[0], model.forward_head(features)
            )
            embedded = model._pos_embed(model.patch_embed(pixels["pixel_values"]))
            torch.testing.assert_close(patch.run(patch.reference, pixels)[0], embedded)


def test_all_of_the_file_is_in_the_reference(file: Path) -> None:
    """By value, each tensor of a running reference from the file's arrays, and no array left over."""
    from surgery.expr import names
    from surgery.link import link

    checkpoint, whole = surgery.open(file), probe_of(file, None)
    found = link(whole.reference, checkpoint)
    assert set(found) == set(whole.reference.state_dict())
    assert {name for expr in found.values() for name in names(expr)} == set(checkpoint)


@pytest.mark.parametrize("part", ["encoder", "patch"])
def test_grafted(
    file: Path,
    part: str,
    root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = {"side": SIDE, "patch": PATCH, "width": WIDTH, "depth": DEPTH, "heads": HEADS, "wide": WIDE}
    sets = [word for name, value in sizes.items() for word in ("--set", f"{name}={value}")]
    mine = [f"file:{file}#{part}", str(root / "examples" / "my_vit.py"), *sets]
    assert cli.main(["graft", *mine, "-o", "out.safetensors", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["verdict"] == "proven"
    assert done["counts"]["new"] == (2 if part == "encoder" else 4 + 14 * DEPTH)
    assert cli.main(["verify", *mine, "--weights", "out.safetensors", "-q"]) == 0
    assert capsys.readouterr().out == "proven\n"


def test_a_head_of_ones_own(file: Path) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Parameter(torch.zeros(WIDTH, CLASSES))
            self.shift = nn.Parameter(torch.zeros(CLASSES))

        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return hidden_states[:, 0] @ self.out + self.shift

    mine = Head()
    assert str(zoo.graft(f"file:{file}#head", mine).verdict) == "proven"
    torch.testing.assert_close(mine.out.detach(), surgery.open(file).read("head/kernel"))


def test_loaded_and_run_on_a_picture(file: Path, tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    loaded = zoo.load(f"file:{file}")
    answer = loaded.run(str(tmp_path / "picture.png"))
    # As timm shows pictures to its own models of these files, in the size that this file is for.
    settings = timm.data.resolve_data_config(
        {"input_size": (3, SIDE, SIDE)}, model=timm.create_model("vit_base_patch16_224.augreg_in21k", num_classes=0)
    )
    transform = timm.data.create_transform(**settings, is_training=False)
    with torch.no_grad():
        expected = timms(file)(transform(Image.open(tmp_path / "picture.png").convert("RGB"))[None])
    torch.testing.assert_close(answer.clone(), expected, rtol=1e-4, atol=1e-5)
    assert loaded.describe(answer)["top"][0]["class"] == str(int(expected.argmax()))


def test_without_a_head(tmp_path: Path) -> None:
    probe = probe_of(saved(tmp_path / "body.npz", classes=0), None)
    assert probe.outputs == ("last_hidden_state",)


def test_a_layer_before_the_head_is_not_lost(tmp_path: Path) -> None:
    """timm's loader passes it over: the body runs, and what stands on it is refused."""
    file = saved(tmp_path / "older.npz", logits=12)
    assert probe_of(file, "encoder").outputs[0] == "last_hidden_state"
    for part in ("head", None):
        with pytest.raises(zoo.ZooError, match="pre_logits") as caught:
            probe_of(file, part)
        assert "#encoder" in caught.value.hint
    with pytest.raises(zoo.ZooError, match="pre_logits"):
        zoo.load(f"file:{file}")


def test_what_is_no_such_file(tmp_path: Path) -> None:
    hybrid = {**arrays(), "conv_root/kernel": numpy.zeros((7, 7, 3, 8))}
    numpy.savez(tmp_path / "R_Ti_8.npz", **hybrid)
    assert host().recognise({}, surgery.open(tmp_path / "R_Ti_8.npz")) == []
    lacking = arrays()
    del lacking["cls"]
    numpy.savez(tmp_path / "pooled.npz", **lacking)
    with pytest.raises(zoo.ZooError, match="lacks cls"):
        probe_of(tmp_path / "pooled.npz", None)
    in_memory = surgery.open({name: torch.from_numpy(value) for name, value in arrays().items()})
    with pytest.raises(zoo.ZooError, match="reads from the file alone"):
        import_module("zoo_vision.vit").whole_probe(in_memory, {})
