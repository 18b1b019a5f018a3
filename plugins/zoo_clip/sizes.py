"""The sizes of two towers that a target may have otherwise: image, patch and channels; context and vocabulary.

Longer contexts keep the old positions and repeat them, fewer are cut; open_clip's own rule, linear interpolation, is a
line among a person's rules: resize("*positional_embedding", "resize_pos_embed_1d", to=...).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import Pictures, Sizes, Table, joined, tables

if TYPE_CHECKING:
    from surgery import Checkpoint

Pair = tuple[int, int]
_WORDS = ("word", "tok", "vocab")
_PLACES = ("pos", "place", "where")


def sizes(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    """CLIP and SigLIP, in the names of open_clip and of transformers."""
    vision = _vision(checkpoint, config)
    return joined(_text(checkpoint, config), vision.sizes() if vision is not None else None)


def _first(checkpoint: Checkpoint, *ends: str, never: str = "?") -> str:
    return next((name for end in ends for name in checkpoint if name.endswith(end) and never not in name), "")


def _text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Sizes | None:
    words = _first(checkpoint, "token_embedding.weight")
    ends = ("text_model.embeddings.position_embedding.weight", "positional_embedding")
    places = _first(checkpoint, *ends, never="visual.")
    if not words or not places:
        return None
    at, length = ("text_config",), "max_position_embeddings"
    if "model_cfg" in config:
        at, length = ("model_cfg", "text_cfg"), "context_length"  # type: ignore[assignment]
    vocabulary, width = checkpoint[words].shape
    rows = checkpoint[places].shape[0]
    counts = tuple(name for name in checkpoint if name.endswith("text_model.embeddings.position_ids"))
    found = [
        Table("vocabulary", vocabulary, _WORDS, names=(words,), key=(*at, "vocab_size"), more=Table.DRAWN),
        Table(
            "context",
            rows,
            _PLACES,
            names=(places,),
            counts=counts,
            key=(*at, length),
            more=Table.TILED,
            fewer=Table.CUT,
        ),
    ]
    # CLIP pools at the token of the greatest number, which is the last of the vocabulary: nothing shows the same.
    return tables(width, found, lambda *_: None)


def _vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> Pictures | None:
    patches = ("visual.conv1.weight", "visual.trunk.patch_embed.proj.weight", "embeddings.patch_embedding.weight")
    ends = (
        "visual.positional_embedding",
        "visual.trunk.pos_embed",
        "vision_model.embeddings.position_embedding.weight",
    )
    stem, places = _first(checkpoint, *patches), _first(checkpoint, *ends)
    if not stem or not places:
        return None
    at: tuple[str, ...] = ("model_cfg", "vision_cfg") if "model_cfg" in config else ("vision_config",)
    own: Any = config
    for key in at:
        own = (own.get(key) if isinstance(own, Mapping) else None) or {}
    _, channels, rows, columns = checkpoint[stem].shape
    tokens = checkpoint[places].shape[-2]
    image = own.get("image_size", math.isqrt(tokens) * rows)  # OpenAI's files have no configuration
    side: Pair = (image, image) if isinstance(image, int) else (image[0], image[1])
    prefix = tokens - (side[0] // rows) * (side[1] // columns)
    if not 0 <= prefix <= 2:
        return None
    ours = at == ("vision_config",)

    def configured(image: Pair, patch: Pair, channels: int, window: int) -> Mapping[tuple[str, ...], Any]:
        changed: dict[tuple[str, ...], Any] = {
            (*at, "image_size"): image[0] if image[0] == image[1] else list(image),
            (*at, "patch_size"): patch[0],
        }
        if ours:
            changed[*at, "num_channels"] = channels
        return changed if config else {}

    return Pictures(
        checkpoint,
        image=side,
        patch=(rows, columns),
        channels=channels,
        configured=configured,
        stem=(stem,),
        positions=places,
        prefix=prefix,
        square=not config or ours,
        patches="trunk." not in stem,
        any_channels=ours,
        counts=tuple(name for name in checkpoint if name.endswith("vision_model.embeddings.position_ids")),
    )
