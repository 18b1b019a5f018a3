"""Weight normalisation, folded into a plain weight and taken out of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.ops.arithmetic import compute
from surgery.ops.registry import Example, Op, Param, Shape, register, show

if TYPE_CHECKING:
    from torch import Tensor

_DIM = Param("dim", int, 0)


def _gain_shape(shape: Shape, dim: int) -> Shape:
    if dim == -1:
        return ()
    if not 0 <= dim < len(shape):
        raise PlanError(f"dim={dim} is no axis of a tensor of shape {show(shape)}; -1 is the norm of the whole tensor")
    return tuple(length if axis == dim else 1 for axis, length in enumerate(shape))


def _norm(v: Tensor, dim: int) -> Tensor:
    import torch

    if dim == -1:
        whole: Tensor = torch.linalg.vector_norm(v)
        return whole
    others = [axis for axis in range(v.dim()) if axis != dim]
    # a vector's only axis leaves nothing to sum over, and torch takes an empty list for "all axes"
    norm: Tensor = torch.linalg.vector_norm(v, dim=others, keepdim=True) if others else v.abs()
    return norm


def _norm_except_shape(shapes: Sequence[Shape], *, dim: int) -> Shape:
    return _gain_shape(shapes[0], dim)


def _norm_except(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    """The Euclidean norm over every axis but `dim`, kept as axes of length 1: the gain g of a weight that is to be
    stored as gain and direction. dim=-1 is the norm of the whole tensor, a scalar.

    Rule: torch.norm_except_dim, as torch.nn.utils.weight_norm uses it (Salimans and Kingma, arXiv 1602.07868).
    """
    return compute(lambda v: _norm(v, dim), *tensors)


def _weight_norm_shape(shapes: Sequence[Shape], *, dim: int) -> Shape:
    g, v = shapes
    if g != _gain_shape(v, dim):
        raise PlanError(
            f"argument 1, the gain, has shape {show(g)}, and a direction of shape {show(v)} with dim={dim} has a gain "
            f"of shape {show(_gain_shape(v, dim))}"
        )
    return v


def _weight_norm(tensors: Sequence[Tensor], *, dim: int) -> Tensor:
    """Folds gain and direction into the weight they stand for: w = g * v / norm(v), the norm over every axis but
    `dim`. The first argument is g (weight_g, parametrizations.weight.original0), the second v.

    Rule: torch.nn.utils.weight_norm (Salimans and Kingma, arXiv 1602.07868).
    """
    return compute(lambda g, v: v * (g / _norm(v, dim)), *tensors)


register(
    Op(
        "norm_except",
        "preserving",
        (1, 1),
        (_DIM,),
        _norm_except_shape,
        _norm_except,
        partners="The direction: v is the weight itself, or the weight over this gain.",
        example=Example("norm_except(w)", {"w": [[3.0, 4.0], [0.0, 2.0]]}),
    )
)
register(
    Op(
        "weight_norm",
        "preserving",
        (2, 2),
        (_DIM,),
        _weight_norm_shape,
        _weight_norm,
        example=Example("weight_norm(g, v)", {"g": [[10.0], [1.0]], "v": [[3.0, 4.0], [0.0, 2.0]]}),
    )
)
