"""Every family and part in a table: the inputs that its probe declares run, are finite, and do what they say."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import zoo
from tests import tiny_speech, tiny_vision
from tests.tiny_speech import CLASSES, LARGE, SPEECH, WAVLM, WHISPER
from zoo import resolving

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "vocab_size": 40}
_PLACES = {"max_position_embeddings": 24}
_LAGGED: dict[str, Any] = {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3], "d_model": 8}
_LAGGED |= {"num_time_features": 2, "num_static_categorical_features": 1, "cardinality": [7], "encoder_layers": 2}
_LAGGED |= {"embedding_dimension": [2], "decoder_layers": 2, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12}
_PATCHED: dict[str, Any] = {"num_input_channels": 2, "context_length": 20, "patch_length": 4, "patch_stride": 3}
_PATCHED |= {"d_model": 8, "num_attention_heads": 2, "num_hidden_layers": 2, "ffn_dim": 12, "prediction_length": 5}
_PATCHED |= {"scaling": "std", "loss": "mse"}
_SIGHT = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
_SEEN = {"image_size": 16, "patch_size": 8}
_SAID = {"vocab_size": 50, "max_position_embeddings": 12, "eos_token_id": 49, "bos_token_id": 48, "pad_token_id": 0}
_CLIP = {"text_config": _SIGHT | _SAID, "vision_config": _SIGHT | _SEEN}
_T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
_GPT2 = {
    "vocab_size": 40,
    "n_positions": 24,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
_SMALL = {"vocab_size": 40, "max_position_embeddings": 24, "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24}
_WHISPER = {**WHISPER}

# The class of transformers, and its sizes; the entry's name is the key, but for what is after a blank.
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertModel", BODY | _PLACES),
    "bert heads": ("BertForMaskedLM", BODY | _PLACES),
    "roberta": ("RobertaForMaskedLM", BODY | {"max_position_embeddings": 26, "pad_token_id": 1, "type_vocab_size": 1}),
    "distilbert": ("DistilBertModel", _SMALL),
    "gpt2": ("GPT2Model", _GPT2),
    "t5": ("T5ForConditionalGeneration", _T5 | {"decoder_start_token_id": 0}),
    "whisper": ("WhisperForConditionalGeneration", _WHISPER),
    "wav2vec2": ("Wav2Vec2ForCTC", SPEECH | LARGE),
    "hubert": ("HubertForSequenceClassification", SPEECH | LARGE | CLASSES),
    "wavlm": ("WavLMForCTC", SPEECH | WAVLM | LARGE),
    "clip": ("CLIPModel", _CLIP | {"projection_dim": 12}),
    "siglip": ("SiglipModel", {"text_config": _SIGHT | _SAID, "vision_config": _SIGHT | _SEEN}),
    "patchtst": ("PatchTSTForPrediction", _PATCHED),
    "informer": ("InformerForPrediction", _LAGGED),
    "autoformer": ("AutoformerForPrediction", _LAGGED | {"label_length": 4, "moving_average": 5}),
}
SEEN = {row.entry: row for row in tiny_vision.ROWS}
# Families whose tiny models need a library of their own, tested with it beside; and sizes of one that is in the table.
ELSEWHERE = {
    "minilm": "a tag of the same family as bert",
    "align": "tests/plugins/test_zoo_clip.py",
    "timesnet": "tests/plugins/test_timeseries_forecasters.py",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Each model, saved when it is first asked for."""
    known: dict[str, Path] = {}

    def saved(name: str) -> Path:
        if name not in known:
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            if name in MADE:
                kind, sizes = MADE[name]
                tiny_speech.made(kind, **sizes).save_pretrained(folder)
            else:
                tiny_vision.save(SEEN[name], folder)
            known[name] = folder
        return known[name]

    return saved


def parts_of(name: str) -> list[str | None]:
    entry = zoo.find(name.partition(" ")[0])
    return [None, *(part.name for part in entry.parts)]


# Parts that these checkpoints do not hold. Of "bert heads" and of roberta the head's matrix is the embedding's, which a
# file does not hold twice, and a part is a view of the file.
ABSENT = {
    ("bert", "head"),
    *(("bert heads", part) for part in ("pooler", "head")),
    *(("roberta", part) for part in ("pooler", "head")),
    *((name, "head") for name in ("dinov2", "distilbert", "t5")),
}
BARE = {("clip", "logit_scale"), ("siglip", "logit_scale")}  # one number, which nothing runs by itself
CASES = [(name, part) for name in (*MADE, *SEEN) for part in parts_of(name) if (name, part) not in ABSENT | BARE]


