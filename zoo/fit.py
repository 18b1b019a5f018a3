"""What people call the sizes of a model: words for the same thing, as data, to take arguments from a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Each line: one thing, in the words of configurations and of people. Heads and classes of a person's own are no size
# of the pretrained part, and are in no line.
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("hidden_size", "hidden", "hidden_dim", "d_model", "dim", "width", "embed_dim", "n_embd", "model_dim", "emb"),
    ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "layers", "depth", "blocks", "n_blocks", "num_blocks"),
    ("num_attention_heads", "num_heads", "n_heads", "n_head", "heads", "nhead", "attention_heads"),
    ("vocab_size", "vocab", "n_vocab", "vocabulary", "num_embeddings", "num_tokens", "n_tokens"),
    (
        "intermediate_size",
        "ffn",
        "ffn_dim",
        "d_ff",
        "dff",
        "inner",
        "mlp_dim",
        "hidden_ff",
        "dim_feedforward",
        "n_inner",
    ),
    (
        "max_position_embeddings",
        "max_positions",
        "positions",
        "n_positions",
        "max_len",
        "max_length",
        "max_seq_len",
        "longest",
        "context",
        "block_size",
        "seq_len",
        "maxlen",
    ),
    ("type_vocab_size", "types", "n_types", "num_types", "token_types", "segments", "n_segments"),
    ("layer_norm_eps", "layer_norm_epsilon", "eps", "norm_eps", "ln_eps", "epsilon"),
    ("pad_token_id", "pad", "pad_id", "padding_idx", "pad_idx"),
    ("hidden_dropout_prob", "dropout", "drop", "p_drop", "dropout_rate"),
    ("hidden_act", "activation", "activation_function", "act", "act_fn"),
    ("patch_size", "patch"),
    ("image_size", "img_size", "resolution"),
    ("num_channels", "in_chans", "in_channels", "channels"),
)
# "hidden_dim" is the model's width in most configurations and the feed-forward's in a few; those say "dim" for the
# width. A configuration that has the more telling word is believed.
_OTHERWISE = {"hidden_dim": ("intermediate_size", "dim")}


class Taken(NamedTuple):
    """An argument found in a configuration: its value, and the key it stood under."""

    value: Any
    key: str


def _line(word: str) -> tuple[str, ...]:
    for words in SYNONYMS:
        if word in words:
            return words
    return (word,)


def _meaning(key: str, config: Mapping[str, Any]) -> str:
    """The first word of the line that a configuration's key is in."""
    if key in _OTHERWISE and _OTHERWISE[key][1] in config:
        return _OTHERWISE[key][0]
    return _line(key)[0]


def from_config(name: str, config: Mapping[str, Any]) -> Taken | None:
    """The value of an argument, by its own name or by another word for it; None where the configuration has none."""
    values = {key: value for key, value in config.items() if isinstance(value, (int, float, str))}
    word = name.lower()
    if word in values:
        return Taken(values[word], word)
    meaning = _line(word)[0]
    if meaning == word and word not in (words[0] for words in SYNONYMS):
        return None
    found = [key for key in values if _meaning(key, values) == meaning]
    found.sort(key=lambda key: (key != meaning, _line(key).index(key) if key in _line(key) else 0))
    return Taken(values[found[0]], found[0]) if found else None
