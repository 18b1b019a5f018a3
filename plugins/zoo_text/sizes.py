"""The sizes of a text model that a target may have otherwise: its vocabulary and its learned positions.

A larger vocabulary keeps the old rows, by number, and draws the new ones by the published rule. Longer positions keep
the old rows and repeat them, so that short inputs compute the same; fewer are cut. A smaller vocabulary is never
guessed: its tokens are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from zoo import Body, Resized, Sizes, Table

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Checkpoint

Value = int | tuple[int, ...]
_VOCABULARY, _POSITIONS = "vocabulary", "positions"
_WORDS = {
    _VOCABULARY: ("word", "token", "tok", "vocab", "wte", "shared", "embed_tokens"),
    _POSITIONS: ("pos", "place", "wpe", "where"),
}


def bert(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """BERT, MiniLM, DistilBERT."""
    return _sizes(checkpoint, config, "word_embeddings.weight", "position_embeddings.weight", "max_position_embeddings")


def roberta(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """Positions begin behind the padding token's: two rows of the table come before the first."""
    spare = int(config.get("pad_token_id", 1)) + 1
    return _sizes(
        checkpoint, config, "word_embeddings.weight", "position_embeddings.weight", "max_position_embeddings", spare
    )


def gpt2(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """The head is the table of tokens, and grows with it."""
    return _sizes(checkpoint, config, "wte.weight", "wpe.weight", "n_positions")


def t5(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """Positions are relative, and fit any length."""
    return _sizes(checkpoint, config, ("shared.weight", "embed_tokens.weight"), "", "")


def _sizes(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    word: str | tuple[str, ...],
    place: str,
    places_key: str,
    spare: int = 0,
) -> Sizes | None:
    words = [name for name in checkpoint if name.endswith(word)]
    if not words:
        return None
    place_names = [name for name in checkpoint if place and name.endswith(place)]
    vocabulary, width = checkpoint[words[0]].shape
    tables = [Table(_VOCABULARY, vocabulary, _WORDS[_VOCABULARY], grows_only=True)]
    values: dict[str, Value] = {_VOCABULARY: vocabulary}
    if place_names:
        rows = checkpoint[place_names[0]].shape[0]
        values[_POSITIONS] = rows - spare
        tables.append(Table(_POSITIONS, rows, _WORDS[_POSITIONS], spare))
    types = [name for name in checkpoint if name.endswith("token_type_embeddings.weight")]
    words_for = ("type", "segment", "kind")
    tables += [Table("token types", checkpoint[name].shape[0], words_for, fixed=True) for name in types[:1]]

    def wanted(body: Body) -> Iterable[Mapping[str, Value]]:
        for found in body.lengths(tables, width):
            yield {**values, **found}

    def resized(sizes: Mapping[str, Value]) -> Resized:
        rows: dict[str, str] = {}
        changed = dict(config)
        to = int(sizes[_VOCABULARY])  # type: ignore[arg-type]
        if to != vocabulary:
            changed["vocab_size"] = to
            for name in checkpoint:
                if name in words or name.endswith(("lm_head.weight", "decoder.weight", "vocab_projector.weight")):
                    rows[name] = f"vocab_resize({name}, to={to}, seed=0)"
                elif name.endswith(("predictions.bias", "decoder.bias", "lm_head.bias", "vocab_projector.bias")):
                    rows[name] = f"cat({name}, zeros(shape=({to - vocabulary},)), axis=0)"
        if place_names and sizes[_POSITIONS] != values[_POSITIONS]:
            places = int(sizes[_POSITIONS])  # type: ignore[arg-type]
            changed[places_key] = places + spare
            rows |= {name: _places(name, int(checkpoint[name].shape[0]), places + spare, spare) for name in place_names}
        known = min(vocabulary, to)
        longest = min(int(values.get(_POSITIONS, 64)), int(sizes.get(_POSITIONS, 64)))  # type: ignore[arg-type]
        return Resized(rows, changed, _alike(known, longest))

    return Sizes(values, wanted, resized)


def _places(name: str, have: int, to: int, spare: int) -> str:
    if to > have:
        return f"extend_pos_embed_tile({name}, to={to}, offset={spare})"
    return f"slice({name}, axis=0, start=0, stop={to})"


def _alike(vocabulary: int, longest: int) -> Callable[[int], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The same tokens, of the old vocabulary, in the old length."""

    def alike(seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        import torch

        draw = torch.Generator().manual_seed(seed)
        ids = torch.randint(2, vocabulary, (2, min(longest, 12)), generator=draw)
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return x, x

    return alike
