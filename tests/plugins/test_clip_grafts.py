"""Image-text models from a hub, through the command line: pulled, shown, grafted into the examples, and verified."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny_bert, tiny_clip
from tests.hub_server import HubServer
from tests.tiny_clip import IMAGE, LENGTH, PATCH, SHARED, VOCABULARY, WIDTH
from tests.zoo.conftest import Done, Zoo

pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parents[2]
MATCHER = {
    "size": IMAGE,
    "patch": PATCH,
    "image_width": WIDTH,
    "image_layers": 2,
    "image_heads": 2,
    "vocab": VOCABULARY,
    "length": LENGTH,
    "text_width": WIDTH,
    "text_layers": 2,
    "text_heads": 2,
    "out": SHARED,
}
PAIRS = {"size": IMAGE, "patch": PATCH, "vocab": VOCABULARY, "length": LENGTH, "width": WIDTH, "layers": 2, "heads": 2}
PAIRS |= {"inner": 4 * WIDTH}
ALIGNED = {"wider": 1, "deeper": 1, "vocab": VOCABULARY, "positions": LENGTH, "width": WIDTH, "layers": 2, "heads": 2}
ALIGNED |= {"inner": 4 * WIDTH, "stages": "((3,1,1,32,16,1),(5,2,2,16,24,2))"}
SEARCH = {"vocab": 40, "positions": 24, "text_width": 16, "text_layers": 2, "text_heads": 4, "text_inner": 32}
SEARCH |= {"size": IMAGE, "patch": PATCH, "image_width": WIDTH, "image_layers": 2, "image_heads": 2}
SEARCH |= {"image_out": SHARED, "shared": 8}

# entry -> tiny model, repository, example, its sizes, what stays new
ROWS = {
    "clip": ("clip in transformers", "openai/clip-vit-base-patch32", "my_clip.py", MATCHER, {"classify"}),
    "siglip": ("siglip in transformers", "google/siglip-base-patch16-224", "my_siglip.py", PAIRS, {"topic"}),
    "align": ("align in transformers", "kakaobrain/align-base", "my_align.py", ALIGNED, {"label"}),
}


def sizes(table: dict[str, object]) -> list[str]:
    return [word for name, value in table.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[tuple[Zoo, HubServer]]:
    """The command line in a folder of its own, and the hub that it asks."""
    for name in ("home", "work"):
        (tmp_path / name).mkdir()
    with HubServer() as hub:
        yield Zoo(tmp_path / "home", tmp_path / "work").online(hub.endpoint), hub


def good(done: Done) -> Done:
    assert done.status == 0, done.err + done.out
    return done


@pytest.mark.parametrize("entry", ROWS)
def test_from_the_hub_into_an_example(run: tuple[Zoo, HubServer], entry: str) -> None:
    zoo, hub = run
    model, repository, example, table, new = ROWS[entry]
    hub.add(repository, tiny_clip.MODELS[model][0]().files)
    good(zoo("pull", entry))
    shown = good(zoo("show", entry, "--json")).json
    assert {"text", "vision"} <= {part["name"] for part in shown["parts"]}
    arguments = [entry, str(ROOT / "examples" / example), *sizes(table)]
    done = good(zoo("graft", *arguments, "-o", "mine.safetensors", "--json")).json
    assert done["verdict"] == "proven"
    assert {row["name"].partition(".")[0] for row in done["rows"] if row["status"] == "new"} == new
    assert set(done["proof"]["passes"][0]["residuals"]) == {
        "image_embeds_unnormalised",
        "text_embeds_unnormalised",
        "logits_per_image",
    }
    good(zoo("verify", *arguments, "--weights", "mine.safetensors"))


def test_two_towers_of_two_entries_in_one_model(run: tuple[Zoo, HubServer]) -> None:
    zoo, hub = run
    folder = zoo.cwd / "saved"
    tiny_bert.save(folder)
    hub.add("google-bert/bert-base-uncased", {each.name: each.read_bytes() for each in folder.iterdir()})
    hub.add("openai/clip-vit-base-patch32", tiny_clip.hf_clip().files)
    example = str(ROOT / "examples" / "my_search.py")
    for ref, into, start in (("bert-encoder", "text", []), ("clip-image", "image", ["--init", "text.safetensors"])):
        done = good(
            zoo(
                "graft", ref, f"{example}:Search", *sizes(SEARCH), "--into", into, *start,
                "-o", f"{into}.safetensors", "--json",
            )
        ).json  # fmt: skip
        assert done["verdict"] == "proven"
    check = (
        "import sys, torch; from safetensors.torch import load_file\n"
        "a, b = load_file('text.safetensors'), load_file('image.safetensors')\n"
        "assert a.keys() == b.keys()\n"
        "assert all(torch.equal(a[n], b[n]) for n in a if not n.startswith('image.'))\n"
        "assert not torch.equal(a['image.out.weight'], b['image.out.weight'])"
    )
    good(zoo.python(check))


def test_a_file_of_openais_is_recognised_and_grafted(run: tuple[Zoo, HubServer]) -> None:
    """Nothing beside it: what it is, and how wide its heads are, is told by its tensors."""
    zoo, _ = run
    path = tiny_clip.openai().at(zoo.cwd)
    table = {**MATCHER, "image_heads": 1, "text_heads": 1}
    done = good(
        zoo(
            "graft",
            f"file:{path.name}",
            str(ROOT / "examples" / "my_clip.py"),
            *sizes(table),
            "-o",
            "a.safetensors",
            "--json",
        )
    ).json
    assert done["verdict"] == "proven"


def test_the_namespace_takes_open_clips_layout(run: tuple[Zoo, HubServer]) -> None:
    """The repository has transformers' layout too, and no safetensors of open_clip's."""
    zoo, hub = run
    files = {**tiny_clip.hf_clip().files, **tiny_clip.open_clip_bin().files}
    hub.add("laion/CLIP-ViT-B-32-laion2B-s34B-b79K", files)
    ref = "open_clip:ViT-B-32/laion2b_s34b_b79k"
    good(zoo("pull", ref))
    assert "open_clip_pytorch_model.bin" in zoo.cached
    assert "model.safetensors" not in zoo.cached
    shown = good(zoo("show", ref, "--json")).json
    assert {"text", "vision", "logit_scale"} == {part["name"] for part in shown["parts"]}
    code = (
        "import sys, zoo; from zoo import resolving; s = resolving.resolve(sys.argv[1]);"
        "assert 'model_cfg' in s.config; print(s.reference().outputs)"
    )
    assert "logits_per_image" in good(zoo.python(code, ref)).out
