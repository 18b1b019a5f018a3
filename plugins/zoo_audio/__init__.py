"""Speech models for the zoo: Whisper, wav2vec 2.0 and its relatives.

An ordinary plugin: it uses what any plugin may use, and no more.
"""

from __future__ import annotations

from collections.abc import Iterable

import zoo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> Iterable[zoo.Entry]:
    return []
