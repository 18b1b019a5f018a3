"""The sizes of Whisper that a target may have otherwise: frames, the length of a text, the vocabulary.

The positions of frames follow a formula, which more of them follow too. Those of tokens are learned: the old ones stay
and are repeated, or cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Sizes, Table, tables

if TYPE_CHECKING:
    from torch import Tensor

    from surgery import Checkpoint

_FRAMES, _TEXT, _VOCABULARY = "frames", "text positions", "vocabulary"
_WAVES = "resize_sinusoids({name}, to={to})"


def whisper(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """In the names of transformers and in OpenAI's own."""
    found: list[Table] = []

    def add(size: str, end: str, words: tuple[str, ...], key: str, more: str, fewer: str = "") -> None:
        names = tuple(name for name in checkpoint if name.endswith(end))
        if names:
            own = (key,) if config else ()
            found.append(
                Table(size, checkpoint[names[0]].shape[0], words, names=names, key=own, more=more, fewer=fewer)
            )

    places = ("pos", "place", "where")
    for frames, text, words in (
        ("encoder.embed_positions.weight", "decoder.embed_positions.weight", "decoder.embed_tokens.weight"),
        ("encoder.positional_embedding", "decoder.positional_embedding", "decoder.token_embedding.weight"),
    ):
        add(_FRAMES, frames, places, "max_source_positions", _WAVES, Table.CUT)
        add(_TEXT, text, places, "max_target_positions", Table.TILED, Table.CUT)
        add(_VOCABULARY, words, ("tok", "word", "vocab"), "vocab_size", Table.DRAWN)
    if not found:
        return None
    mels = next((checkpoint[name].shape[1] for name in checkpoint if name.endswith("encoder.conv1.weight")), 80)

    def alike(before: Mapping[str, int], after: Mapping[str, int]) -> Any:
        if before.get(_FRAMES) != after.get(_FRAMES):
            return None  # of fewer or more frames nothing is the same
        least = {size: min(length, after[size]) for size, length in before.items()}
        return lambda seed: _same(seed, least, mels)

    return tables(checkpoint[found[0].names[0]].shape[-1], found, alike)


def _same(seed: int, least: Mapping[str, int], mels: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    import torch

    draw = torch.Generator().manual_seed(seed)
    x: dict[str, Tensor] = {}
    if _FRAMES in least:
        x["input_features"] = torch.randn(1, mels, 2 * least[_FRAMES], generator=draw)
    if _TEXT in least:
        x["decoder_input_ids"] = torch.randint(0, least.get(_VOCABULARY, 8), (1, min(8, least[_TEXT])), generator=draw)
    return x, x