def probed(folder: Path, part: str | None) -> zoo.PartProbe:
    probe = resolving.resolve(f"file:{folder}" + (f"#{part}" if part else "")).reference()
    assert probe is not None
    return probe


@pytest.mark.parametrize(("name", "part"), sorted(ABSENT))
def test_a_part_that_is_not_there_is_an_error(folders: Callable[[str], Path], name: str, part: str) -> None:
    with pytest.raises(zoo.ZooError, match="holds no tensor of its part|lacks") as raised:
        probed(folders(name), part)
    assert raised.value.kind == "weights"


@pytest.mark.parametrize(("name", "part"), sorted(BARE))
def test_a_number_alone_has_no_probe(folders: Callable[[str], Path], name: str, part: str) -> None:
    assert resolving.resolve(f"file:{folders(name)}#{part}").reference() is None


def floats(x: dict[str, Tensor]) -> list[Tensor]:
    return [t for t in x.values() if t.is_floating_point()]


def test_every_entry_is_in_the_table() -> None:
    names = {entry.name for entry in zoo.entries() if entry.open and entry.probe is not None}
    told = {name.partition(" ")[0] for name in (*MADE, *SEEN)} | set(ELSEWHERE)
    assert names - told == set()


@pytest.mark.parametrize(("name", "part"), CASES)
def test_each_variant_runs_and_says_what_it_is(folders: Callable[[str], Path], name: str, part: str | None) -> None:
    probe = probed(folders(name), part)
    assert probe.variants[0] == "plain"
    assert len(set(probe.variants)) == len(probe.variants)
    for variant in probe.variants:
        x, again, other = probe.inputs(3, variant), probe.inputs(3, variant), probe.inputs(4, variant)
        assert all(torch.equal(x[key], again[key]) for key in x), "the same seed gives other inputs"
        assert x.keys() == other.keys()
        assert all(bool(torch.isfinite(t).all()) for t in floats(x))
        with torch.no_grad():
            answer = probe.run(probe.reference, x)
        assert len(answer) == len(probe.outputs)
        assert all(bool(torch.isfinite(t).all()) for t in answer), variant
    assert any(not torch.equal(t, probe.inputs(4, "plain")[key]) for key, t in probe.inputs(3, "plain").items()), (
        "every seed gives the same inputs"
    )
    for one, other in combinations(probe.variants, 2):
        a, b = probe.inputs(3, one), probe.inputs(3, other)
        assert a.keys() == b.keys()
        if (one, other) == ("plain", "longest"):  # where the length is fixed, all are as long
            continue
        assert any(a[key].shape != b[key].shape or not torch.equal(a[key], b[key]) for key in a), (one, other)


MASKS = ("attention_mask", "past_observed_mask")
# What hides nothing by the nature of the model: embeddings read no mask, and in CLIP's text nothing sees what comes
# after the token that is pooled.
NOTHING = {("clip", None), ("clip", "text")}
UNMASKED = ("whisper", "siglip")  # their inputs are of one length


@pytest.mark.parametrize("name", [*MADE, *SEEN])
def test_masks_hide_something(folders: Callable[[str], Path], name: str) -> None:
    """A mask that hides nothing proves nothing of what a target does with it: with it the answer is another."""
    masked = []
    for part in [part for known, part in CASES if known == name]:
        probe = probed(folders(name), part)
        if any(mask in probe.inputs(3, "plain") for mask in MASKS):
            masked.append(part)
            if part != "embeddings" and (name, part) not in NOTHING:
                hides_something(probe)
    assert bool(masked) == (name not in SEEN and name not in UNMASKED), masked


def hides_something(probe: zoo.PartProbe) -> None:
    hiding = [v for v in ("padded", "missing") if v in probe.variants]
    assert hiding, "it takes a mask, and no variant has one that hides something"
    for variant in hiding:
        x = probe.inputs(3, variant)
        for mask in (m for m in MASKS if m in x):
            assert not bool(x[mask].bool().all())
            shown = x | {mask: torch.ones_like(x[mask])}
            with torch.no_grad():
                with_it, without = probe.run(probe.reference, x), probe.run(probe.reference, shown)
            apart = [float((a - b).abs().max()) for a, b in zip(with_it, without, strict=True)]
            assert max(apart) > 1e-6
