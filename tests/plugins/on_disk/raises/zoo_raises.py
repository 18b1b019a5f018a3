"""A plugin whose hook raises half-way, after one good entry."""

from collections.abc import Iterator

import zoo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> Iterator[zoo.Entry]:
    yield zoo.Entry("half", tags={"only": (zoo.Source("hub", "org/half"),)}, default_tag="only")
    raise ValueError("ran out of entries")
