"""Image-text models for the zoo: CLIP, SigLIP and ALIGN.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable

import zoo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return []
