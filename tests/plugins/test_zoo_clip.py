"""Image-text models: recognised, and computed as their own libraries compute them, whole and in parts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
import zoo
from tests.tiny_clip import MODELS, Tiny

pytest.importorskip("transformers")


@pytest.fixture
def host() -> Iterator[zoo.Host]:
    import zoo_clip

    warned: list[str] = []
    yield zoo.Host({"clip": zoo_clip}, switches="", warn=warned.append)
    assert warned == []


@pytest.fixture(scope="module")
def made() -> dict[str, Tiny]:
    return {name: build() for name, (build, _, _) in MODELS.items()}


def opened(tiny: Tiny, folder: Path) -> tuple[surgery.Checkpoint, dict[str, Any]]:
    path = tiny.at(folder)
    beside = [path.parent / name for name in ("open_clip_config.json", "config.json") if name in tiny.files]
    return surgery.open(path), json.loads(beside[0].read_text()) if beside else {}


def probe_of(entry: zoo.Entry, part: str | None, checkpoint: surgery.Checkpoint, config: Any) -> zoo.PartProbe:
    text = entry.probe if part is None else entry.part(part).probe
    assert text is not None
    if part is not None:
        checkpoint = checkpoint.view(entry.tensors_of(entry.part(part), checkpoint))
    module, _, name = text.partition(":")
    found = getattr(import_module(module), name)(checkpoint, config)
    assert isinstance(found, zoo.PartProbe)
    return found


def logits_of(model: Any, x: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model's own library makes of images and texts."""
    if hasattr(model, "get_logits"):
        return model.get_logits(x["pixel_values"], x["input_ids"])[0]
    return model(**x).logits_per_image


@pytest.mark.parametrize("name", MODELS)
def test_references_compute_what_the_library_does(
    host: zoo.Host, made: dict[str, Tiny], name: str, tmp_path: Path
) -> None:
    entry = host.find(MODELS[name][1])
    checkpoint, config = opened(made[name], tmp_path)
    whole = probe_of(entry, None, checkpoint, config)
    assert whole.outputs == entry.outputs
    parts = {part: probe_of(entry, part, checkpoint, config) for part in ("text", "vision")}
    for variant in whole.variants:
        x = whole.inputs(3, variant)
        with torch.no_grad():
            image, text, logits = whole.run(whole.reference, x)
            torch.testing.assert_close(logits, logits_of(made[name].model, x), rtol=1e-4, atol=1e-4)
            for part, expected in (("text", text), ("vision", image)):
                probe = parts[part]
                assert probe.outputs == entry.part(part).outputs
                own = {key: x[key] for key in x if (key == "pixel_values") == (part == "vision")}
                torch.testing.assert_close(probe.run(probe.reference, own)[0], expected, rtol=1e-5, atol=1e-5)
    for probe in parts.values():
        for variant in probe.variants:
            probe.run(probe.reference, probe.inputs(4, variant))


@pytest.mark.parametrize("known", ["with its configuration", "bare"])
@pytest.mark.parametrize("name", MODELS)
def test_recognised(host: zoo.Host, made: dict[str, Tiny], name: str, known: str, tmp_path: Path) -> None:
    checkpoint, config = opened(made[name], tmp_path)
    _, expected, layout = MODELS[name]
    found = host.recognise(config if known != "bare" else {}, checkpoint)
    assert [each.entry for each in found] == [expected]
    assert host.find(expected).layout_of(checkpoint) == layout
    assert len(found[0].evidence) == 1 + (bool(config) and known != "bare") + (name == "clip of OpenAI")


@pytest.mark.parametrize("name", MODELS)
def test_parts_hold_the_tensors_that_they_should(
    host: zoo.Host, made: dict[str, Tiny], name: str, tmp_path: Path
) -> None:
    checkpoint, _ = opened(made[name], tmp_path)
    entry = host.find(MODELS[name][1])
    held = [entry.tensors_of(part, checkpoint) for part in entry.parts]
    sizes = {"input_resolution", "context_length", "vocab_size"} & set(checkpoint)
    assert sum(map(len, held)) == len(checkpoint) - len(sizes)
    assert set().union(*held) | sizes == set(checkpoint)


def test_bare_tensors_do_not_tell_the_activation(host: zoo.Host, made: dict[str, Tiny], tmp_path: Path) -> None:
    checkpoint, _ = opened(made["clip in open_clip"], tmp_path)
    with pytest.raises(zoo.ZooError, match="which activation"):
        probe_of(host.find("clip"), "vision", checkpoint, {})


def test_without_a_configuration_transformers_has_no_reference(
    host: zoo.Host, made: dict[str, Tiny], tmp_path: Path
) -> None:
    checkpoint, _ = opened(made["clip in transformers"], tmp_path)
    with pytest.raises(zoo.ZooError, match=r"no config\.json"):
        probe_of(host.find("clip"), "text", checkpoint, {})


def test_something_else_is_not_recognised(host: zoo.Host, made: dict[str, Tiny], tmp_path: Path) -> None:
    checkpoint, _ = opened(made["clip in transformers"], tmp_path)
    assert host.recognise({"model_type": "clipseg"}, checkpoint) == []
    assert host.recognise({}, checkpoint.view({f"x.{name}": name for name in checkpoint})) == []


def test_the_namespace_names_hub_repositories(host: zoo.Host) -> None:
    first, second = host.pick("open_clip:ViT-B-32/laion2b_s34b_b79k").sources
    assert (first.kind, first.location) == ("hub", "laion/CLIP-ViT-B-32-laion2B-s34B-b79K")
    assert (first.files[0], second.files[0]) == ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
    assert host.pick("open_clip:ViT-B-16-SigLIP/webli#vision").sources[0].location == "timm/ViT-B-16-SigLIP"
    assert host.pick("open_clip:ViT-B-32/openai").entry.part("image").name == "vision"


@pytest.mark.parametrize(
    ("ref", "message"),
    [
        ("open_clip:ViT-B-32/nothing", "has no weights called"),
        ("open_clip:ViT-B-33/openai", "has no weights for"),
        ("open_clip:ViT-B-32", "names no weights"),
    ],
)
def test_the_namespace_says_no(ref: str, message: str) -> None:
    from zoo_clip.namespace import resolve

    with pytest.raises(zoo.ZooError, match=message) as caught:
        resolve(ref)
    assert caught.value.hint


def test_importing_the_plugin_imports_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, zoo_clip; print([n for n in ('torch', 'open_clip', 'transformers') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_configuration_of_open_clip_is_found(made: dict[str, Tiny], tmp_path: Path) -> None:
    from zoo.sources import read_config

    path = made["clip in open_clip"].at(tmp_path)
    assert "model_cfg" in read_config(path)
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    assert "model_cfg" in read_config(path)
    assert "model_type" in read_config(path.with_name("model.safetensors"))
