"""A plugin that gives an entry which another plugin gives as well, and one of its own."""

import zoo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> list[zoo.Entry]:
    source = zoo.Source("hub", "rival/bert")
    names = ("bert", "rival-bert")
    return [zoo.Entry(name, tags={"only": (source,)}, default_tag="only") for name in names]
