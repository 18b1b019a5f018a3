"""Own towers, speech encoders and forecasters of other sizes than the checkpoint, made by the libraries themselves."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import surgery
import zoo
from tests import tiny_clip, tiny_speech

EXAMPLES = Path(__file__).parents[2] / "examples"
HEADS = 2
MATCHER = {
    "size": tiny_clip.IMAGE,
    "patch": tiny_clip.PATCH,
    "image_width": tiny_clip.WIDTH,
    "image_layers": 2,
    "image_heads": HEADS,
    "vocab": tiny_clip.VOCABULARY,
    "length": tiny_clip.LENGTH,
    "text_width": tiny_clip.WIDTH,
    "text_layers": 2,
    "text_heads": HEADS,
    "out": tiny_clip.SHARED,
}


def own(file: str, name: str, sizes: Mapping[str, Any]) -> nn.Module:
    space: dict[str, Any] = {"__name__": file}
    exec(compile((EXAMPLES / f"{file}.py").read_text(), file, "exec"), space)
    torch.manual_seed(3)
    made: nn.Module = space[name](**sizes)
    return made.eval()


def approximate(report: surgery.Report) -> dict[str, str]:
    return {row.name: row.expr for row in report.rows if row.kind == "approximate"}


# -- two towers -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module", params=["open_clip", "hf_clip"])
def clip(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With OpenAI's quick GELU, as the example has it."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "hf_clip":
        pytest.importorskip("transformers")
        return tiny_clip.hf_clip().at(folder)
    from open_clip.model import CLIP

    config = {**tiny_clip.MODEL_CFG, "quick_gelu": True}
    model = tiny_clip.shaken(CLIP(**config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    return folder


def test_a_longer_context_keeps_the_old_positions(clip: Path) -> None:
    mine = own("my_clip", "Matcher", {**MATCHER, "length": 20}).get_submodule("reader")
    ids = torch.randint(0, 59, (2, 9), generator=torch.Generator().manual_seed(0))
    report = zoo.graft(f"file:{clip}#text", mine, example=ids)
    assert report.verdict == "adapted"
    (row,) = approximate(report).values()
    assert row.startswith("extend_pos_embed_tile(")
    source = surgery.open(clip)
    (name,) = report.plan["places"].sources
    assert torch.equal(mine.get_parameter("places")[:12], source.read(name))


def test_interpolated_positions_on_request(clip: Path) -> None:
    """open_clip's own rule in place of the tiled rows."""
    from open_clip.model import resize_text_pos_embed

    mine = own("my_clip", "Matcher", {**MATCHER, "length": 20}).get_submodule("reader")
    ids = torch.randint(0, 59, (2, 9), generator=torch.Generator().manual_seed(0))
    rule = surgery.rules.resize("*position*embedding*", "resize_pos_embed_1d", to=20)
    report = zoo.graft(f"file:{clip}#text", mine, example=ids, rules=[rule])
    assert report.verdict == "adapted"
    (name,) = report.plan["places"].sources
    state = {"positional_embedding": surgery.open(clip).read(name)}
    shaped = nn.Module()
    shaped.positional_embedding = nn.Parameter(torch.zeros(20, tiny_clip.WIDTH))
    resize_text_pos_embed(state, shaped)
    assert torch.equal(mine.get_parameter("places"), state["positional_embedding"])


@pytest.mark.parametrize(("sizes", "ops"), [({"size": 48}, {"resize_pos_embed_2d"}), ({"patch": 4}, None)])
def test_another_picture(clip: Path, sizes: dict[str, int], ops: set[str] | None) -> None:
    made = {**MATCHER, **sizes}
    mine = own("my_clip", "Matcher", made).get_submodule("eye")
    pixels = torch.randn(1, 3, made["size"], made["size"], generator=torch.Generator().manual_seed(0))
    report = zoo.graft(f"file:{clip}#vision", mine, example=pixels)
    assert report.verdict == "adapted"
    found = {text.partition("(")[0] for text in approximate(report).values()}
    assert found == (ops or {"resize_pos_embed_2d", "resize_patch_embed"})


# -- speech -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("positions", "verdict"), [(8, "proven"), (20, "adapted")])
def test_frames_of_whisper(tmp_path: Path, positions: int, verdict: str) -> None:
    pytest.importorskip("transformers")
    from transformers.models.whisper.modeling_whisper import sinusoids

    model = tiny_speech.made("WhisperForConditionalGeneration", **tiny_speech.WHISPER)
    model.model.encoder.embed_positions.weight.data.copy_(sinusoids(12, 16))
    tiny_speech.save(model, tmp_path)
    sizes = {"mels": 8, "width": 16, "layers": 2, "heads": 4, "inner": 24, "positions": positions}
    mine = own("my_whisper", "SoundTagger", sizes)
    mel = torch.randn(1, 8, 2 * positions, generator=torch.Generator().manual_seed(0))
    report = zoo.graft(f"file:{tmp_path}#encoder", mine, example=mel)
    assert report.verdict == verdict
    made = mine.get_parameter("places").detach()
    old = surgery.open(tmp_path).read("model.encoder.embed_positions.weight")
    assert torch.equal(made[: min(12, positions)], old[: min(12, positions)])


# -- series -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("changes", "ops"),
    [
        ({}, set()),
        ({"patch_length": 4, "patch_stride": 4}, {"resize_patch_embed_1d", "resize_pos_embed_1d"}),
        ({"patch_length": 12, "patch_stride": 12}, {"resize_patch_embed_1d", "resize_pos_embed_1d"}),
        ({"context_length": 48}, {"resize_pos_embed_1d"}),
    ],
)
def test_patches_of_another_length(tmp_path: Path, changes: dict[str, int], ops: set[str]) -> None:
    transformers = pytest.importorskip("transformers")
    settings = {
        "d_model": 16,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "ffn_dim": 24,
        "context_length": 32,
        "patch_length": 8,
        "patch_stride": 8,
    }
    torch.manual_seed(0)
    model = transformers.PatchTSTForPrediction(
        transformers.PatchTSTConfig(**settings, num_input_channels=2, prediction_length=6, scaling="std")
    ).eval()
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.is_floating_point() and "position" not in name:
                noise = 0.1 * torch.randn_like(value)
                value.add_(noise.abs() if "running_var" in name else noise)
    model.save_pretrained(tmp_path)
    sizes = {**settings, **changes}
    mine = own("my_patchtst", "MyPatchTST", sizes)
    series = torch.randn(2, sizes["context_length"], 2, generator=torch.Generator().manual_seed(0))
    report = zoo.graft(f"file:{tmp_path}#encoder", mine, example=series)
    assert report.verdict == ("adapted" if changes else "proven")
    assert {text.partition("(")[0] for text in approximate(report).values()} == ops
