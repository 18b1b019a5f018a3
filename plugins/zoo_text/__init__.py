"""Text models for the zoo: the BERT family, T5 and GPT-2.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import zoo
from zoo_text import bert, distilbert, gpt2, roberta, t5

if TYPE_CHECKING:
    from surgery import TensorInfo

ZOO_API = 1

_FAMILIES = (bert, roberta, distilbert, t5, gpt2)


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return [entry for family in _FAMILIES for entry in family.ENTRIES] + list(gpt2.CLOSED)


@zoo.hookimpl
def zoo_recognise(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[zoo.Recognition]:
    """By config.json's model_type where there is one, by the tensors' names, and by what shapes give away."""
    found = []
    for family in _FAMILIES:
        entry = family.ENTRIES[0]
        evidence = []
        model_type = config.get("model_type")
        if model_type is not None and model_type != entry.name:
            continue
        if model_type == entry.name:
            evidence.append(f'config.json says that its model_type is "{model_type}"')
        layout = entry.layout_of(tensors)
        if layout is None:
            continue
        evidence.append(f"the tensors are named as in {entry.name}, layout {layout}")
        told = family.shapes_say(tensors)
        if told is False:
            continue
        evidence += [told] if told else []
        found.append(zoo.Recognition(entry.name, tuple(evidence), len(evidence)))
    return found
