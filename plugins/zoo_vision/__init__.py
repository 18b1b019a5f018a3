"""Vision models for the zoo: transformers and convolutional networks, as timm has them.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable

import zoo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return []
