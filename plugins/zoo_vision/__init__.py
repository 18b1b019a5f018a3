"""Vision models for the zoo: transformers and convolutional networks, as timm has them.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import zoo
from zoo_vision import naming
from zoo_vision.catalogue import FAMILIES, entries

if TYPE_CHECKING:
    from surgery import TensorInfo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return entries()


@zoo.hookimpl
def zoo_resolve(ref: str) -> zoo.Entry | None:
    """Any model of timm, as timm:NAME."""
    scheme, _, name = ref.partition(":")
    return naming.resolve(name) if scheme == "timm" else None


@zoo.hookimpl
def zoo_recognise(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[zoo.Recognition]:
    """By config.json's architecture or model_type where there is one, and by the names and shapes of the tensors."""
    found = [naming.recognise(family, config, tensors) for family in FAMILIES]
    return [recognition for recognition in found if recognition is not None]
