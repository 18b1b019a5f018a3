"""The algebra of a plan: every op that a row may use, by subject.

Ops import torch only when applied, so that a plan can be read, checked and printed without it. Results may be views of
the tensors that were read: treat them as read-only.
"""

from __future__ import annotations

from surgery.ops import (  # noqa: F401  # importing them registers their ops
    arithmetic,
    constant,
    convolution,
    layout,
    lowrank,
    norm,
    resize,
    vocabulary,
    width,
)
from surgery.ops.registry import (
    KINDS,
    Example,
    Inverse,
    Kind,
    Op,
    Param,
    Shape,
    Step,
    Steps,
    Value,
    axis_of,
    did_you_mean,
    get,
    register,
    registered,
    show,
    spell,
)

__all__ = [
    "KINDS",
    "Example",
    "Inverse",
    "Kind",
    "Op",
    "Param",
    "Shape",
    "Step",
    "Steps",
    "Value",
    "axis_of",
    "did_you_mean",
    "get",
    "register",
    "registered",
    "show",
    "spell",
]
