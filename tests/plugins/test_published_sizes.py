"""What is said of published models without their weights: sizes of the examples, and parameters of the suggestions."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from zoo.suggest import _table

transformers = pytest.importorskip("transformers")

# config.json of huggingface/informer-tourism-monthly and autoformer-tourism-monthly, as far as public sources state it.
# The other widths follow from the sizes of their files, which the test compares.
TOURISM: dict[str, Any] = {
    "prediction_length": 24,
    "context_length": 24,
    "lags_sequence": list(range(1, 17)),
    "num_time_features": 2,
    "num_static_categorical_features": 1,
    "cardinality": [366],
    "embedding_dimension": [2],
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
# family -> class, its width and heads, and what the hub lists model.safetensors with, in kB
LAGGED = {"informer": ("Informer", 32, 2, 358), "autoformer": ("Autoformer", 64, 4, 1080)}


@pytest.mark.parametrize("family", LAGGED)
def test_examples_have_the_published_sizes(family: str, root: Path, tmp_path: Path) -> None:
    from zoo.cli import main

    kind, width, heads, listed = LAGGED[family]
    config = getattr(transformers, f"{kind}Config")(
        **TOURISM, d_model=width, encoder_attention_heads=heads, decoder_attention_heads=heads
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForPrediction")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size / 1000 == pytest.approx(listed, rel=0.01)
    example = root / "examples" / f"my_{family}.py"
    ref = f"file:{tmp_path / 'model.safetensors'}#encoder"
    assert main(["graft", ref, str(example), "-o", str(tmp_path / "mine.safetensors"), "--quiet"]) == 0


def _text(name: str, **sizes: Any) -> Callable[[], nn.Module]:
    family = re.sub(r"(LMHeadModel|Model|For\w+)$", "", name)
    return lambda: getattr(transformers, name)(getattr(transformers, f"{family}Config")(**sizes))


def _image(name: str, **more: Any) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        import timm

        made: nn.Module = timm.create_model(name, **more)
        return made

    return build


_HALF_A_KILO = {"d_model": 512, "encoder_layers": 6, "decoder_layers": 6, "vocab_size": 51865}
_HEADS = {f"{side}_attention_heads": 8 for side in ("encoder", "decoder")}
_INNER = {f"{side}_ffn_dim": 2048 for side in ("encoder", "decoder")}

# Sizes as published; where none are given, the library's defaults are those of the model.
BUILT: dict[str, Callable[[], nn.Module]] = {
    "minilm": _text("BertModel", hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "distilbert": _text("DistilBertModel"),
    "bert": _text("BertModel"),
    "roberta": _text("RobertaModel", vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
    "t5": _text("T5ForConditionalGeneration"),
    "gpt2": _text("GPT2LMHeadModel"),
    "efficientnet.lite0": _image("tf_efficientnet_lite0"),
    "resnet": _image("resnet50"),
    "dinov2": _image("vit_base_patch14_dinov2", num_classes=0),
    "convnext": _image("convnext_tiny"),
    "swin": _image("swin_tiny_patch4_window7_224"),
    "vit": _image("vit_base_patch16_224"),
    "clip": _text("CLIPModel"),
    "siglip": _text("SiglipModel"),
    "whisper": _text("WhisperForConditionalGeneration", **_HALF_A_KILO, **_HEADS, **_INNER),
    "wav2vec2": _text("Wav2Vec2Model"),
    "wavlm": _text("WavLMModel"),
    "informer": _text("InformerForPrediction", **TOURISM, d_model=32),
}
# Not built here: a config.json or the size of a file is what their numbers come from; the sources say so.
ELSEWHERE = {"t5.flan-base", "patchtst"}


def test_every_suggestion_is_accounted_for() -> None:
    assert {row["ref"] for row in _table()["model"]} == set(BUILT) | ELSEWHERE


@pytest.mark.parametrize("ref", BUILT)
def test_parameters_are_those_of_the_model(ref: str) -> None:
    """Millions, to the three digits that the table has at most."""
    (row,) = (row for row in _table()["model"] if row["ref"] == ref)
    with torch.device("meta"):
        counted = sum(parameter.numel() for parameter in BUILT[ref]().parameters()) / 1e6
    assert row["parameters"] == pytest.approx(counted, rel=0.01)


def test_flan_has_a_head_of_its_own() -> None:
    """transformers ties the head when it builds one from a configuration; the published files have both matrices."""
    sizes = {"d_model": 768, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
    with torch.device("meta"):
        model = _text("T5ForConditionalGeneration", **sizes, feed_forward_proj="gated-gelu")()
    body = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("lm_head."))
    (row,) = (row for row in _table()["model"] if row["ref"] == "t5.flan-base")
    assert row["parameters"] == pytest.approx((body + 32128 * 768) / 1e6, rel=0.01)


def test_timm_states_these_licences() -> None:
    """Every repository of timm's is in its own registry, under the licence that the catalogue gives it."""
    from timm.models import get_pretrained_cfg, list_pretrained

    known = set(list_pretrained())
    seen = 0
    for entry in zoo.entries():
        for tag, sources in entry.tags.items():
            for source in sources:
                name = source.location.removeprefix("timm/")
                if entry.modality != "vision" or source.kind != "hub":
                    continue
                assert name in known, source.location
                cfg = get_pretrained_cfg(name)
                assert cfg is not None
                assert cfg.hf_hub_id == source.location
                assert cfg.license == entry.licence_of(tag), source.location
                seen += 1
    assert seen > 50


def test_open_clip_knows_these_repositories() -> None:
    from open_clip import pretrained

    known = {
        str(pretrained.get_pretrained_cfg(arch, tag).get("hf_hub", "")).rstrip("/")
        for arch, tag in pretrained.list_pretrained()
    }
    ours = {
        source.location
        for entry in zoo.entries()
        if entry.modality == "image-text"
        for sources in entry.tags.values()
        for source in sources
        if source.location.startswith(("laion/", "timm/"))
    }
    assert len(ours) == 5
    assert ours <= known


def _confirmed() -> dict[str, tuple[str, str]]:
    """Of each repository in docs/reference/catalogue.md, the licence and what confirmed it."""
    page = Path(__file__).parents[2] / "docs" / "reference" / "catalogue.md"
    rows = re.findall(
        r"^\| (\S+/\S+) \| ([^|]+) \| [^|]*\| ([^|]+) \|$", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert len({name for name, _, _ in rows}) == len(rows)
    return {name: (licence, by) for name, licence, by in rows}


def test_every_repository_has_its_sources_on_the_page() -> None:
    ours = {
        source.location: entry.licence_of(tag)
        for entry in zoo.entries()
        for tag, sources in entry.tags.items()
        for source in sources
        if source.kind == "hub" and entry.modality != "vision"
    }
    assert {name: licence for name, (licence, _) in _confirmed().items()} == ours


def test_libraries_name_what_the_page_says_they_do() -> None:
    import open_clip

    if not transformers.__version__.startswith("5.24."):
        pytest.skip("the page speaks of transformers 5.24")
    texts = "\n".join(
        path.read_text(encoding="utf-8")
        for library in (transformers, open_clip)
        for path in Path(library.__file__).parent.rglob("*.py")
    )
    for name, (_, by) in _confirmed().items():
        if "library" in by:
            found = re.search(re.escape(name) + r"(?![A-Za-z0-9_-]|\.[A-Za-z0-9])", texts)
            # open_clip's table names some under the owner that it has in a constant of its own.
            assert found or name.startswith(("laion/", "timm/")), name
