"""The hooks: all that a plugin can do. A plugin implements any of them, marked with `@zoo.hookimpl`.

Arguments are only ever added; an implementation names the ones it wants. `HOOK_API` goes up when one changes meaning,
and a plugin states the number that it was written for as `ZOO_API`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import pluggy

from zoo.entry import Entry, Recognition

if TYPE_CHECKING:
    from surgery import Format, TensorInfo

HOOK_API = 1
GROUP = "zoo"

hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


@hookspec
def zoo_entries() -> Iterable[Entry]:  # type: ignore[empty-body]
    """The entries this plugin brings: pure data, no network, no torch."""


@hookspec
def zoo_resolve(ref: str) -> Entry | None:
    """The entry behind a reference of an open namespace ("timm:vit_base_patch16_224"), or None when it is not ours."""


@hookspec
def zoo_recognise(config: Mapping[str, object], tensors: Mapping[str, TensorInfo]) -> list[Recognition]:  # type: ignore[empty-body]
    """What an unlabelled checkpoint could be, with the evidence. `config` is its config.json; where there is none, what
    a file of torch holds beside its tensors, each dict under its key there (`dims`, `args`, `hyper_parameters`)."""


@hookspec
def zoo_formats() -> Iterable[Format]:  # type: ignore[empty-body]
    """Readers of further checkpoint formats, whose `open` is an import string."""


@hookspec
def zoo_ops() -> Iterable[str]:  # type: ignore[empty-body]
    """Import strings of further surgery ops."""


NAMES = ("zoo_entries", "zoo_resolve", "zoo_recognise", "zoo_formats", "zoo_ops")
