"""References of the three families, part by part: which library runs a checkpoint is told by how it is spelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import PartProbe

if TYPE_CHECKING:
    from surgery import Checkpoint

# Each gives the embedding before it is normalised: [N, E] of token ids [N, L], or of images [N, 3, S, S]. A whole model
# gives both, and the logits [images, texts].


def _of(family: str, checkpoint: Checkpoint) -> Any:
    """Who runs it: transformers where it is spelled as transformers does, else open_clip; the other may be missing."""
    if any(name.startswith(("text_model.", "vision_model.")) for name in checkpoint):
        return _transformed(family)
    from zoo_clip import openclip

    return openclip


def _transformed(family: str) -> Any:
    from zoo_clip import transformed

    return getattr(transformed, family)


def clip_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of("CLIP", checkpoint).text(checkpoint, config)


def clip_vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of("CLIP", checkpoint).vision(checkpoint, config)


def clip_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of("CLIP", checkpoint).whole(checkpoint, config)


def siglip_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of("SIGLIP", checkpoint).text(checkpoint, config)


def siglip_vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of("SIGLIP", checkpoint).vision(checkpoint, config)


def siglip_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of("SIGLIP", checkpoint).whole(checkpoint, config)


def align_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _transformed("ALIGN").text(checkpoint, config)


def align_vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _transformed("ALIGN").vision(checkpoint, config)


def align_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _transformed("ALIGN").whole(checkpoint, config)
