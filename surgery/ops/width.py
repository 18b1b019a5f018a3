"""Units chosen, copied and merged along an axis: wider, narrower, fewer heads. Each op sees one tensor; what has to
change with it is its partners' business."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from surgery.errors import PlanError
from surgery.ops.arithmetic import compute
from surgery.ops.registry import Example, Op, Param, Shape, Step, Steps, axis_of, register, show

if TYPE_CHECKING:
    from torch import Tensor

_AXIS = Param("axis", int, 0)
_UNIT = Param("unit", int, 1, quiet=True)
_PARTS = Param("parts", int, 1, quiet=True)


def units(shape: Shape, axis: int, unit: int, parts: int) -> int:
    """How many units of `unit` neighbours each of the `parts` fused parts of the axis holds."""
    length = shape[axis_of(shape, axis)]
    if unit < 1 or parts < 1 or length % (unit * parts):
        raise PlanError(
            f"axis {axis} of a tensor of shape {show(shape)} holds {length}, which does not divide into parts={parts} "
            f"of units of {unit}"
        )
    return length // (unit * parts)


def _resized(shape: Shape, axis: int, length: int) -> Shape:
    along = axis_of(shape, axis)
    return (*shape[:along], length, *shape[along + 1 :])


def chosen(tensor: Tensor, index: Sequence[int], axis: int, unit: int, parts: int) -> Tensor:
    """The units of each part in the order of `index`."""
    import torch

    along = axis % tensor.dim()
    before, after = tensor.shape[:along], tensor.shape[along + 1 :]
    apart = tensor.reshape(*before, parts, tensor.shape[along] // parts // unit, unit, *after)
    taken = apart.index_select(along + 1, torch.tensor(index, dtype=torch.long, device=tensor.device))
    return taken.reshape(*before, parts * len(index) * unit, *after)


def _first(shape: Shape, params: Mapping[str, Any], count: int) -> Steps | None:
    """The step back to the first `count` units of each part."""
    if not count:
        return None
    rest = {name: params[name] for name in ("axis", "unit", "parts")}
    if params["parts"] == 1:
        along = axis_of(shape, params["axis"])
        return (Step("slice", {"axis": along, "start": 0, "stop": count * params["unit"]}),)
    return (Step("prune_units", {"keep": tuple(range(count)), **rest}),)


def _shrink_shape(shapes: Sequence[Shape], *, to: int, axis: int, unit: int, parts: int) -> Shape:
    (shape,) = shapes
    held = units(shape, axis, unit, parts)
    if to < 1 or to % (unit * parts):
        raise PlanError(f"to={to} does not divide into parts={parts} of units of {unit}")
    if to // (unit * parts) > held:
        raise PlanError(
            f"to={to} is more than the {held * unit * parts} of axis {axis} of a tensor of shape {show(shape)}",
            hint="widen and clone_width make an axis longer",
        )
    return _resized(shape, axis, to)


def evenly(held: int, wanted: int) -> list[int]:
    """Which of `held` units a body of `wanted` takes: every n-th where n is whole, else evenly spread, both ends in."""
    import torch

    if held % wanted == 0:
        return list(range(0, held, held // wanted))
    # in float32 and rounded half to even, as the published code has it
    places: list[int] = torch.linspace(0, held - 1, wanted).round().long().tolist()
    return places


def _shrink(tensors: Sequence[Tensor], *, to: int, axis: int, unit: int, parts: int) -> Tensor:
    """A smaller body's share of an axis: every n-th unit where the lengths divide, else units spread evenly from the
    first to the last. unit=64 keeps heads of 64 whole; parts=3 chooses within each of three fused projections.

    Rule: uniform selection of Weight selection (Xu et al., arXiv 2311.18823): stride, else linspace(0, t-1, s) rounded.
    """
    held = units(tuple(tensors[0].shape), axis, unit, parts)
    return chosen(tensors[0], evenly(held, to // (unit * parts)), axis, unit, parts)


register(
    Op(
        "shrink_width",
        "lossy",
        (1, 1),
        (Param("to", int), _AXIS, _UNIT, _PARTS),
        _shrink_shape,
        _shrink,
        partners="Producer and consumer of the width, biases and norms over it, all with the same to and unit.",
        example=Example("shrink_width(w, to=2)", {"w": [[0, 0], [1, 1], [2, 2], [3, 3]]}),
    )
)


def _prune_shape(shapes: Sequence[Shape], *, keep: tuple[int, ...], axis: int, unit: int, parts: int) -> Shape:
    (shape,) = shapes
    held = units(shape, axis, unit, parts)
    if not keep or len(set(keep)) != len(keep) or not all(0 <= place < held for place in keep):
        raise PlanError(f"keep={keep} needs different numbers from 0 to {held - 1}, at least one")
    return _resized(shape, axis, parts * len(keep) * unit)


def _prune(tensors: Sequence[Tensor], *, keep: tuple[int, ...], axis: int, unit: int, parts: int) -> Tensor:
    """The units of an axis that are kept, in that order; the others are gone. parts=3 for three fused projections.

    Rule: torch.index_select; structured pruning (Li et al., arXiv 1608.08710).
    """
    return chosen(tensors[0], keep, axis, unit, parts)


register(
    Op(
        "prune_units",
        "lossy",
        (1, 1),
        (Param("keep", tuple), _AXIS, _UNIT, _PARTS),
        _prune_shape,
        _prune,
        partners="Producer and consumer of the width, biases and norms over it, all with the same keep.",
        example=Example("prune_units(w, keep=(0, 2))", {"w": [[0, 0], [1, 1], [2, 2]]}),
    )
)


def _heads(shape: Shape, heads: int, axis: int, parts: int) -> int:
    """The width of a head."""
    length = shape[axis_of(shape, axis)]
    if heads < 1 or parts < 1 or length % (heads * parts):
        raise PlanError(
            f"axis {axis} of a tensor of shape {show(shape)} holds {length}, which does not divide into heads={heads}"
            + (f" in each of parts={parts}" if parts != 1 else "")
        )
    return length // (heads * parts)


def _prune_heads_shape(shapes: Sequence[Shape], *, heads: int, drop: tuple[int, ...], axis: int, parts: int) -> Shape:
    (shape,) = shapes
    width = _heads(shape, heads, axis, parts)
    if len(set(drop)) != len(drop) or not all(0 <= head < heads for head in drop) or len(drop) == heads:
        raise PlanError(f"drop={drop} needs different numbers from 0 to {heads - 1}, and not all of them")
    return _resized(shape, axis, parts * (heads - len(drop)) * width)


def _prune_heads(tensors: Sequence[Tensor], *, heads: int, drop: tuple[int, ...], axis: int, parts: int) -> Tensor:
    """A projection without some of its heads: rows of query, key and value (axis 0, parts=3 where they are fused),
    columns of the output projection (axis 1).

    Rule: Michel et al., arXiv 1905.10650; transformers.pytorch_utils.prune_linear_layer.
    """
    width = _heads(tuple(tensors[0].shape), heads, axis, parts)
    return chosen(tensors[0], [head for head in range(heads) if head not in drop], axis, width, parts)


register(
    Op(
        "prune_heads",
        "lossy",
        (1, 1),
        (Param("heads", int), Param("drop", tuple), _AXIS, _PARTS),
        _prune_heads_shape,
        _prune_heads,
        partners="Query, key and value with their biases (axis 0), the output projection (axis 1), tables with one "
        "column for each head.",
        example=Example("prune_heads(q, heads=3, drop=(1,))", {"q": [0, 1, 2, 3, 4, 5]}),
    )
)


def _gqa_shape(shapes: Sequence[Shape], *, heads: int, groups: int, axis: int) -> Shape:
    (shape,) = shapes
    width = _heads(shape, heads, axis, 1)
    if groups < 1 or heads % groups:
        raise PlanError(f"heads={heads} do not divide into groups={groups}")
    return _resized(shape, axis, groups * width)


def _gqa(tensors: Sequence[Tensor], *, heads: int, groups: int, axis: int) -> Tensor:
    """A key or value projection, weight or bias, of `heads` heads for grouped-query attention: neighbouring heads make
    a group, and each group the mean of theirs. groups=1 is multi-query attention.

    Rule: Ainslie et al., arXiv 2305.13245: mean pooling of the projections.
    """
    (tensor,) = tensors
    along = axis % tensor.dim()
    before, after = tensor.shape[:along], tensor.shape[along + 1 :]
    width = tensor.shape[along] // heads

    def pooled(value: Tensor) -> Tensor:
        apart = value.reshape(*before, groups, heads // groups, width, *after)
        return apart.mean(dim=along + 1).reshape(*before, groups * width, *after)

    return compute(pooled, tensor)


register(
    Op(
        "mha_to_gqa",
        "approximate",
        (1, 1),
        (Param("heads", int), Param("groups", int), _AXIS),
        _gqa_shape,
        _gqa,
        partners="Key and value projections and their biases; query and output projection stay.",
        example=Example("mha_to_gqa(k, heads=4, groups=2)", {"k": [[1.0], [3.0], [5.0], [9.0]]}),
    )
)


def _clone_shape(shapes: Sequence[Shape], *, times: tuple[int, ...], inputs: int, parts: int) -> Shape:
    (shape,) = shapes
    if len(times) != len(shape) or any(count < 1 for count in times):
        raise PlanError(f"times={times} needs a count of 1 or more for each axis of a tensor of shape {show(shape)}")
    if inputs < -1:
        raise PlanError(f"inputs={inputs} is no axis; -1 says that none of them takes inputs")
    if shape:
        units(shape, 0, 1, parts)
    elif parts != 1:
        raise PlanError(f"a scalar has no parts={parts}")
    return tuple(count * length for count, length in zip(times, shape, strict=True))


def _clone(tensors: Sequence[Tensor], *, times: tuple[int, ...], inputs: int, parts: int) -> Tensor:
    """A weight for a width that is `times` as large: tiled along each axis, and divided by the count along the axis
    of its inputs. A bias or a norm has one axis and is tiled only; an embedding, which takes no inputs of that width,
    has inputs=-1. parts=3 tiles each of three projections that are fused along axis 0 by itself.

    Rule: HyperCloning (Samragh et al., arXiv 2409.12903), without noise: W.repeat(n0, n1) / n1.
    """
    (tensor,) = tensors
    tiled = tensor
    if parts > 1 and times[0] > 1:
        apart = tensor.reshape(parts, tensor.shape[0] // parts, *tensor.shape[1:])
        wide = [count * length for count, length in zip(times, tensor.shape, strict=True)]
        tiled = apart.repeat(1, *times).reshape(wide)
    elif times:
        tiled = tensor.repeat(times)
    count = times[inputs] if 0 <= inputs < len(times) else 1
    return compute(lambda value: value / count, tiled) if count > 1 else tiled


def _unclone(shapes: Sequence[Shape], params: Mapping[str, Any]) -> list[Steps | None]:
    (shape,) = shapes
    times, inputs = params["times"], params["inputs"]
    if 0 in shape or params["parts"] > 1:
        return [None]
    steps = [Step("slice", {"axis": axis, "start": 0, "stop": length}) for axis, length in enumerate(shape)]
    if 0 <= inputs < len(times):
        steps.append(Step("scale", {"by": float(times[inputs])}))
    return [tuple(steps)]


register(
    Op(
        "clone_width",
        "preserving",
        (1, 1),
        (Param("times", tuple), Param("inputs", int, 1, quiet=True), _PARTS),
        _clone_shape,
        _clone,
        inverse=_unclone,
        partners="Every tensor of the width: producers, consumers, biases, norms, embeddings and head.",
        example=Example("clone_width(w, times=(2, 2))", {"w": [[2.0, 4.0]]}),
    )
)


def _widen_shape(
    shapes: Sequence[Shape], *, to: int, axis: int, seed: int, share: int, spread: str, unit: int, parts: int
) -> Shape:
    (shape,) = shapes
    held = units(shape, axis, unit, parts)
    if to < 1 or to % (unit * parts):
        raise PlanError(f"to={to} does not divide into parts={parts} of units of {unit}")
    wanted = to // (unit * parts)
    if wanted < held or not held:
        raise PlanError(
            f"to={to} is less than the {held * unit * parts} of axis {axis} of a tensor of shape {show(shape)}"
            if held
            else f"axis {axis} of a tensor of shape {show(shape)} holds nothing to copy",
            hint="shrink_width makes an axis shorter" if held else "",
        )
    if share not in (0, 1):
        raise PlanError(f"share={share} is neither 1, for what consumes the width, nor 0, for what makes it")
    if spread not in ("random", "even"):
        raise PlanError(f'spread="{spread}" is none of random, even')
    if not 0 <= seed < 2**63:
        raise PlanError(f"seed={seed} is no seed: 0 to 2^63 - 1")
    return _resized(shape, axis, to)


def replicas(held: int, wanted: int, seed: int, spread: str) -> list[int]:
    """Which unit each of `wanted` is a copy of: the first `held` are themselves."""
    import torch

    if spread == "even":
        return [place % held for place in range(wanted)]
    generator = torch.Generator().manual_seed(seed)
    more: list[int] = torch.randint(held, (wanted - held,), generator=generator).tolist()
    return [*range(held), *more]


def _widen(
    tensors: Sequence[Tensor], *, to: int, axis: int, seed: int, share: int, spread: str, unit: int, parts: int
) -> Tensor:
    """An axis of `to` units, the old ones and copies of some of them, drawn at random by `seed`, or in turn with
    spread="even". What consumes the width has share=1: each copy's weights are divided by the number of copies. The
    function is the same where nothing reduces over the axis between (a LayerNorm does, unless every unit has as many
    copies).

    Rule: Net2WiderNet (Chen et al., arXiv 1511.05641), without noise.
    """
    import torch

    (tensor,) = tensors
    held = units(tuple(tensor.shape), axis, unit, parts)
    index = replicas(held, to // (unit * parts), seed, spread)
    wide = chosen(tensor, index, axis, unit, parts)
    if not share:
        return wide
    counts = torch.bincount(torch.tensor(index), minlength=held)[index].repeat_interleave(unit).repeat(parts)
    along = axis % tensor.dim()
    divisor = counts.reshape(-1, *[1] * (tensor.dim() - along - 1)).to(tensor.device)
    return compute(lambda value: value / divisor, wide)


register(
    Op(
        "widen",
        "preserving",
        (1, 1),
        (
            Param("to", int),
            _AXIS,
            Param("seed", int, 0),
            Param("share", int, 0),
            Param("spread", str, "random", quiet=True),
            _UNIT,
            _PARTS,
        ),
        _widen_shape,
        _widen,
        inverse=lambda shapes, params: [
            None
            if params["share"]
            else _first(shapes[0], params, units(shapes[0], params["axis"], params["unit"], params["parts"]))
        ],
        partners="Producer and its bias share=0, consumer share=1, all with the same seed, spread and unit.",
        example=Example('widen(w, to=4, axis=1, share=1, spread="even")', {"w": [[2.0, 4.0]]}),
    )
)
