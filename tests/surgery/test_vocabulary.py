"""From tokenizer to tokenizer by token, from labels to labels by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from open_clip.tokenizer import SimpleTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from surgery.errors import PlanError
from surgery.expr import call, evaluate
from surgery.ops.vocabulary import NEW
from surgery.vocabulary import label_map, token_map

BERT = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "##s", "##ing", ","]
BYTES = ["<|endoftext|>", "Ġthe", "s", "Ġcat", "Ġdog", ",", "ing", "Ċ", "Ã©"]
PIECES = ["<unk>", "<s>", "</s>", "<0x0A>", "▁the", "▁cat", "s", "é", ","]


def test_tokens_of_one_family_go_by_their_string() -> None:
    found = token_map(["[PAD]", "[CLS]", "a", "##b", "c"], ["[CLS]", "[PAD]", "c", "d", "##b"])
    assert found.old == (1, 0, 4, NEW, 3)
    assert found.rows == "1 0 4 +1 3"
    assert (found.copied, found.made, found.by_role) == (4, 1, 0)
    assert str(found) == "5 tokens: 4 copied, 1 made"
    table = torch.randn(5, 3)
    mapped = evaluate(call("vocab_map", "w", rows=found.rows), lambda _: table)
    assert torch.equal(mapped[[0, 1, 2, 4]], table[[1, 0, 4, 3]])


def test_tokens_of_other_families_go_by_their_text_and_special_ones_by_their_role() -> None:
    found = token_map(BERT, PIECES)
    at = dict(zip(PIECES, found.old, strict=True))
    assert at == {
        "<unk>": 1,
        "<s>": 2,  # [CLS] opens a text
        "</s>": 3,  # [SEP] closes it
        "<0x0A>": NEW,
        "▁the": 5,
        "▁cat": 6,
        "s": 7,
        "é": NEW,
        ",": 9,
    }
    assert found.by_role == 3
    assert "3 of them by role" in str(found)
    at = dict(zip(PIECES, token_map(BYTES, PIECES).old, strict=True))
    assert at == {"<unk>": NEW, "<s>": NEW, "</s>": 0, "<0x0A>": 7, "▁the": 1, "▁cat": 3, "s": 2, "é": 8, ",": 5}


def test_whole_words_without_a_mark_are_words() -> None:
    """As a tokenizer of whole words has them; and a WordPiece that cut none."""
    words = ["[UNK]", "the", "cat", "mat", ","]
    assert token_map(words, BYTES).old == (NEW, 1, NEW, 2, NEW, 4, NEW, NEW, NEW)
    assert token_map(BYTES, words).old == (NEW, 1, 3, NEW, 5)
    assert token_map(PIECES, words).old == (0, 4, 5, NEW, 8)
    assert token_map(BERT, words).old == (1, 5, 6, NEW, 9)


def test_clips_own_vocabulary_is_met() -> None:
    clip = SimpleTokenizer().encoder
    same = token_map(clip, clip)
    assert same.rows == f"0:{len(clip)}"
    at = dict(zip(PIECES, token_map(clip, PIECES).old, strict=True))
    assert at["▁the"] == clip["the</w>"]
    assert at["▁cat"] == clip["cat</w>"]
    assert at["<s>"] == clip["<start_of_text>"]
    assert at[","] == clip[",</w>"]
    assert at["s"] == clip["s"]


def test_a_tokenizer_says_its_roles_itself() -> None:
    def made(tokens: list[str], **roles: str) -> PreTrainedTokenizerFast:
        core = Tokenizer(models.WordLevel({token: at for at, token in enumerate(tokens)}, unk_token=roles["unk_token"]))
        return PreTrainedTokenizerFast(tokenizer_object=core, **roles)

    old = made(["stuff", "nothing", "a", "b"], pad_token="stuff", unk_token="nothing")
    new = made(["b", "<pad>", "<unk>", "c"], pad_token="<pad>", unk_token="<unk>")
    assert token_map(old, new).old == (3, 0, 1, NEW)
    core = Tokenizer(models.BPE({token: at for at, token in enumerate(BYTES)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    assert token_map(core, PIECES) == token_map(BYTES, PIECES)


def test_vocabularies_are_read_from_their_files(tmp_path: Path) -> None:
    wanted = token_map(BERT, PIECES).old
    lines = tmp_path / "vocab.txt"
    lines.write_text("\n".join(BERT) + "\n", encoding="utf-8")
    assert token_map(lines, PIECES).old == wanted
    assert token_map(str(tmp_path), PIECES).old == wanted
    table = tmp_path / "vocab.json"
    table.write_text(json.dumps({token: at for at, token in enumerate(BERT)}), encoding="utf-8")
    assert token_map(table, PIECES).old == wanted
    core = Tokenizer(models.Unigram([(token, -float(at)) for at, token in enumerate(PIECES)], unk_id=0))
    core.add_special_tokens(["<pad>"])
    core.save(str(tmp_path / "tokenizer.json"))
    assert token_map(BERT, tmp_path / "tokenizer.json").old == (*wanted, 0)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"cls_token": {"content": "▁cat"}}), encoding="utf-8")
    assert token_map(tmp_path, ["[CLS]", "[X]"]).old == (5, NEW)


def test_padded_tables_and_files_that_are_none_are_met_in_words(tmp_path: Path) -> None:
    assert token_map(["a", "b", "c"], ["c", "a"], old_size=2, new_size=4).old == (NEW, 0, NEW, NEW)
    with pytest.raises(PlanError, match="a table of 1 rows does not hold the 2 ids"):
        token_map(["a"], ["a", "b"], new_size=1)
    with pytest.raises(PlanError, match="holds none of tokenizer.json, vocab.json, vocab.txt"):
        token_map(tmp_path, ["a"])
    (tmp_path / "a.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(PlanError, match="holds no vocabulary"):
        token_map(tmp_path / "a.json", ["a"])
    (tmp_path / "b.json").write_text("{", encoding="utf-8")
    with pytest.raises(PlanError, match="does not read as JSON"):
        token_map(tmp_path / "b.json", ["a"])
    with pytest.raises(PlanError, match="does not read as a vocabulary"):
        token_map(tmp_path / "none.txt", ["a"])


def test_labels_go_by_name() -> None:
    found = label_map({0: "cat", 1: "Golden Retriever", 2: "bird"}, {"0": "bird", "1": "golden_retriever", "2": "fish"})
    assert found.index == (2, 1, NEW)
    assert found.dropped == ("cat",)
    assert str(found) == "3 labels: 2 kept, 1 new"
    head = torch.randn(3, 4)
    mapped = evaluate(call("label_remap", "w", index=found.index), lambda _: head)
    assert torch.equal(mapped, torch.stack((head[2], head[1], torch.zeros(4))))


def test_labels_of_one_name_keep_their_order_or_are_refused() -> None:
    assert label_map(["crane", "cat", "crane"], ["crane", "crane"]).index == (0, 2)
    assert label_map(["Crane", "crane"], ["crane", "Crane"]).index == (1, 0)
    with pytest.raises(PlanError, match='"crane" stands 2 times among the old labels and 1 times'):
        label_map(["crane", "crane"], ["crane"])
    with pytest.raises(PlanError, match="the new labels are placeholders, LABEL_0"):
        label_map(["cat"], {0: "LABEL_0", 1: "LABEL_1"})
    with pytest.raises(PlanError, match="the ids of the old labels do not count from 0"):
        label_map({1: "cat"}, ["cat"])
