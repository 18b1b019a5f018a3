"""Own vision models of other sizes than the checkpoint: image, patch, channels, window; as timm resizes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
import zoo
from tests.tiny_vision import ROWS, save
from tests.zoo.conftest import Zoo

timm = pytest.importorskip("timm")

EXAMPLES = Path(__file__).parents[2] / "examples"
VIT = {"side": 32, "patch": 8, "width": 16, "depth": 2, "heads": 4, "wide": 64}
SWIN = {"side": 32, "window": 4, "dim": 8, "depths": (2, 2), "heads": (2, 4)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for row in ROWS:
        if row.entry in ("vit", "deit", "dinov2", "swin", "resnet"):
            save(row, folder / row.entry)
    return folder


def own(file: str, sizes: Mapping[str, Any], *, channels: int = 3, seed: int = 3) -> nn.Module:
    """The class of an example, at these sizes; with another number of channels where that is asked for."""
    text = (EXAMPLES / f"{file}.py").read_text()
    text = re.sub(r"(Conv2d|Normed)\(3,", rf"\1({channels},", text) if channels != 3 else text
    space: dict[str, Any] = {"__name__": file}
    exec(compile(text, file, "exec"), space)
    torch.manual_seed(seed)
    kinds = [v for v in space.values() if isinstance(v, type) and issubclass(v, nn.Module) and v.__module__ == file]
    made: nn.Module = kinds[-1](**sizes)
    return made.eval()


def pictures(side: int, channels: int = 3, wide: int | None = None) -> torch.Tensor:
    return torch.randn(1, channels, side, wide or side, generator=torch.Generator().manual_seed(0))


def approximate(report: surgery.Report) -> dict[str, str]:
    return {row.name: row.expr for row in report.rows if row.kind == "approximate"}


def test_another_image_resamples_the_positions_as_timm_does(saved: Path) -> None:
    mine = own("my_vit", {**VIT, "side": 64})
    report = zoo.graft(f"file:{saved / 'vit'}#encoder", mine, example=pictures(64))
    assert report.verdict == "adapted"
    assert approximate(report) == {"places": "resize_pos_embed_2d(pos_embed, grid=(4, 4), to=(8, 8), prefix=1)"}
    old = surgery.open(saved / "vit").read("pos_embed")
    assert torch.equal(mine.get_parameter("places"), timm.layers.resample_abs_pos_embed(old, [8, 8], [4, 4], 1))
    assert any("image 32 -> 64; before any training" in note for note in report.plan.notes)


def test_an_equal_number_of_patches_in_another_grid_is_resampled_too(saved: Path) -> None:
    mine = own("my_vit", VIT)
    report = zoo.graft(f"file:{saved / 'vit'}#encoder", mine, example=pictures(16, wide=64))
    assert approximate(report) == {"places": "resize_pos_embed_2d(pos_embed, grid=(4, 4), to=(2, 8), prefix=1)"}


def test_another_patch_is_pi_resized_as_timm_does(saved: Path) -> None:
    mine = own("my_vit", {**VIT, "patch": 4})
    report = zoo.graft(f"file:{saved / 'vit'}#encoder", mine, example=pictures(32))
    assert report.verdict == "adapted"
    assert set(approximate(report)) == {"places", "patches.weight"}
    old = surgery.open(saved / "vit").read("patch_embed.proj.weight")
    assert torch.equal(mine.get_parameter("patches.weight"), timm.layers.resample_patch_embed(old, [4, 4]))


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_other_channels_as_timm_adapts_them(saved: Path, channels: int) -> None:
    from timm.models import adapt_input_conv

    mine = own("my_vit", VIT, channels=channels)
    report = zoo.graft(f"file:{saved / 'vit'}#encoder", mine, example=pictures(32, channels))
    assert report.verdict == "adapted"
    old = surgery.open(saved / "vit").read("patch_embed.proj.weight")
    assert torch.equal(mine.get_parameter("patches.weight"), adapt_input_conv(channels, old))
    # Of grey pictures the sum over channels stays, where each of the three is repeated equally often.
    kept = any("what both sizes take gives the same" in note for note in report.plan.notes)
    assert kept == (channels in (1, 6))


@pytest.mark.parametrize(("entry", "prefix"), [("deit", 2), ("dinov2", 1)])
def test_what_stands_before_the_grid_stays(saved: Path, entry: str, prefix: int) -> None:
    sizes: dict[str, Any] = {"depth": 2, "heads": 4}
    sizes |= {"side": 48, "patch": 8, "width": 16} if entry == "deit" else {"side": 56, "dim": 16}
    mine = own(f"my_{entry}", sizes)
    report = zoo.graft(f"file:{saved / entry}#encoder", mine, example=pictures(sizes["side"]))
    assert report.verdict == "adapted"
    (row,) = approximate(report).values()
    assert f"prefix={prefix}" in row


def test_a_smaller_window_resizes_every_table(saved: Path) -> None:
    mine = own("my_swin", {**SWIN, "window": 2})
    report = zoo.graft(f"file:{saved / 'swin'}#encoder", mine, example=pictures(32))
    assert report.verdict == "adapted"
    assert len(approximate(report)) == 4
    assert all("resize_rel_pos_bias" in text and "to=(3, 3)" in text for text in approximate(report).values())


def test_a_larger_image_leaves_the_windows_as_they_are(saved: Path) -> None:
    mine = own("my_swin", {**SWIN, "side": 64})
    report = zoo.graft(f"file:{saved / 'swin'}#encoder", mine, example=pictures(64))
    assert report.verdict == "proven" or set(approximate(report)) <= {f"layers.{i}.bias" for i in range(4)}


def test_the_channels_of_a_convolutional_network(saved: Path) -> None:
    mine = own("my_resnet", {"widths": (8, 12, 16, 20), "depths": (1, 2, 1, 1)}, channels=4)
    report = zoo.graft(f"file:{saved / 'resnet'}#body", mine, example=pictures(64, 4))
    assert report.verdict == "adapted"
    (row,) = approximate(report).values()
    assert "adapt_input_channels(conv1.weight, to=4)" in row


def test_the_command_line_finds_the_sizes_without_an_example(saved: Path, tmp_path: Path) -> None:
    sets = [f"--set={name}={value}" for name, value in {**VIT, "side": 48}.items()]
    out = tmp_path / "out.safetensors"
    ref, file = f"file:{saved / 'vit'}#encoder", str(EXAMPLES / "my_vit.py")
    zoo_ = Zoo(tmp_path, tmp_path)
    done = zoo_("graft", ref, file, "-o", str(out), *sets)
    assert done.status == 0, done.err
    assert "resized: image 32 -> 48" in done.out
    assert "resize_pos_embed_2d(pos_embed, grid=(4, 4), to=(6, 6), prefix=1)" in done.out
    done = zoo_("verify", ref, file, "--weights", str(out), *sets)
    assert done.status == 0, done.err
    assert done.out.rstrip().endswith("adapted")
