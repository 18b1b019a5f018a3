"""The text plugin against the models that it describes: tiny ones, built from the library's own configurations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import surgery
import zoo

transformers = pytest.importorskip("transformers")

BERT = {
    "vocab_size": 20,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 10,
}
DISTIL = {"vocab_size": 20, "dim": 8, "n_layers": 2, "n_heads": 2, "hidden_dim": 12, "max_position_embeddings": 10}

# class -> entry, layout, the parts it has
MODELS = {
    "BertModel": ("bert", "model", {"embeddings", "encoder", "pooler"}),
    "BertForPreTraining": ("bert", "pretraining", {"embeddings", "encoder", "pooler", "head"}),
    "BertForMaskedLM": ("bert", "pretraining", {"embeddings", "encoder", "head"}),
    "BertForSequenceClassification": ("bert", "pretraining", {"embeddings", "encoder", "pooler", "head"}),
    "RobertaModel": ("roberta", "model", {"embeddings", "encoder", "pooler"}),
    "RobertaForMaskedLM": ("roberta", "pretraining", {"embeddings", "encoder", "head"}),
    "DistilBertModel": ("distilbert", "model", {"embeddings", "encoder"}),
    "DistilBertForMaskedLM": ("distilbert", "pretraining", {"embeddings", "encoder", "head"}),
    "DistilBertForSequenceClassification": ("distilbert", "pretraining", {"embeddings", "encoder", "head"}),
}


def build(name: str) -> tuple[dict[str, object], surgery.Checkpoint]:
    """Configuration and tensors of a tiny model of that class."""
    family = next(family for family in ("DistilBert", "Roberta", "Bert") if name.startswith(family))
    settings: dict[str, Any] = DISTIL if family == "DistilBert" else BERT
    if family == "Roberta":
        settings = {**settings, "type_vocab_size": 1}
    config = getattr(transformers, f"{family}Config")(**settings)
    return config.to_dict(), surgery.open(getattr(transformers, name)(config).state_dict())


@pytest.fixture
def host() -> Iterator[zoo.Host]:
    import zoo_text

    warned: list[str] = []
    yield zoo.Host({"text": zoo_text}, switches="", warn=warned.append)
    assert warned == []


@pytest.mark.parametrize("name", MODELS)
def test_parts_hold_the_tensors_that_they_should(host: zoo.Host, name: str) -> None:
    expected, layout, parts = MODELS[name]
    _, tensors = build(name)
    entry = host.find(expected)
    assert entry.layout_of(tensors) == layout
    held = {}
    for part in entry.parts:
        try:
            held[part.name] = set(entry.tensors_of(part, tensors))
        except zoo.ZooError:
            continue
    assert set(held) == parts
    assert set().union(*held.values()) == set(tensors)
    assert held["embeddings"] < held["encoder"]
    others = [held["encoder"], held.get("pooler", set()), held.get("head", set())]
    assert sum(len(each) for each in others) == len(tensors)


@pytest.mark.parametrize("known", ["config and tensors", "tensors alone"])
@pytest.mark.parametrize("name", MODELS)
def test_recognised(host: zoo.Host, name: str, known: str) -> None:
    config, tensors = build(name)
    found = host.recognise(config if known == "config and tensors" else {}, tensors)
    assert [recognition.entry for recognition in found] == [MODELS[name][0]]
    assert any("model_type" in line for line in found[0].evidence) == (known == "config and tensors")


def test_a_checkpoint_of_2018(host: zoo.Host) -> None:
    """LayerNorm's weight and bias were gamma and beta."""
    _, tensors = build("BertForPreTraining")
    old = tensors.view(
        {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): name
            for name in tensors
        }
    )
    entry = host.find("bert")
    assert "bert.embeddings.LayerNorm.gamma" in entry.tensors_of(entry.part("embeddings"), old)


def test_something_else_is_not_recognised(host: zoo.Host) -> None:
    _, tensors = build("BertModel")
    assert host.recognise({"model_type": "gpt2"}, tensors) == []
    assert host.recognise({}, tensors.view({f"x.{name}": name for name in tensors})) == []


def test_minilm_tries_its_package_first(host: zoo.Host) -> None:
    first, second = host.find("minilm").tags["l6"]
    assert (first.kind, first.sha256["model.safetensors"][:8]) == ("package", "53aa5117")
    assert (second.kind, second.location) == ("hub", "sentence-transformers/all-MiniLM-L6-v2")
