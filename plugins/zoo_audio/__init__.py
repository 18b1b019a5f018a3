"""Speech models for the zoo: Whisper, wav2vec 2.0 and its relatives.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import zoo
from zoo_audio import speech, whisper

if TYPE_CHECKING:
    from surgery import TensorInfo

ZOO_API = 1

_FAMILIES = (whisper, speech)


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return [entry for family in _FAMILIES for entry in family.ENTRIES]


@zoo.hookimpl
def zoo_recognise(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[zoo.Recognition]:
    """By config.json's model_type where there is one, by the tensors' names, by what only one family has, and by what
    openai-whisper and fairseq write beside the tensors."""
    found = []
    model_type = config.get("model_type")
    for family in _FAMILIES:
        for entry in family.ENTRIES:
            if model_type is not None and model_type != entry.name:
                continue
            layout = entry.layout_of(tensors)
            if layout is None:
                continue
            told, said = family.names_say(entry.name, tensors), family.file_says(entry.name, config)
            if (told is False or said is False) and model_type is None:
                continue
            evidence = [f'config.json says that its model_type is "{model_type}"'] if model_type else []
            evidence.append(f"the tensors are named as in {entry.name}, layout {layout}")
            evidence += [each for each in (told, said) if each]
            found.append(zoo.Recognition(entry.name, tuple(evidence), len(evidence)))
    if len(found) > 1:  # what would settle it is no evidence, so it is not counted
        found = [replace(each, evidence=(*each.evidence, speech.UNTOLD)) for each in found]
    return found
