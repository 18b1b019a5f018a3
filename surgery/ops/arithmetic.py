"""Arithmetic that leaves the function as it is: folded scales, summed biases, powers and logarithms.

Types narrower than 32 bits are computed in float32 and rounded once, at the end; float64 stays float64 throughout, so
that the proof can evaluate an expression unrounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.ops.registry import Example, Inverse, Kind, Op, Param, Shape, Step, register, show

if TYPE_CHECKING:
    from torch import Tensor


def compute(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """Runs the function with narrow floats widened to float32, and rounds the result back to what they share."""
    import torch

    narrow = [tensor.is_floating_point() and tensor.element_size() < 4 for tensor in tensors]
    result = function(*(t.to(torch.float32) if thin else t for t, thin in zip(tensors, narrow, strict=True)))
    if all(narrow) and len({tensor.dtype for tensor in tensors}) == 1:
        return result.to(tensors[0].dtype)
    return result


def broadcast(shapes: Sequence[Shape]) -> Shape:
    """The shape that all of them broadcast to."""
    result: Shape = ()
    for number, shape in enumerate(shapes, start=1):
        rank = max(len(result), len(shape))
        left, right = (1,) * (rank - len(result)) + result, (1,) * (rank - len(shape)) + shape
        if any(a != b and 1 not in (a, b) for a, b in zip(left, right, strict=True)):
            raise PlanError(f"argument {number} has shape {show(shape)}, which does not broadcast with {show(result)}")
        result = tuple(b if a == 1 else a for a, b in zip(left, right, strict=True))
    return result


def _broadcast_shape(shapes: Sequence[Shape]) -> Shape:
    return broadcast(shapes)


def _same_shape(shapes: Sequence[Shape], **_: object) -> Shape:
    return shapes[0]


def _add(tensors: Sequence[Tensor]) -> Tensor:
    """Sums tensors, broadcasting: two biases that were only ever added, positions and their type.

    Rule: torch.add.
    """

    def total(first: Tensor, *others: Tensor) -> Tensor:
        for other in others:
            first = first + other
        return first

    return compute(total, *tensors)


def _sub(tensors: Sequence[Tensor]) -> Tensor:
    """The first less the second, broadcasting.

    Rule: torch.sub.
    """
    return compute(lambda a, b: a - b, *tensors)


def _mul(tensors: Sequence[Tensor]) -> Tensor:
    """The product, element by element, broadcasting: a layer scale folded into the weight before it.

    Rule: torch.mul.
    """
    return compute(lambda a, b: a * b, *tensors)


def _div(tensors: Sequence[Tensor]) -> Tensor:
    """The quotient, element by element, broadcasting.

    Rule: torch.div.
    """
    return compute(lambda a, b: a / b, *tensors)


_PAIR = {"a": [[1.0, 2.0], [4.0, 8.0]], "b": [2.0, 4.0]}
for _name, _most, _combine in (("add", None, _add), ("sub", 2, _sub), ("mul", 2, _mul), ("div", 2, _div)):
    register(
        Op(_name, "preserving", (2, _most), (), _broadcast_shape, _combine, example=Example(f"{_name}(a, b)", _PAIR))
    )


def _scale(tensors: Sequence[Tensor], *, by: float) -> Tensor:
    """Multiplies by a number: the 1/sqrt(d) of attention folded into a projection.

    Rule: torch.mul with a scalar.
    """
    return compute(lambda a: a * by, *tensors)


def _shift(tensors: Sequence[Tensor], *, by: float) -> Tensor:
    """Adds a number: a norm that computes (1 + weight) and one that computes weight.

    Rule: torch.add with a scalar; Gemma's RMSNorm stores weight - 1.
    """
    return compute(lambda a: a + by, *tensors)


register(
    Op(
        "scale",
        "preserving",
        (1, 1),
        (Param("by", float),),
        _same_shape,
        _scale,
        inverse=lambda shapes, params: [
            (Step("scale", {"by": 1 / params["by"]}),) if params["by"] and math.isfinite(1 / params["by"]) else None
        ],
        example=Example("scale(q.weight, by=0.125)", {"q.weight": [[8.0, -4.0]]}),
    )
)
register(
    Op(
        "shift",
        "preserving",
        (1, 1),
        (Param("by", float),),
        _same_shape,
        _shift,
        inverse=lambda shapes, params: [
            (Step("shift", {"by": -params["by"]}),) if math.isfinite(params["by"]) else None
        ],
        example=Example("shift(norm.weight, by=1.0)", {"norm.weight": [-0.5, 0.25]}),
    )
)


def _neg(tensors: Sequence[Tensor]) -> Tensor:
    """Changes the sign.

    Rule: torch.neg.
    """
    return tensors[0].neg()


def _exp(tensors: Sequence[Tensor]) -> Tensor:
    """The exponential: a scale that is stored as its logarithm (CLIP's logit_scale).

    Rule: torch.exp.
    """
    return compute(lambda a: a.exp(), *tensors)


def _log(tensors: Sequence[Tensor]) -> Tensor:
    """The natural logarithm: the inverse of exp.

    Rule: torch.log.
    """
    return compute(lambda a: a.log(), *tensors)


def _sqrt(tensors: Sequence[Tensor]) -> Tensor:
    """The square root.

    Rule: torch.sqrt.
    """
    return compute(lambda a: a.sqrt(), *tensors)


def _rsqrt(tensors: Sequence[Tensor]) -> Tensor:
    """One over the square root: a variance that is stored as its inverse deviation.

    Rule: torch.rsqrt.
    """
    return compute(lambda a: a.rsqrt(), *tensors)


def _square(tensors: Sequence[Tensor]) -> Tensor:
    """The square.

    Rule: torch.square.
    """
    return compute(lambda a: a * a, *tensors)


def _reciprocal(tensors: Sequence[Tensor]) -> Tensor:
    """One over the value: a scale that one side multiplies by and the other divides by.

    Rule: torch.reciprocal.
    """
    return compute(lambda a: a.reciprocal(), *tensors)


_UNARY: tuple[tuple[str, Kind, Callable[[Sequence[Tensor]], Tensor], str], ...] = (
    ("neg", "exact", _neg, "neg"),
    ("exp", "preserving", _exp, "log"),
    ("log", "preserving", _log, "exp"),
    ("sqrt", "preserving", _sqrt, "square"),
    ("rsqrt", "preserving", _rsqrt, ""),
    ("square", "preserving", _square, ""),
    ("reciprocal", "preserving", _reciprocal, "reciprocal"),
)


def _by(name: str) -> Inverse:
    return lambda shapes, params: [(Step(name),)]


for _name, _kind, _apply, _back in _UNARY:
    register(
        Op(
            _name,
            _kind,
            (1, 1),
            (),
            _same_shape,
            _apply,
            inverse=_by(_back) if _back else None,
            example=Example(f"{_name}(a)", {"a": [1.0, 4.0]}),
        )
    )
