"""Tokenizers of several kinds over one small language, trained by the tokenizers library; and models that lie beside
them, made by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

# Two parts of one language: a model that saw the first does not know all words of the second.
COMMON = ["the cat sat on the mat", "a dog ran in the park", "the sun rose over the hill", "rain fell on the house"]
RARE = [
    "myocardial infarction of the heart",
    "the patient has tachycardia",
    "infarction and tachycardia of the patient",
]


def trained(kind: str, texts: list[str], size: int) -> Any:
    """A tokenizer: "wordpiece" as BERT's, "bytes" as GPT-2's, "unigram" as T5's, "words" of whole words."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    if kind == "wordpiece":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        trainer: Any = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, min_frequency=1)
    elif kind == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        made.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"], min_frequency=1)
    elif kind == "unigram":
        made = Tokenizer(models.Unigram())
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>")
    else:
        made = Tokenizer(models.WordLevel(unk_token="[UNK]"))
        made.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.WordLevelTrainer(vocab_size=size, special_tokens=special)
    made.train_from_iterator(texts, trainer)
    return made


def saved(model: nn.Module, tokenizer: Any, folder: Path) -> Path:
    """A model as transformers saves it, its tokenizer beside it, and no two rows of weights alike."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
