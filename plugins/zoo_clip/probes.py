"""References of the three families, part by part: which library runs a checkpoint is told by how it is spelled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zoo import PartProbe
from zoo_clip import openclip
from zoo_clip.transformed import ALIGN, CLIP, SIGLIP, Family

if TYPE_CHECKING:
    from surgery import Checkpoint

# Each gives the embedding before it is normalised: [N, E] of token ids [N, L], or of images [N, 3, S, S]. A whole model
# gives both, and the logits [images, texts].


def _of(family: Family, checkpoint: Checkpoint) -> Any:
    """Who runs it: transformers where it is spelled as transformers does, else open_clip."""
    own = any(name.startswith(("text_model.", "vision_model.")) for name in checkpoint)
    return family if own else openclip


def clip_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of(CLIP, checkpoint).text(checkpoint, config)


def clip_vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of(CLIP, checkpoint).vision(checkpoint, config)


def clip_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of(CLIP, checkpoint).whole(checkpoint, config)


def siglip_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of(SIGLIP, checkpoint).text(checkpoint, config)


def siglip_vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of(SIGLIP, checkpoint).vision(checkpoint, config)


def siglip_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return _of(SIGLIP, checkpoint).whole(checkpoint, config)


def align_text(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return ALIGN.text(checkpoint, config)


def align_vision(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return ALIGN.vision(checkpoint, config)


def align_whole(checkpoint: Checkpoint, config: Mapping[str, Any]) -> PartProbe:
    return ALIGN.whole(checkpoint, config)
