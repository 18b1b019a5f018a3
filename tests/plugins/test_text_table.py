"""Every family of the text plugin, end to end on a tiny checkpoint in the published layout, from the loopback hub."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import surgery
import zoo
from tests.hub_server import HubServer

transformers = pytest.importorskip("transformers")

BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 40}


def shaken(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=24, vocab_size=40)
    return transformers.GPT2Model(config)  # OpenAI's weights are published as the body alone


def t5(**more: Any) -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 2, "vocab_size": 40}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **more))


def roberta() -> nn.Module:
    config = transformers.RobertaConfig(**BODY, max_position_embeddings=26, type_vocab_size=1, layer_norm_eps=1e-5)
    return transformers.RobertaForMaskedLM(config)


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "gpt2": (gpt2, "openai-community/gpt2"),
    "t5": (t5, "google-t5/t5-small"),
    "roberta": (roberta, "FacebookAI/roberta-base"),
}
# reference, file, class, sizes
EXAMPLES = [
    ("gpt2-decoder", "my_gpt2", "Scored", {"words": 40, "longest": 24, "width": 16, "heads": 4, "depth": 2}),
    (
        "t5",
        "my_t5",
        "Headlines",
        {"words": 40, "width": 16, "heads": 4, "head_width": 4, "feed": 32, "depth": 2},
    ),
    ("roberta-encoder", "my_roberta", "Tagger", {"words": 40, "longest": 24, "width": 16, "heads": 4, "depth": 2}),
]


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> Callable[[str], nn.Module]:
    def publish(name: str) -> nn.Module:
        make, repository = MODELS[name]
        model = shaken(make())
        folder = tmp_path / name
        model.save_pretrained(folder)
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
        if name == "gpt2":  # the published files hold the causal masks of old releases as well
            from safetensors.torch import load, save

            tensors = load(files["model.safetensors"])
            for i in range(2):
                tensors[f"h.{i}.attn.bias"] = torch.tril(torch.ones(24, 24))[None, None]
            files["model.safetensors"] = save(tensors)
        hub.add(repository, files)
        return model

    return publish


def own(root: Path, file: str, name: str, sizes: dict[str, Any]) -> nn.Module:
    spec = importlib.util.spec_from_file_location(file, root / "examples" / f"{file}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.manual_seed(3)
    return getattr(module, name)(**sizes)


@pytest.mark.parametrize("name", MODELS)
def test_pulled_and_recognised(published: Callable[[str], nn.Module], tmp_path: Path, name: str) -> None:
    published(name)
    path = zoo.pull(name)
    opened = surgery.open(path)
    entry = zoo.find(name)
    assert entry.layout_of(opened)
    from zoo.api import host

    for config in (json.loads((path.parent / "config.json").read_text()), {}):
        (found,) = host().recognise(config, opened)
        assert found.entry == name


@pytest.mark.parametrize("name", MODELS)
def test_the_whole_and_the_parts_are_what_transformers_computes(
    published: Callable[[str], nn.Module], name: str
) -> None:
    from zoo.resolving import resolve

    model = published(name)
    probe = resolve(name).reference()
    assert probe is not None
    for variant in probe.variants:
        x = probe.inputs(5, variant)
        with torch.no_grad():
            expected = model(**x)
            got = dict(zip(probe.outputs, probe.run(probe.reference, x), strict=True))
        shared = [key for key in got if key in expected]
        assert shared
        for key in shared:
            torch.testing.assert_close(got[key], expected[key], rtol=1e-5, atol=1e-5)
    for part in zoo.find(name).parts:
        try:
            made = resolve(name, part=part.name).reference()
        except zoo.ZooError as error:
            assert "no tensor of its part" in str(error) or "lacks" in str(error) or "no Roberta" in str(error)
            continue
        assert made is not None
        for variant in made.variants:
            outputs = made.run(made.reference, made.inputs(1, variant))
            assert len(outputs) == len(made.outputs)


@pytest.mark.parametrize(("ref", "file", "name", "sizes"), EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_grafted_into_an_own_module(
    published: Callable[[str], nn.Module], root: Path, ref: str, file: str, name: str, sizes: dict[str, Any]
) -> None:
    published(ref.partition("-")[0])
    model = own(root, file, name, sizes)
    report = zoo.graft(ref, model, require="proven")
    assert str(report.verdict) == "proven"
    new = [row.name for row in report.rows if str(row.status) == "new"]
    assert new
    assert all(each.startswith(("score", "topic", "tags")) for each in new)


def test_a_head_of_its_own(hub: HubServer, tmp_path: Path) -> None:
    """T5 1.1 and FLAN: a gated feed-forward, and a head that is not the table of words."""
    model = t5(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight = nn.Parameter(torch.randn(40, 16))
    shaken(model)
    model.save_pretrained(tmp_path / "flan")
    hub.add("google/flan-t5-small", {path.name: path.read_bytes() for path in (tmp_path / "flan").iterdir()})
    from zoo.resolving import resolve

    probe = resolve("t5.flan-small").reference()
    assert probe is not None
    x = probe.inputs(2, "padded")
    with torch.no_grad():
        torch.testing.assert_close(probe.run(probe.reference, x)[-1], model(**x).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt-4", "gpt-4o", "gpt-4v"])
def test_closed_models_say_so(name: str) -> None:
    with pytest.raises(zoo.ZooError, match="no weights are public") as caught:
        zoo.pull(name)
    assert caught.value.status == 1
