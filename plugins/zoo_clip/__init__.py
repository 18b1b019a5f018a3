"""Image-text models for the zoo: CLIP, SigLIP and ALIGN, and the namespace open_clip:ARCH/TAG.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import zoo
from zoo_clip import align, clip, recognising, siglip

if TYPE_CHECKING:
    from surgery import TensorInfo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return [clip.ENTRY, siglip.ENTRY, align.ENTRY]


@zoo.hookimpl
def zoo_resolve(ref: str) -> zoo.Entry | None:
    """open_clip:ARCH/TAG, by open_clip's own table of pretrained weights."""
    if not ref.startswith("open_clip:"):
        return None
    from zoo_clip.namespace import resolve

    return resolve(ref)


@zoo.hookimpl
def zoo_recognise(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[zoo.Recognition]:
    """By config.json's model_type or open_clip's model_cfg, by the tensors' names, and by what shapes give away."""
    return recognising.recognise(config, tensors)
