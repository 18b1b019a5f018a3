"""References of the BERT family, part by part, beside what transformers loads by itself from the same folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import surgery
import zoo

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 24,
}
DISTILBERT: dict[str, Any] = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "vocab_size": 40}
DISTILBERT |= {"max_position_embeddings": 24}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SIZES, type_vocab_size=1),
    "distilbert": lambda: transformers.DistilBertConfig(**DISTILBERT),
}
CLASSES = {
    "bert": [
        "BertModel",
        "BertForPreTraining",
        "BertForMaskedLM",
        "BertForNextSentencePrediction",
        "BertForSequenceClassification",
        "BertForTokenClassification",
        "BertForQuestionAnswering",
    ],
    "roberta": [
        "RobertaModel",
        "RobertaForMaskedLM",
        "RobertaForSequenceClassification",
        "RobertaForTokenClassification",
        "RobertaForQuestionAnswering",
    ],
    "distilbert": [
        "DistilBertModel",
        "DistilBertForMaskedLM",
        "DistilBertForSequenceClassification",
        "DistilBertForTokenClassification",
        "DistilBertForQuestionAnswering",
    ],
}
EVERY = [(family, name) for family, names in CLASSES.items() for name in names]


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[str, str], Any]:
    """Save a seeded model as transformers does, and give it back: (model, checkpoint, configuration)."""

    def save(family: str, name: str) -> Any:
        torch.manual_seed(0)
        model = getattr(transformers, name)(CONFIGS[family]())
        with torch.no_grad():
            for parameter in model.parameters():  # so that no bias is zero, and no LayerNorm the identity
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        return model.eval(), surgery.open(tmp_path / "model.safetensors"), config

    return save


def probe_of(family: str, part: str | None, checkpoint: surgery.Checkpoint, config: Mapping[str, Any]) -> zoo.PartProbe:
    from importlib import import_module

    entry = zoo.find(family)
    text = entry.probe if part is None else entry.part(part).probe
    assert text is not None
    if part is not None:
        checkpoint = checkpoint.view(entry.tensors_of(entry.part(part), checkpoint))
    module, _, name = text.partition(":")
    made = getattr(import_module(module), name)(checkpoint, config)
    assert isinstance(made, zoo.PartProbe)
    return made


@pytest.mark.parametrize(("family", "name"), EVERY)
def test_the_whole_is_what_transformers_computes(saved: Callable[..., Any], family: str, name: str) -> None:
    model, checkpoint, config = saved(family, name)
    probe = probe_of(family, None, checkpoint, config)
    for variant in probe.variants:
        x = probe.inputs(7, variant)
        with torch.no_grad():
            expected = model(**x)
            got = dict(zip(probe.outputs, probe.run(probe.reference, x), strict=True))
        compared = [key for key in got if key in expected]
        assert compared
        for key in compared:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", CLASSES)
def test_the_encoder_stands_alone(saved: Callable[..., Any], family: str) -> None:
    model, checkpoint, config = saved(family, CLASSES[family][1])
    probe = probe_of(family, "encoder", checkpoint, config)
    assert probe.outputs == ("last_hidden_state",)
    names = [name for name, _ in probe.reference.named_parameters()]
    assert not [name for name in names if "pooler" in name or "cls" in name or "lm_head" in name]
    x = probe.inputs(3, "padded")
    with torch.no_grad():
        (got,) = probe.run(probe.reference, x)
        expected = getattr(model, model.base_model_prefix)(**x).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_embeddings_and_pooler(saved: Callable[..., Any], family: str) -> None:
    model, checkpoint, config = saved(family, CLASSES[family][0])
    embeddings, pooler = (probe_of(family, part, checkpoint, config) for part in ("embeddings", "pooler"))
    x = embeddings.inputs(0, "plain")
    hidden = pooler.inputs(0, "plain")
    with torch.no_grad():
        (got,) = embeddings.run(embeddings.reference, x)
        x.pop("attention_mask")
        torch.testing.assert_close(got, model.embeddings(**x))
        (got,) = pooler.run(pooler.reference, hidden)
        torch.testing.assert_close(got, model.pooler(hidden["hidden_states"]))
    assert list(dict(pooler.reference.named_parameters())) == ["dense.weight", "dense.bias"]


@pytest.mark.parametrize(
    ("family", "name"), [(f, n) for f, n in EVERY if not n.endswith(("Model", "MaskedLM", "PreTraining"))]
)
def test_heads(saved: Callable[..., Any], family: str, name: str) -> None:
    model, checkpoint, config = saved(family, name)
    probe = probe_of(family, "head", checkpoint, config)
    outputs = probe.run(probe.reference, probe.inputs(0, "plain"))
    assert len(outputs) == len(probe.outputs) >= 1
    held = probe.reference.state_dict()
    own = {key: value for key, value in model.state_dict().items() if not key.startswith(model.base_model_prefix + ".")}
    assert held.keys() == own.keys()
    assert all(torch.equal(held[key], own[key]) for key in own)


def test_a_tied_head_needs_the_embeddings(saved: Callable[..., Any]) -> None:
    _, checkpoint, config = saved("bert", "BertForMaskedLM")
    with pytest.raises(zoo.ZooError, match=r"lacks cls\.predictions\.decoder\.weight") as caught:
        probe_of("bert", "head", checkpoint, config)
    assert caught.value.status == 2


def test_ties_are_ties(saved: Callable[..., Any]) -> None:
    _, checkpoint, config = saved("bert", "BertForMaskedLM")
    reference = probe_of("bert", None, checkpoint, config).reference
    decoder = reference.get_parameter("cls.predictions.decoder.weight")
    assert decoder is reference.get_parameter("bert.embeddings.word_embeddings.weight")


def test_names_of_old(saved: Callable[..., Any], tmp_path: Path) -> None:
    """gamma and beta, and the buffer of positions, as files of before 2020 have them."""
    model, _, config = saved("bert", "BertModel")
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    renamed["embeddings.position_ids"] = torch.arange(24)[None]
    save_file(renamed, tmp_path / "old.safetensors")
    probe = probe_of("bert", "encoder", surgery.open(tmp_path / "old.safetensors"), config)
    x = probe.inputs(1, "plain")
    with torch.no_grad():
        torch.testing.assert_close(probe.run(probe.reference, x)[0], model(**x).last_hidden_state)


def test_a_tensor_without_a_place_is_an_error(saved: Callable[..., Any], tmp_path: Path) -> None:
    """An adapter, or positions that are not counted up: another model, of which nothing could be said."""
    _, _, config = saved("bert", "BertModel")
    tensors = load_file(tmp_path / "model.safetensors")
    for name, tensor in {
        "encoder.layer.0.adapter.weight": torch.ones(2),
        "embeddings.position_ids": torch.arange(24).flip(0)[None],
    }.items():
        save_file({**tensors, name: tensor}, tmp_path / "odd.safetensors")
        with pytest.raises(zoo.ZooError, match="has no place"):
            probe_of("bert", "encoder", surgery.open(tmp_path / "odd.safetensors"), config)


def test_a_missing_tensor_or_configuration_is_an_error(saved: Callable[..., Any]) -> None:
    _, checkpoint, config = saved("bert", "BertModel")
    less = checkpoint.view([name for name in checkpoint if name != "encoder.layer.1.output.dense.bias"])
    with pytest.raises(zoo.ZooError, match=r"lacks encoder\.layer\.1\.output\.dense\.bias"):
        probe_of("bert", "encoder", less, config)
    with pytest.raises(zoo.ZooError, match=r"no config\.json"):
        probe_of("bert", "encoder", checkpoint, {})
    with pytest.raises(zoo.ZooError, match="has shape"):
        probe_of("bert", "encoder", checkpoint, {**config, "intermediate_size": 64})


@pytest.mark.parametrize("family", CLASSES)
def test_inputs(saved: Callable[..., Any], family: str) -> None:
    _, checkpoint, config = saved(family, CLASSES[family][0])
    inputs = probe_of(family, "encoder", checkpoint, config).inputs
    plain, padded, shortest, longest = (inputs(1, v) for v in ("plain", "padded", "shortest", "longest"))
    assert {0, 39} <= set(plain["input_ids"].unique().tolist())
    assert padded["attention_mask"].sum(1).tolist() == [12, 7]
    assert shortest["input_ids"].shape == (1, 1)
    assert longest["input_ids"].shape == (1, 22 if family == "roberta" else 24)
    if family == "roberta":
        # Its positions are counted by tokens that are not padding: the mask alone says what is hidden.
        assert all(1 not in x["input_ids"] for x in (plain, padded, shortest, longest))
    again = inputs(1, "plain")
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    assert not torch.equal(inputs(2, "plain")["input_ids"], plain["input_ids"])


def test_random_numbers_are_left_alone(saved: Callable[..., Any]) -> None:
    _, checkpoint, config = saved("bert", "BertModel")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    probe_of("bert", None, checkpoint, config).inputs(0, "plain")
    assert torch.equal(torch.rand(1), expected)
