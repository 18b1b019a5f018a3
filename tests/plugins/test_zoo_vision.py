"""The vision plugin against the libraries that it describes: each family pulled, shown, recognised, run and grafted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
import zoo as package
from tests.hub_server import HubServer
from tests.tiny_vision import ROWS, Row, save
from tests.zoo.conftest import Zoo
from zoo import cli

timm = pytest.importorskip("timm")

PARTS = {row.entry: ["patch" if row.part == "encoder" else "stem", row.part, "head"] for row in ROWS}


@pytest.fixture
def host() -> Iterator[package.Host]:
    import zoo_vision

    warned: list[str] = []
    yield package.Host({"vision": zoo_vision}, switches="", warn=warned.append)
    assert warned == []


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each family, as its repository on the hub has it."""
    folder = tmp_path_factory.mktemp("saved")
    for row in ROWS:
        save(row, folder / row.entry)
    return folder


def opened(folder: Path) -> tuple[surgery.Checkpoint, dict[str, Any]]:
    return surgery.open(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def probe_of(
    host: package.Host, entry: str, part: str | None, checkpoint: surgery.Checkpoint, config: dict[str, Any]
) -> package.PartProbe:
    found = host.find(entry)
    text = found.probe if part is None else found.part(part).probe
    assert text is not None
    if part is not None:
        checkpoint = checkpoint.view(found.tensors_of(found.part(part), checkpoint))
    module, _, name = text.partition(":")
    made = getattr(import_module(module), name)(checkpoint, config)
    assert isinstance(made, package.PartProbe)
    return made


# ---------------------------------------------------------------------------------------------------- the catalogue


def test_every_source_is_a_repository_of_timm(host: package.Host) -> None:
    """By timm's own list: the architecture, the tag, and where its weights are."""
    assert [entry.name for entry in host.entries()] == sorted(row.entry for row in ROWS)
    for entry in host.entries():
        for sources in entry.tags.values():
            for source in sources:
                if source.kind == "hub":
                    known = timm.models.get_pretrained_cfg(source.location.removeprefix("timm/"))
                    assert known.hf_hub_id == source.location
                    assert known.license in (entry.licence, "bsd-3-clause")


def test_pulled_and_shown(saved: Path, hub_home: Path, tmp_path: Path) -> None:
    """All families in one process, from a hub that has what the real one has."""
    code = (
        "import sys\nfrom zoo.cli import main\n"
        "for name in sys.argv[1:]:\n    assert main(['pull', name, '-q']) == 0\n    main(['show', name])\n"
    )
    with HubServer() as hub:
        for row in ROWS:
            entry = package.find(row.entry)
            location = entry.tags[entry.default_tag][0].location
            files = {path.name: path.read_bytes() for path in (saved / row.entry).iterdir()}
            hub.add(location, {**files, "README.md": b"# A model of timm"})
        zoo = Zoo(hub_home, tmp_path)
        done = zoo.online(hub.endpoint).python(code, *(row.entry for row in ROWS))
    assert done.status == 0, done.err
    for row in ROWS:
        for part in PARTS[row.entry]:
            assert part in done.out
    assert zoo.cached.count("config.json") == len(ROWS) == zoo.cached.count("model.safetensors")


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_recognised(host: package.Host, saved: Path, row: Row) -> None:
    checkpoint, config = opened(saved / row.entry)
    (found,) = host.recognise(config, checkpoint)
    assert (found.entry, found.matched) == (row.entry, 2)
    assert "architecture" in found.evidence[0]
    assert [each.entry for each in host.recognise({}, checkpoint)] == [row.entry]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_parts_hold_all_tensors(host: package.Host, saved: Path, row: Row) -> None:
    checkpoint, _ = opened(saved / row.entry)
    entry = host.find(row.entry)
    assert [part.name for part in entry.parts] == PARTS[row.entry]
    held = [set(package.Entry.tensors_of(entry, part, checkpoint)) for part in entry.parts[: 3 if row.classes else 2]]
    assert set().union(*held) == set(checkpoint)
    assert held[0] < held[1]
    assert not row.classes or not held[1] & held[2]


# ---------------------------------------------------------------------------------------------------- run


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_reference_is_what_timm_computes(host: package.Host, saved: Path, row: Row) -> None:
    checkpoint, config = opened(saved / row.entry)
    model: Any = timm.create_model(f"local-dir:{saved / row.entry}", pretrained=True).eval()
    whole = probe_of(host, row.entry, None, checkpoint, config)
    body = probe_of(host, row.entry, row.part, checkpoint, config)
    for variant in whole.variants:
        x = whole.inputs(7, variant)
        with torch.no_grad():
            features = model.forward_features(x["pixel_values"])
            got = whole.run(whole.reference, x)
            torch.testing.assert_close(got[0], features, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(body.run(body.reference, x)[0], features, rtol=1e-4, atol=1e-4)
            if row.classes:
                head = probe_of(host, row.entry, "head", checkpoint, config)
                torch.testing.assert_close(got[1], model(x["pixel_values"]), rtol=1e-4, atol=1e-4)
                (logits,) = head.run(head.reference, {"hidden_states": features})
                torch.testing.assert_close(logits, got[1], rtol=1e-4, atol=1e-4)
    first = probe_of(host, row.entry, PARTS[row.entry][0], checkpoint, config)
    with torch.no_grad():
        assert first.run(first.reference, first.inputs(0, "plain"))[0].shape[0] == 2


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_loaded_and_run_on_a_picture(saved: Path, row: Row, tmp_path: Path) -> None:
    from PIL import Image

    pixels = torch.randint(0, 256, (40, 50, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(tmp_path / "picture.png")
    loaded = package.load(f"file:{saved / row.entry}")
    answer = loaded.run(str(tmp_path / "picture.png"))
    model: Any = timm.create_model(f"local-dir:{saved / row.entry}", pretrained=True).eval()
    settings = timm.data.resolve_data_config({}, model=model)
    transform = timm.data.create_transform(**settings, is_training=False)
    with torch.no_grad():
        expected = model(transform(Image.open(tmp_path / "picture.png").convert("RGB"))[None])
    torch.testing.assert_close(answer.clone(), expected, rtol=1e-4, atol=1e-4)
    said = loaded.describe(answer)
    assert json.dumps(said)
    if row.classes:
        assert len(said["top"]) == 5
        assert said["top"][0]["class"] == str(int(expected.argmax()))


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_grafted_into_a_module_of_ones_own(
    saved: Path,
    root: Path,
    row: Row,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    ref, file = f"file:{saved / row.entry}#{row.part}", str(root / "examples" / f"my_{row.entry}.py")
    sets = [word for name, value in row.sets.items() for word in ("--set", f"{name}={value}")]
    outputs = ["-o", "out.safetensors"]
    assert cli.main(["graft", ref, file, *sets, *outputs, "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["verdict"] == "proven"
    assert done["proof"]["passes"][0]["residuals"].keys() == {"last_hidden_state"}
    assert done["counts"]["new"] == 2
    assert cli.main(["verify", ref, file, *sets, "--weights", "out.safetensors", "-q"]) == 0
    assert capsys.readouterr().out == "proven\n"


# ---------------------------------------------------------------------------------------------------- names


def test_timm_names(host: package.Host) -> None:
    """With a tag, and without one: what timm itself takes then, or what is in the catalogue."""
    tagged = host.find("timm:vit_base_patch16_224.augreg2_in21k_ft_in1k")
    assert tagged.tags["default"][0].location == "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k"
    assert [part.name for part in tagged.parts] == ["patch", "encoder", "head"]
    assert host.find("timm:resnet50").tags["default"][0].location == "timm/resnet50.a1_in1k"
    other = host.find("timm:mobilenetv3_small_100")
    assert other.tags["default"][0].location == "timm/mobilenetv3_small_100.lamb_in1k"
    assert not other.parts
    # Of no family here: said, and still opened as a whole.
    second = host.find("timm:swinv2_tiny_window8_256")
    assert (second.parts, second.probe) == ((), "zoo_vision.probes:any_of_timm")
    assert "no family of this plugin" in second.note
    with pytest.raises(package.ZooError, match="no plugin opens"):
        host.find("timm:nonsense_net")


def test_sizes_through_tags(host: package.Host) -> None:
    """Small, base and large: each tag's architecture is of its family, and opens by timm's name."""
    sizes = {
        "vit": ("small", "base", "large"),
        "deit": ("small", "base", "3-large"),
        "dinov2": ("small", "base", "large"),
        "swin": ("small", "base", "large"),
        "convnext": ("small", "base", "large"),
        "resnet": ("18", "50", "152"),
        "resnetv2": ("18", "50", "101"),
        "efficientnet": ("b0", "b2", "b4"),
    }
    assert sizes.keys() == {entry.name for entry in host.entries()}
    for name, tags in sizes.items():
        entry = host.find(name)
        counts = []
        for tag in tags:
            (source, *_) = entry.tags[tag]
            model = source.location.removeprefix("timm/")
            for spelled in (f"timm:{model}", f"timm:{model.partition('.')[0]}"):
                opened = host.find(spelled)
                assert [part.name for part in opened.parts] == [part.name for part in entry.parts]
                assert opened.tags["default"][0].location == source.location
            with torch.device("meta"):
                counts.append(sum(p.numel() for p in timm.create_model(model.partition(".")[0]).parameters()))
        assert counts == sorted(set(counts)), name


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("vit_base_patch14_reg4_dinov2", "dinov2"),
        ("vit_large_patch16_384", "vit"),
        ("deit3_base_patch16_224", "deit"),
        ("tf_efficientnet_lite0", "efficientnet"),
        ("convnextv2_tiny", "convnext"),
        ("resnetv2_50", "resnetv2"),
        ("resnetv2_50x1_bit", "resnetv2"),
        ("resnetaa50d", None),
        ("swinv2_cr_tiny_ns_224", None),
        ("swinv2_tiny_window8_256", None),
    ],
)
def test_families_by_name(architecture: str, family: str | None) -> None:
    from zoo_vision.naming import family_of

    found = family_of(architecture)
    assert (found.name if found else None) == family
