"""Exact relayouts: every bit of the source stays, elsewhere. Fusing, cutting, turning, choosing rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError
from surgery.ops.registry import Example, Op, Param, Shape, Step, Steps, axis_of, register, show

if TYPE_CHECKING:
    from torch import Tensor

AXIS = Param("axis", int, 0)


def _resized(shape: Shape, axis: int, size: int) -> Shape:
    return (*shape[:axis], size, *shape[axis + 1 :])


def _same_but_for(shapes: Sequence[Shape], axis: int) -> int:
    """Checks that the shapes differ at most along the axis; gives the axis counted from the front."""
    first = shapes[0]
    along = axis_of(first, axis)
    for number, shape in enumerate(shapes[1:], start=2):
        if len(shape) != len(first) or _resized(shape, along, 0) != _resized(first, along, 0):
            raise PlanError(
                f"argument {number} has shape {show(shape)} and argument 1 has {show(first)}; "
                f"they may differ along axis {axis} only"
            )
    return along


def _cat_shape(shapes: Sequence[Shape], *, axis: int) -> Shape:
    along = _same_but_for(shapes, axis)
    return _resized(shapes[0], along, sum(shape[along] for shape in shapes))


def _cat(tensors: Sequence[Tensor], *, axis: int) -> Tensor:
    """Joins tensors along an axis, in the order given: fused projections in blocks, [Q | K | V].

    Rule: torch.cat; the blocked layout of torch.nn.MultiheadAttention.in_proj_weight.
    """
    import torch

    return torch.cat(tuple(tensors), dim=axis) if len(tensors) > 1 else tensors[0]


def _uncat(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    along, start = axis_of(shapes[0], params["axis"]), 0
    steps: list[Steps | None] = []
    for shape in shapes:
        stop = start + shape[along]
        steps.append((Step("slice", {"axis": along, "start": start, "stop": stop}),) if stop > start else None)
        start = stop
    return steps


register(
    Op(
        "cat",
        "exact",
        (1, None),
        (AXIS,),
        _cat_shape,
        _cat,
        inverse=_uncat,
        example=Example("cat(q, k, v, axis=0)", {"q": [[1, 2]], "k": [[3, 4]], "v": [[5, 6]]}),
    )
)


def _transpose_shape(shapes: Sequence[Shape]) -> Shape:
    (shape,) = shapes
    if len(shape) != 2:
        raise PlanError(f"it takes a matrix, and the argument has shape {show(shape)}; for more axes use permute")
    return (shape[1], shape[0])


def _transpose(tensors: Sequence[Tensor]) -> Tensor:
    """Turns a matrix: between a Linear's weight [out, in] and a Conv1D's or raw `x @ W` parameter [in, out].

    Rule: torch.Tensor.t; the layout of transformers.pytorch_utils.Conv1D.
    """
    return tensors[0].t()


register(
    Op(
        "transpose",
        "exact",
        (1, 1),
        (),
        _transpose_shape,
        _transpose,
        inverse=lambda shapes, params: [(Step("transpose"),)],
        example=Example("transpose(w)", {"w": [[1, 2, 3], [4, 5, 6]]}),
    )
)


def _permute_shape(shapes: Sequence[Shape], *, dims: tuple[int, ...]) -> Shape:
    (shape,) = shapes
    if sorted(dims) != list(range(len(shape))):
        raise PlanError(f"dims={dims} is not an order of the {len(shape)} axes of a tensor of shape {show(shape)}")
    return tuple(shape[dim] for dim in dims)


def _permute(tensors: Sequence[Tensor], *, dims: tuple[int, ...]) -> Tensor:
    """Reorders the axes: axis n of the result is axis dims[n] of the argument.

    Rule: torch.permute.
    """
    return tensors[0].permute(dims)


def _unpermute(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    dims = params["dims"]
    return [(Step("permute", {"dims": tuple(dims.index(axis) for axis in range(len(dims)))}),)]


register(
    Op(
        "permute",
        "exact",
        (1, 1),
        (Param("dims", tuple),),
        _permute_shape,
        _permute,
        inverse=_unpermute,
        example=Example("permute(w, dims=(3, 2, 0, 1))", {"w": (4, 4, 3, 192)}),
    )
)


def _reshape_shape(shapes: Sequence[Shape], *, shape: tuple[int, ...]) -> Shape:
    (old,) = shapes
    size, free = math.prod(old), shape.count(-1)
    known = math.prod(length for length in shape if length != -1)
    if any(length < -1 for length in shape) or free > 1:
        raise PlanError(f"shape={shape} cannot be: lengths are 0 or more, and at most one may be -1, the rest")
    if free and known and size % known == 0:
        return tuple(size // known if length == -1 else length for length in shape)
    if free or known != size:
        raise PlanError(f"the argument has shape {show(old)}, {size} elements, which do not fit in shape={shape}")
    return shape


def _reshape(tensors: Sequence[Tensor], *, shape: tuple[int, ...]) -> Tensor:
    """Reads the same elements, in row-major order, in another shape. One length may be -1: whatever is left.

    Rule: torch.reshape.
    """
    return tensors[0].reshape(shape)


register(
    Op(
        "reshape",
        "exact",
        (1, 1),
        (Param("shape", tuple),),
        _reshape_shape,
        _reshape,
        inverse=lambda shapes, params: [(Step("reshape", {"shape": shapes[0]}),)],
        example=Example("reshape(w, shape=(192, -1))", {"w": (192, 3, 4, 4)}),
    )
)


def _slice_shape(shapes: Sequence[Shape], *, axis: int, start: int, stop: int) -> Shape:
    (shape,) = shapes
    along = axis_of(shape, axis)
    if not 0 <= start < stop <= shape[along]:
        raise PlanError(
            f"start={start}, stop={stop} is no range within the {shape[along]} of axis {axis} of a tensor of shape "
            f"{show(shape)}"
        )
    return _resized(shape, along, stop - start)


def _slice(tensors: Sequence[Tensor], *, axis: int, start: int, stop: int) -> Tensor:
    """Cuts [start, stop) out of an axis: one of the blocks of a fused tensor.

    Rule: torch.narrow.
    """
    return tensors[0].narrow(axis, start, stop - start)


register(
    Op(
        "slice",
        "exact",
        (1, 1),
        (AXIS, Param("start", int, 0), Param("stop", int)),
        _slice_shape,
        _slice,
        example=Example("slice(qkv, axis=0, start=1, stop=2)", {"qkv": [[1, 2], [3, 4], [5, 6]]}),
    )
)


def _group(size: int, groups: int, what: str) -> int:
    if groups < 1 or size % groups:
        raise PlanError(f"{what} does not divide into groups={groups}")
    return size // groups


def _interleave_shape(shapes: Sequence[Shape], *, groups: int, axis: int) -> Shape:
    along = _same_but_for(shapes, axis)
    for number, shape in enumerate(shapes, start=1):
        _group(shape[along], groups, f"axis {axis} of argument {number}, of shape {show(shape)},")
    return _resized(shapes[0], along, sum(shape[along] for shape in shapes))


def _apart(tensor: Tensor, axis: int, groups: int) -> Tensor:
    """The axis as two: groups, and what is in each."""
    shape = tensor.shape
    return tensor.reshape(*shape[:axis], groups, shape[axis] // groups, *shape[axis + 1 :])


def _interleave(tensors: Sequence[Tensor], *, groups: int, axis: int) -> Tensor:
    """Fuses group by group: each argument is cut into `groups` equal pieces along the axis, and the result holds the
    first piece of each, then the second of each, and so on. With one group a head it is the per-head layout; with
    arguments of different widths the per-group layout of grouped-query attention.

    Rule: the query_key_value layout of Megatron-LM, GPT-NeoX, BLOOM and Falcon.
    """
    import torch

    along = axis % tensors[0].dim()
    apart = [_apart(tensor, along, groups) for tensor in tensors]
    return torch.cat(apart, dim=along + 1).flatten(along, along + 1)


def _uninterleave(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    along, groups = axis_of(shapes[0], params["axis"]), params["groups"]
    held = [number for number, shape in enumerate(shapes) if shape[along]]
    widths = tuple(shapes[number][along] // groups for number in held)
    rest = {"of": len(held), "groups": groups, "widths": () if len(set(widths)) == 1 else widths, "axis": along}
    return [
        (Step("deinterleave", {"index": held.index(number), **rest}),) if number in held else None
        for number in range(len(shapes))
    ]


register(
    Op(
        "interleave",
        "exact",
        (1, None),
        (Param("groups", int), AXIS),
        _interleave_shape,
        _interleave,
        inverse=_uninterleave,
        example=Example("interleave(q, k, v, groups=2)", {"q": [1, 2, 3, 4], "k": [10, 20], "v": [100, 200]}),
    )
)


def _cut(size: int, index: int, of: int, groups: int, widths: tuple[int, ...], what: str) -> tuple[int, int, int]:
    """Where the part lies within each group: (length of a group, start, length of the part)."""
    shares = widths or (1,) * max(of, 0)
    if len(shares) != of or not shares or min(shares) < 1:
        raise PlanError(f"of={of} parts cannot have widths={widths}: one width of 1 or more for each part")
    if not 0 <= index < of:
        raise PlanError(f"index={index} is none of the of={of} parts, which count from 0")
    length = _group(size, groups, what)
    if length % sum(shares):
        raise PlanError(f"{what} gives groups of {length}, which do not divide into {sum(shares)} equal pieces")
    unit = length // sum(shares)
    return length, unit * sum(shares[:index]), unit * shares[index]


def _deinterleave_shape(
    shapes: Sequence[Shape], *, index: int, of: int, groups: int, widths: tuple[int, ...], axis: int
) -> Shape:
    (shape,) = shapes
    along = axis_of(shape, axis)
    what = f"axis {axis} of the argument, of shape {show(shape)},"
    return _resized(shape, along, groups * _cut(shape[along], index, of, groups, widths, what)[2])


def _deinterleave(
    tensors: Sequence[Tensor], *, index: int, of: int, groups: int, widths: tuple[int, ...], axis: int
) -> Tensor:
    """Takes one part out of a tensor that was fused group by group: the inverse of interleave. `of` parts in each
    group, of equal width, or as `widths` has it: (4, 1, 1) where four query heads share one key and one value head.

    Rule: the query_key_value layout of Megatron-LM, GPT-NeoX, BLOOM and Falcon.
    """
    (tensor,) = tensors
    along = axis % tensor.dim()
    _, start, width = _cut(tensor.shape[along], index, of, groups, widths, "the axis")
    return _apart(tensor, along, groups).narrow(along + 1, start, width).flatten(along, along + 1)


register(
    Op(
        "deinterleave",
        "exact",
        (1, 1),
        (Param("index", int), Param("of", int, 3), Param("groups", int), Param("widths", tuple, (), quiet=True), AXIS),
        _deinterleave_shape,
        _deinterleave,
        example=Example(
            "deinterleave(qkv, index=0, groups=2, widths=(2, 1, 1))", {"qkv": [1, 2, 10, 100, 3, 4, 20, 200]}
        ),
    )
)


def _take_shape(shapes: Sequence[Shape], *, index: tuple[int, ...], axis: int) -> Shape:
    (shape,) = shapes
    along = axis_of(shape, axis)
    for position in index:
        if not 0 <= position < shape[along]:
            raise PlanError(f"index {position} is outside axis {axis} of a tensor of shape {show(shape)}")
    return _resized(shape, along, len(index))


def _take(tensors: Sequence[Tensor], *, index: tuple[int, ...], axis: int) -> Tensor:
    """Chooses positions along an axis, in the order given: rows of a head by label, gates of an LSTM in another order.

    Rule: torch.index_select.
    """
    import torch

    (tensor,) = tensors
    return tensor.index_select(axis, torch.tensor(index, dtype=torch.long, device=tensor.device))


def _untake(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    """By what was chosen first, where all of it was chosen at least once."""
    along = axis_of(shapes[0], params["axis"])
    index = params["index"]
    if len(set(index)) != shapes[0][along]:
        return [None]
    place = {position: at for at, position in reversed(list(enumerate(index)))}
    return [(Step("take", {"index": tuple(place[n] for n in range(shapes[0][along])), "axis": along}),)]


register(
    Op(
        "take",
        "exact",
        (1, 1),
        (Param("index", tuple), AXIS),
        _take_shape,
        _take,
        inverse=_untake,
        example=Example("take(w, index=(0, 1, 3, 2))", {"w": [[1, 1], [2, 2], [3, 3], [4, 4]]}),
    )
)


def _repeat_shape(shapes: Sequence[Shape], *, times: tuple[int, ...]) -> Shape:
    (shape,) = shapes
    if len(times) < len(shape) or any(count < 1 for count in times):
        raise PlanError(f"times={times} needs a count of 1 or more for each axis of a tensor of shape {show(shape)}")
    aligned = (1,) * (len(times) - len(shape)) + shape
    return tuple(count * length for count, length in zip(times, aligned, strict=True))


def _repeat(tensors: Sequence[Tensor], *, times: tuple[int, ...]) -> Tensor:
    """Tiles the tensor `times` along each axis; further counts in front add axes.

    Rule: torch.Tensor.repeat.
    """
    return tensors[0].repeat(times)


def _unrepeat(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    (shape,) = shapes
    if 0 in shape:
        return [None]
    aligned = (1,) * (len(params["times"]) - len(shape)) + shape
    cuts = [Step("slice", {"axis": axis, "start": 0, "stop": length}) for axis, length in enumerate(aligned)]
    return [(*cuts, Step("reshape", {"shape": shape}))]


register(
    Op(
        "repeat",
        "exact",
        (1, 1),
        (Param("times", tuple),),
        _repeat_shape,
        _repeat,
        inverse=_unrepeat,
        example=Example("repeat(b, times=(2, 2))", {"b": [1, 2]}),
    )
)


def _flip_shape(shapes: Sequence[Shape], *, axis: int) -> Shape:
    axis_of(shapes[0], axis)
    return shapes[0]


def _flip(tensors: Sequence[Tensor], *, axis: int) -> Tensor:
    """Reverses the order along an axis: RGB and BGR, a convolution and a correlation.

    Rule: torch.flip.
    """
    return tensors[0].flip(axis)


register(
    Op(
        "flip",
        "exact",
        (1, 1),
        (AXIS,),
        _flip_shape,
        _flip,
        inverse=lambda shapes, params: [(Step("flip", {"axis": params["axis"]}),)],
        example=Example("flip(w, axis=1)", {"w": [[1, 2, 3]]}),
    )
)


def _rope_shape(shapes: Sequence[Shape], *, heads: int) -> Shape:
    (shape,) = shapes
    rows = shape[axis_of(shape, 0)]
    if heads < 1 or rows % (2 * heads):
        raise PlanError(f"the {rows} rows of a tensor of shape {show(shape)} are no heads={heads} of an even width")
    return shape


def _turned(tensor: Tensor, heads: int, pairs: bool) -> Tensor:
    rows, *rest = tensor.shape
    half = rows // heads // 2
    apart = (heads, half, 2, *rest) if pairs else (heads, 2, half, *rest)
    return tensor.reshape(apart).transpose(1, 2).reshape(tensor.shape)


def _rope_permute(tensors: Sequence[Tensor], *, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * width, ...], from rotary positions that turn neighbouring pairs
    (complex numbers: Llama as published, GPT-J) to those that turn the two halves of a head (GPT-NeoX, transformers).

    Rule: transformers' PermuteForRope: view(heads, width / 2, 2), the last two axes swapped.
    """
    return _turned(tensors[0], heads, pairs=True)


def _rope_unpermute(tensors: Sequence[Tensor], *, heads: int) -> Tensor:
    """Rows of a query or key projection, [heads * width, ...], from rotary positions that turn the two halves of a
    head to those that turn neighbouring pairs: the inverse of rope_permute.

    Rule: transformers' PermuteForRope with inverse=True; torchtune's conversion from transformers.
    """
    return _turned(tensors[0], heads, pairs=False)


for _name, _back, _apply, _rows in (
    ("rope_permute", "rope_unpermute", _rope_permute, [0, 1, 2, 3, 4, 5]),
    ("rope_unpermute", "rope_permute", _rope_unpermute, [0, 2, 4, 1, 3, 5]),
):
    register(
        Op(
            _name,
            "exact",
            (1, 1),
            (Param("heads", int),),
            _rope_shape,
            _apply,
            inverse=lambda shapes, params, back=_back: [(Step(back, {"heads": params["heads"]}),)],  # type: ignore[misc]
            partners="Query and key, their biases, and norms over a head's width turn together; values do not.",
            example=Example(f"{_name}(q, heads=1)", {"q": _rows}),
        )
    )
