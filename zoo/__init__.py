"""A zoo of pretrained models: names, their weights, and plugins that bring more. The surgery is in `surgery`.

>>> import zoo
>>> [entry.name for entry in zoo.entries()]             # doctest: +SKIP
['bert', 'distilbert', 'minilm', 'roberta']
>>> zoo.open("minilm-encoder")                          # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery import Format as Format
    from zoo.api import entries as entries
    from zoo.api import find as find
    from zoo.api import open as open
    from zoo.api import pull as pull
    from zoo.building import fill as fill
    from zoo.building import unfilled as unfilled
    from zoo.entry import Entry as Entry
    from zoo.entry import Part as Part
    from zoo.entry import PartProbe as PartProbe
    from zoo.entry import Recognition as Recognition
    from zoo.entry import Source as Source
    from zoo.errors import ZooError as ZooError
    from zoo.grafting import graft as graft
    from zoo.hooks import HOOK_API as HOOK_API
    from zoo.hooks import hookimpl as hookimpl
    from zoo.host import Host as Host
    from zoo.loaded import Loaded as Loaded
    from zoo.loaded import load as load
    from zoo.pictures import Pictures as Pictures
    from zoo.sizes import Body as Body
    from zoo.sizes import Resized as Resized
    from zoo.sizes import Sizes as Sizes
    from zoo.sizes import Table as Table
    from zoo.sizes import joined as joined
    from zoo.sizes import labelled as labelled
    from zoo.sizes import tables as tables
    from zoo.sources import described as described

# Where each public name lives. A name is imported when it is first used, so that `import zoo` costs nothing.
_HOMES = {
    "Body": "zoo.sizes",
    "Entry": "zoo.entry",
    "Format": "surgery",
    "HOOK_API": "zoo.hooks",
    "Host": "zoo.host",
    "Loaded": "zoo.loaded",
    "Part": "zoo.entry",
    "PartProbe": "zoo.entry",
    "Pictures": "zoo.pictures",
    "Recognition": "zoo.entry",
    "Resized": "zoo.sizes",
    "Sizes": "zoo.sizes",
    "Source": "zoo.entry",
    "Table": "zoo.sizes",
    "ZooError": "zoo.errors",
    "described": "zoo.sources",
    "entries": "zoo.api",
    "fill": "zoo.building",
    "find": "zoo.api",
    "graft": "zoo.grafting",
    "hookimpl": "zoo.hooks",
    "joined": "zoo.sizes",
    "labelled": "zoo.sizes",
    "load": "zoo.loaded",
    "open": "zoo.api",
    "pull": "zoo.api",
    "tables": "zoo.sizes",
    "unfilled": "zoo.building",
}

__all__ = [  # noqa: RUF022  kept equal to _HOMES by a test; type checkers want it spelled out
    "Body",
    "Entry",
    "Format",
    "HOOK_API",
    "Host",
    "Loaded",
    "Part",
    "PartProbe",
    "Pictures",
    "Recognition",
    "Resized",
    "Sizes",
    "Source",
    "Table",
    "ZooError",
    "__version__",
    "described",
    "entries",
    "fill",
    "find",
    "graft",
    "hookimpl",
    "joined",
    "labelled",
    "load",
    "open",
    "pull",
    "tables",
    "unfilled",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("weightzoo")
    if name not in _HOMES:
        raise AttributeError(f"module 'zoo' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
