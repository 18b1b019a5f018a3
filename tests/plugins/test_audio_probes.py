"""References of speech models, part by part and in every layout, beside what the libraries compute themselves."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import surgery
import zoo
from tests import tiny_speech
from tests.tiny_speech import CLASSES, LARGE, SHAPED, SPEECH, WAVLM, WHISPER

pytest.importorskip("transformers")

SPEAKERS = {
    "Wav2Vec2Model": SPEECH,
    "Wav2Vec2ForPreTraining": SPEECH,
    "Wav2Vec2ForCTC": SPEECH | LARGE,
    "HubertModel": SPEECH,
    "HubertForCTC": SPEECH | LARGE,
    "WavLMModel": SPEECH | WAVLM,
    "WavLMForCTC": SPEECH | WAVLM | LARGE,
    "Wav2Vec2ForSequenceClassification": SPEECH | CLASSES,
    "HubertForSequenceClassification": SPEECH | LARGE | CLASSES | {"use_weighted_layer_sum": True},
    "WavLMForSequenceClassification": SPEECH | WAVLM | CLASSES | {"use_weighted_layer_sum": True},
}


def family_of(name: str) -> str:
    return next(f for f in ("wav2vec2", "hubert", "wavlm", "whisper") if name.lower().startswith(f))


def probe_of(
    family: str, part: str | None, tensors: surgery.Checkpoint, config: dict[str, Any]
) -> tuple[zoo.PartProbe, dict[str, Any]]:
    """The probe, and its outputs on each variant."""
    entry = zoo.find(family)
    text = entry.probe if part is None else entry.part(part).probe
    assert text is not None
    if part is not None:
        tensors = tensors.view(entry.tensors_of(entry.part(part), tensors))
    module, _, name = text.partition(":")
    probe = getattr(import_module(module), name)(tensors, config)
    with torch.no_grad():
        answers = {v: (probe.inputs(7, v), probe.run(probe.reference, probe.inputs(7, v))) for v in probe.variants}
    assert all(len(answer) == len(probe.outputs) for _, answer in answers.values())
    return probe, answers


def _host() -> zoo.Host:
    import zoo_audio

    return zoo.Host({"audio": zoo_audio}, switches="", warn=lambda _: None)


def same(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spelling", tiny_speech.SPELLINGS)
@pytest.mark.parametrize("name", SPEAKERS)
def test_speech(name: str, spelling: str, tmp_path: Path) -> None:
    family, headed = family_of(name), "CTC" in name or "Classification" in name
    model = tiny_speech.save(tiny_speech.made(name, **SPEAKERS[name]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = surgery.open(tiny_speech.SPELLINGS[spelling](load_file(tmp_path / "model.safetensors")))
    body = getattr(model, model.base_model_prefix, model)
    _, answers = probe_of(family, "encoder", tensors, config)
    with torch.no_grad():
        for x, (got,) in answers.values():
            same(got, body(**x).last_hidden_state)
        _, answers = probe_of(family, "frontend", tensors, config)
        for x, (got,) in answers.values():
            projected = body.feature_projection(body.feature_extractor(**x).transpose(1, 2))
            same(got, projected if family == "hubert" else projected[0])
        probe, answers = probe_of(family, None, tensors, config)
        for x, (got,) in answers.values():
            same(got, model(**x).logits if headed else body(**x).last_hidden_state)
        assert probe.outputs == (("logits",) if headed else ("last_hidden_state",))
        if "CTC" in name:
            _, answers = probe_of(family, "head", tensors, config)
            for x, (got,) in answers.values():
                same(got, model.lm_head(x["hidden_states"]))


@pytest.mark.parametrize("name", [name for name in SPEAKERS if "Classification" in name])
def test_classes_of_recordings(name: str, tmp_path: Path) -> None:
    """The head alone, given what the body says of a recording, answers as the whole model does."""
    model = tiny_speech.save(tiny_speech.made(name, **SPEAKERS[name]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = surgery.open(tmp_path / "model.safetensors")
    probe, answers = probe_of(family_of(name), "head", tensors, config)
    mixed = model.config.use_weighted_layer_sum
    assert all(x["hidden_states"].dim() == (4 if mixed else 3) for x, _ in answers.values())
    wave = torch.randn(2, 400, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        said = getattr(model, model.base_model_prefix)(wave, output_hidden_states=True)
        hidden = torch.stack(said.hidden_states, 1) if mixed else said.last_hidden_state
        same(probe.run(probe.reference, {"hidden_states": hidden})[0], model(wave).logits)


def test_a_head_for_speakers_is_refused(tmp_path: Path) -> None:
    """It has a projector and a classifier too, with convolutions and statistics between them."""
    sizes = SPEECH | {"tdnn_dim": [8, 8, 12], "tdnn_kernel": [3, 3, 1], "tdnn_dilation": [1, 2, 1]}
    model = tiny_speech.save(tiny_speech.made("Wav2Vec2ForXVector", **sizes, xvector_output_dim=8), tmp_path)
    tensors = surgery.open(tmp_path / "model.safetensors")
    for part in ("head", None):
        with pytest.raises(zoo.ZooError, match="tdnn|feature_extractor.bias.*no place"):
            probe_of("wav2vec2", part, tensors, model.config.to_dict())


@pytest.mark.parametrize("sizes", [SPEECH, SPEECH | LARGE])
def test_padding_is_silent_and_masked(sizes: dict[str, Any], tmp_path: Path) -> None:
    """With norms of layers, the recording that is padded computes in its own frames what it does alone."""
    tiny_speech.save(tiny_speech.made("Wav2Vec2Model", **sizes), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    probe, answers = probe_of("wav2vec2", "encoder", surgery.open(tmp_path / "model.safetensors"), config)
    x, (got,) = answers["padded"]
    samples = int(x["attention_mask"][1].sum())
    assert samples < x["input_values"].shape[1]
    assert not x["input_values"][1, samples:].any()
    with torch.no_grad():
        alone = probe.reference(x["input_values"][1:, :samples]).last_hidden_state
    if sizes.get("feat_extract_norm") == "layer":
        same(got[1:, : alone.shape[1]], alone)
    else:  # such a norm hears the silence: the reason why such models were trained without masks
        assert (got[1:, : alone.shape[1]] - alone).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "sizes", "prefix"),
    [
        ("Wav2Vec2Model", SHAPED, ""),
        ("Wav2Vec2ForCTC", SHAPED | LARGE, "w2v_encoder.w2v_model."),
        ("HubertForCTC", SHAPED, "w2v_encoder.w2v_model."),
        ("WavLMModel", SHAPED | LARGE | {"num_buckets": 8}, ""),
    ],
)
def test_fairseq_without_a_configuration(name: str, sizes: dict[str, Any], prefix: str) -> None:
    """Sizes are told from shapes; what comes out is what the model computes that the file was renamed from."""
    family = family_of(name)
    model = tiny_speech.made(name, **sizes)
    named = tiny_speech.fairseq(model.state_dict(), prefix, deep=sizes.get("feat_extract_norm") == "layer")
    tensors = surgery.open(named)
    assert family in [found.entry for found in _host().recognise({}, tensors)]
    for part in (None, "encoder"):
        _, answers = probe_of(family, part, tensors, {})
        with torch.no_grad():
            for x, (got,) in answers.values():
                body = getattr(model, model.base_model_prefix, model)
                same(got, model(**x).logits if part is None and prefix else body(**x).last_hidden_state)


@pytest.mark.parametrize("name", ["WhisperForConditionalGeneration", "WhisperModel"])
def test_whisper(name: str, tmp_path: Path) -> None:
    model = tiny_speech.save(tiny_speech.made(name, **WHISPER), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    tensors = surgery.open(tmp_path / "model.safetensors")
    body = getattr(model, "model", model)
    with torch.no_grad():
        _, answers = probe_of("whisper", "encoder", tensors, config)
        for x, (got,) in answers.values():
            same(got, body.encoder(**x).last_hidden_state)
        _, answers = probe_of("whisper", "frontend", tensors, config)
        for x, (got,) in answers.values():
            layers, body.encoder.layers = body.encoder.layers, torch.nn.ModuleList()
            norm, body.encoder.layer_norm = body.encoder.layer_norm, torch.nn.Identity()
            same(got, body.encoder(**x).last_hidden_state)
            body.encoder.layers, body.encoder.layer_norm = layers, norm
        _, answers = probe_of("whisper", "decoder", tensors, config)
        for x, (got,) in answers.values():
            x["input_ids"] = x.pop("decoder_input_ids")
            same(got, body.decoder(**x).last_hidden_state)
        _, answers = probe_of("whisper", None, tensors, config)
        for x, (got,) in answers.values():
            same(got, body(**x).last_hidden_state @ body.decoder.embed_tokens.weight.T)
        _, answers = probe_of("whisper", "head", tensors, config)
        for x, (got,) in answers.values():
            same(got, x["hidden_states"] @ body.decoder.embed_tokens.weight.T)


def test_openai_whisper(tmp_path: Path) -> None:
    """The package's own file, without a configuration, against the package's own model."""
    pytest.importorskip("whisper.model")
    dims, model = tiny_speech.openai_whisper(layers=2)
    torch.save({"dims": dims, "model_state_dict": model.state_dict()}, tmp_path / "tiny.pt")
    tensors = surgery.open(tmp_path / "tiny.pt")
    assert [found.entry for found in _host().recognise({}, tensors)] == ["whisper"]
    with torch.no_grad():
        _, answers = probe_of("whisper", None, tensors, {})
        for x, (got,) in answers.values():
            same(got, model(x["input_features"], x["decoder_input_ids"]))
        _, answers = probe_of("whisper", "encoder", tensors, {})
        for x, (got,) in answers.values():
            same(got, model.encoder(x["input_features"]))
        _, answers = probe_of("whisper", "decoder", tensors, {})
        for x, (got,) in answers.values():
            logits = model.decoder(x["decoder_input_ids"], x["encoder_hidden_states"])
            same(got @ model.decoder.token_embedding.weight.T, logits)


def test_sizes_that_no_shape_tells() -> None:
    tensors = surgery.open(tiny_speech.fairseq(tiny_speech.made("Wav2Vec2Model", **SPEECH).state_dict()))
    with pytest.raises(zoo.ZooError, match=r"no config\.json"):
        probe_of("wav2vec2", "encoder", tensors, {})
    tensors = surgery.open(tiny_speech.made("WhisperModel", **WHISPER).state_dict())
    with pytest.raises(zoo.ZooError, match=r"no config\.json"):
        probe_of("whisper", "encoder", tensors, {})
