"""A plugin that imports what it must not, names what does not exist, and knows a part in one layout only."""

import numpy

import zoo

ZOO_API = 1
VERSION = numpy.__version__


@zoo.hookimpl
def zoo_entries() -> list[zoo.Entry]:
    return [
        zoo.Entry(
            "heavy",
            tags={"only": (zoo.Source("hub", "org/heavy"),)},
            default_tag="only",
            load="zoo_heavy:no_such_function",
            layouts={"one": ("a.*",), "two": ("b.*",)},
            parts=(zoo.Part("body", {"one": ("a.*",)}, probe="no_such_module:probe"),),
        )
    ]
