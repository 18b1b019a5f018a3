"""A plugin with a model whose weights nobody may have."""

import zoo

ZOO_API = 1


@zoo.hookimpl
def zoo_entries() -> list[zoo.Entry]:
    return [zoo.Entry("gpt-9", open=False, note="its weights are not public; bert is an open relative")]
