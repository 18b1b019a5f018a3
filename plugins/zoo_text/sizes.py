"""The sizes of a text model that a target may have otherwise: its vocabulary, its learned positions, its classes.

A larger vocabulary keeps the old rows, by number, and draws the new ones by the published rule. Longer positions keep
the old rows and repeat them, so that short inputs compute the same; fewer are cut. A smaller vocabulary is never
guessed: its tokens are others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Sizes, Table, joined, labelled, tables

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Checkpoint

_WORDS = ("word", "token", "tok", "vocab", "wte", "shared")
_CLASSIFIERS = ("classifier.weight", "classifier.bias", "classifier.out_proj.weight", "classifier.out_proj.bias")
_PLACES = ("pos", "place", "wpe", "where")
_HEADS = ("lm_head.weight", "predictions.decoder.weight", "vocab_projector.weight")
_HEAD_BIASES = (
    *("predictions.bias", "predictions.decoder.bias", "lm_head.bias", "lm_head.decoder.bias"),
    "vocab_projector.bias",
)
# Buffers that older releases of transformers saved.
_COUNTS = ("embeddings.position_ids", "embeddings.token_type_ids", ".attn.bias", ".attn.masked_bias")


def bert(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """BERT, MiniLM, DistilBERT."""
    found = _sizes(checkpoint, "word_embeddings.weight", "position_embeddings.weight", "max_position_embeddings")
    return joined(found, _classes(checkpoint, config))


def roberta(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """Positions begin behind the padding token's: two rows of the table come before the first."""
    spare = int(config.get("pad_token_id", 1)) + 1
    ends = ("word_embeddings.weight", "position_embeddings.weight", "max_position_embeddings")
    return joined(_sizes(checkpoint, *ends, spare), _classes(checkpoint, config))


def gpt2(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """The head is the table of tokens, and grows with it."""
    return _sizes(checkpoint, "wte.weight", "wpe.weight", "n_positions")


def t5(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """Positions are relative, and fit any length."""
    return _sizes(checkpoint, ("shared.weight", "embed_tokens.weight"))


def _sizes(
    checkpoint: Checkpoint, word: str | tuple[str, ...], place: str = "", places_key: str = "", spare: int = 0
) -> Sizes | None:
    words = [name for name in checkpoint if name.endswith(word)]
    if not words:
        return None
    vocabulary, width = checkpoint[words[0]].shape
    words += [name for name in checkpoint if name.endswith(_HEADS) and checkpoint[name].shape[0] == vocabulary]
    # The bias of a new token is zero: it says nothing about it.
    biases = tuple(name for name in checkpoint if name.endswith(_HEAD_BIASES))
    key = ("vocab_size",)
    found = [Table("vocabulary", vocabulary, _WORDS, names=tuple(words), biases=biases, key=key, more=Table.DRAWN)]
    places = tuple(name for name in checkpoint if place and name.endswith(place))
    if places:
        rows = checkpoint[places[0]].shape[0]
        counts = tuple(name for name in checkpoint if name.endswith(_COUNTS))
        positions = Table(
            "positions",
            rows,
            _PLACES,
            spare,
            names=places,
            counts=counts,
            key=(places_key,),
            more=Table.TILED,
            fewer=Table.CUT,
        )
        found.append(positions)
    types = [name for name in checkpoint if name.endswith("token_type_embeddings.weight")]
    found += [Table("token types", checkpoint[name].shape[0], ("type", "segment", "kind")) for name in types[:1]]
    return tables(width, found, _alike)


def _classes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """Rows of a classifier by the names of its classes; names that only count say nothing."""
    given = config.get("id2label") or {}
    names = [str(given[key]) for key in sorted(given, key=int)]
    heads = tuple(
        name
        for name in checkpoint
        if name.endswith(_CLASSIFIERS) and len(names) == checkpoint[name].shape[0] and "pre_classifier" not in name
    )
    if all(re.fullmatch(r"LABEL_\d+", name) for name in names):
        return None
    return labelled([names], heads, lambda theirs: {("id2label",): dict(enumerate(theirs)), ("label2id",): None})


def _alike(before: Mapping[str, int], after: Mapping[str, int]) -> Any:
    """The same tokens, of both vocabularies, in a length of both."""
    least = {size: min(length, after[size]) for size, length in before.items()}

    def alike(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        import torch

        draw = torch.Generator().manual_seed(seed)
        shape = (2, min(least.get("positions", 12), 12))
        ids = torch.randint(2, least["vocabulary"], shape, generator=draw)
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return x, x

    return alike
