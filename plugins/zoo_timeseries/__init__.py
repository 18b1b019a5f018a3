"""Time-series models for the zoo: PatchTST, Informer, Autoformer, TimesNet.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import zoo
from zoo_timeseries import lagged, patchtst, timesnet

if TYPE_CHECKING:
    from surgery import TensorInfo

ZOO_API = 1

_ENTRIES = (*patchtst.ENTRIES, *lagged.ENTRIES, *timesnet.ENTRIES)


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return _ENTRIES


@zoo.hookimpl
def zoo_recognise(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[zoo.Recognition]:
    """By config.json's model_type where there is one, and by the tensors' names."""
    model_type = config.get("model_type")
    found = []
    for entry in _ENTRIES:
        if model_type is not None and model_type != entry.name:
            continue
        layout = entry.layout_of(tensors)
        if layout is None:
            continue
        evidence = [f'config.json says that its model_type is "{model_type}"'] if model_type is not None else []
        evidence.append(f"the tensors are named as in {entry.name}, layout {layout}")
        found.append(zoo.Recognition(entry.name, tuple(evidence), len(evidence)))
    return found
