"""The families of this plugin, in one list."""

from __future__ import annotations

from zoo import Entry
from zoo_vision import convnext, deit, dinov2, efficientnet, resnet, resnetv2, swin, vit

_MODULES = (vit, deit, dinov2, swin, resnet, resnetv2, efficientnet, convnext)
FAMILIES = tuple(module.FAMILY for module in _MODULES)


def entries() -> list[Entry]:
    return [entry for module in _MODULES for entry in module.ENTRIES]
