"""Products of two thin matrices: truncated singular values, and adapters merged into the weight they belong to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from surgery.errors import PlanError
from surgery.ops.arithmetic import compute
from surgery.ops.registry import Example, Op, Param, Shape, Step, register, show
from surgery.ops.resize import floating

if TYPE_CHECKING:
    from torch import Tensor


def _low_rank_shape(shapes: Sequence[Shape], *, rank: int, factor: str) -> Shape:
    (shape,) = shapes
    if len(shape) != 2:
        raise PlanError(f"it takes a matrix, and the argument has shape {show(shape)}; reshape it first")
    if not 1 <= rank <= min(shape):
        raise PlanError(f"rank={rank} of a matrix of shape {show(shape)}: 1 to {min(shape)}")
    results = {"product": shape, "a": (rank, shape[1]), "b": (shape[0], rank)}
    if factor not in results:
        raise PlanError(f'factor="{factor}" is none of {", ".join(results)}')
    return results[factor]


def _low_rank(tensors: Sequence[Tensor], *, rank: int, factor: str) -> Tensor:
    """The nearest matrix of that rank, [out, in], or one of its factors: a, [rank, in], and b, [out, rank], with
    b @ a the product and the singular values shared between them by their square root.

    Rule: truncated singular value decomposition (Eckart and Young, 1936), torch.linalg.svd; the factors as PiSSA
    starts an adapter (Meng et al., arXiv 2404.02948).
    """

    def truncated(weight: Tensor) -> Tensor:
        import torch

        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        root = values[:rank].sqrt()
        if factor == "a":
            return root.unsqueeze(1) * right[:rank]
        if factor == "b":
            return left[:, :rank] * root
        return (left[:, :rank] * values[:rank]) @ right[:rank]

    return compute(truncated, floating(tensors[0], "low_rank"))


register(
    Op(
        "low_rank",
        "lossy",
        (1, 1),
        (Param("rank", int), Param("factor", str, "product", quiet=True)),
        _low_rank_shape,
        _low_rank,
        partners='factor="a" and factor="b" of one weight belong together.',
        example=Example("low_rank(w, rank=1)", {"w": [[3.0, 0.0], [0.0, 1.0]]}),
    )
)


def _lora_shape(shapes: Sequence[Shape], *, scale: float, transposed: int) -> Shape:
    weight, b, a = shapes
    if not math.isfinite(scale):
        raise PlanError(f"scale={scale} is not finite")
    if transposed not in (0, 1) or (transposed and len(weight) != 2):
        raise PlanError(f"transposed={transposed}: 1 is for a matrix that is stored [in, out], 0 for all else")
    if len(b) < 2 or len(a) < 2 or any(length != 1 for length in b[2:]) or b[1] != a[0]:
        raise PlanError(
            f"argument 2, B, is out x rank and argument 3, A, rank x in x ...; {show(b)} and {show(a)} do not multiply"
        )
    made = (b[0], *a[1:])
    if weight != (made[::-1] if transposed else made):
        raise PlanError(f"B @ A has shape {show(made)}, which is not that of a weight of shape {show(weight)}")
    return weight


def _delta(b: Tensor, a: Tensor, scale: float, transposed: int) -> Tensor:
    product = (b.flatten(1) @ a.flatten(1)).reshape(b.shape[0], *a.shape[1:]) * scale
    return product.t() if transposed else product


def _lora_merge(tensors: Sequence[Tensor], *, scale: float, transposed: int) -> Tensor:
    """An adapter added to its weight: lora_merge(weight, lora_B, lora_A, scale=alpha / rank) is W + scale * B @ A, with
    B [out, rank] and A [rank, in, ...]. transposed=1 for a weight [in, out] (Conv1D). Exact but for rounding.

    Rule: LoRA (Hu et al., arXiv 2106.09685); peft's merge. The scale is alpha / rank, or alpha / sqrt(rank) for rsLoRA.
    """
    return compute(lambda weight, b, a: weight + _delta(b, a, scale, transposed), *tensors)


def _lora_unmerge(tensors: Sequence[Tensor], *, scale: float, transposed: int) -> Tensor:
    """An adapter taken out of the weight it was merged into: W - scale * B @ A. Exact but for rounding.

    Rule: peft's unmerge.
    """
    return compute(lambda weight, b, a: weight - _delta(b, a, scale, transposed), *tensors)


for _name, _back, _apply in (
    ("lora_merge", "lora_unmerge", _lora_merge),
    ("lora_unmerge", "lora_merge", _lora_unmerge),
):
    register(
        Op(
            _name,
            "preserving",
            (3, 3),
            (Param("scale", float, 1.0), Param("transposed", int, 0, quiet=True)),
            _lora_shape,
            _apply,
            inverse=lambda shapes, params, back=_back: [(Step(back, params, (1, 2)),), None, None],  # type: ignore[misc]
            partners="B and A of one adapter belong together; lora_bias, where there is one, is added to the bias.",
            example=Example(f"{_name}(w, b, a, scale=2.0)", {"w": [[1.0, 1.0]], "b": [[0.5]], "a": [[1.0, 2.0]]}),
        )
    )
