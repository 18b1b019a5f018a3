"""Products with weights that are spelt as something else, and look-ups that are spelt as a product.

A product of rows that hold one 1 and zeros (one-hot words, positions or buckets) looks rows of the weights up. A value
that is scaled by weights and summed along the axes of that scale (a weighted sum of layers, a score) is a product with
a matrix. Each is written down as what it is, so that programs that spell it either way leave comparable tapes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from surgery.mapper.canon import Recorder

aten = torch.ops.aten


def mm(r: Recorder, x: Any, w: Any) -> Any:
    if _looks_up(r, x, w, -1):
        return _rows(r, w, x, -1)
    if _looks_up(r, w, x, 0):  # a transposed look-up
        return _contiguous(r, r.call(aten.t.default, _rows(r, r.call(aten.t.default, x), w, 0)))
    return _scaled_last(r, aten.mm.default, x, w)


def _scaled_last(r: Recorder, op: Any, x: Any, w: Any) -> Any:
    """(x * s) @ y is (x @ y) * s for a weight s of one element: the scale comes last, however it was written."""
    for i, t in enumerate((x, w)):
        found = r.scaled(t)
        if found is not None and found[1].numel() == 1 and found[0].shape == t.shape:
            value, scale = found
            y = r.call(op, *((value, w) if i == 0 else (x, value)))
            return r.call(aten.mul.Tensor, y, r.call(aten.view.default, scale, []) if scale.ndim else scale)
    return r.call(op, x, w)


def bmm(r: Recorder, x: Any, w: Any) -> Any:
    if x.shape[0] == 1 and (_looks_up(r, x, w, -1) or _looks_up(r, w, x, 1)):
        y = mm(r, *(r.call(aten.squeeze.dim, t, 0) for t in (x, w)))
        return r.call(aten.unsqueeze.default, y, 0)
    return _scaled_last(r, aten.bmm.default, x, w)


def _looks_up(r: Recorder, x: Tensor, w: Tensor, axis: int) -> bool:
    """Does every line of x along this axis hold one 1 and zeros, whatever the weights, and is w made of weights? A line
    of one element is no choice of a row."""
    if (
        x.shape[axis] < 2
        or not x.numel()
        or not x.is_floating_point()
        or not r.weights_only(w)
        or not r.weights_free(x)
    ):
        return False
    first = x.select(-1 if axis in (0, 1) else -2, 0)  # most inputs are told by one line
    if not bool(((first == 0) | (first == 1)).all()):
        return False
    return bool(((x == 0) | (x == 1)).all()) and bool((x.sum(axis) == 1).all())


def _rows(r: Recorder, w: Tensor, x: Tensor, axis: int) -> Any:
    return r.call(aten.index.Tensor, w, [r.call(aten.argmax.default, x, axis)])


def summed(r: Recorder, x: Any, dims: Any = None, keep: bool = False, *, dtype: Any = None) -> Any:
    """A sum; of a value that was scaled by weights along the very axes that are summed, a product with a matrix."""
    found = r.scaled(x) if dims else None
    if found is None or dtype not in (None, torch.float64):
        return r.call(aten.sum.dim_IntList, x, dims, keep, **({} if dtype is None else {"dtype": dtype}))
    value, w = found
    over = sorted({d % x.ndim for d in dims})
    full = [1] * (x.ndim - w.ndim) + list(w.shape)
    shared = [a for a in range(x.ndim) if a not in over and full[a] > 1]  # a matrix for each of these (each head)
    if any(full[a] != x.shape[a] for a in over) or math.prod(full[a] for a in over) < 2:
        return r.call(aten.sum.dim_IntList, x, dims, keep)
    free = [a for a in range(x.ndim) if a not in over and a not in shared]
    sizes = [math.prod(x.shape[a] for a in axes) for axes in (shared, free, over)]
    value = value if value.shape == x.shape else r.call(aten.expand.default, value, list(x.shape))
    rows = r.call(aten.reshape.default, r.call(aten.permute.default, value, [*shared, *free, *over]), sizes)
    w = r.call(aten.permute.default, r.call(aten.view.default, w, full), [*shared, *over, *free])
    w = r.call(aten.reshape.default, w, [sizes[0], sizes[2], 1])
    if not shared:
        rows, w = (r.call(aten.squeeze.dim, t, 0) for t in (rows, w))
    y = r.call(aten.bmm.default if shared else aten.mm.default, rows, w)
    kept = [*shared, *free]
    y = r.call(aten.view.default, y, [x.shape[a] for a in kept])
    y = r.call(aten.permute.default, y, [kept.index(a) for a in sorted(kept)])
    y = _contiguous(r, y)
    return r.call(aten.view.default, y, [1 if a in over else n for a, n in enumerate(x.shape)]) if keep else y


def _contiguous(r: Recorder, y: Tensor) -> Any:
    """Laid out as the operator in place of which it stands lays its result out: the program may view it."""
    return y if y.is_contiguous() else r.call(aten.clone.default, y, memory_format=torch.contiguous_format)


def grouped(r: Recorder, x: Any, w: Any, offs: Any = None, bias: Any = None, out_dtype: Any = None) -> Any:
    """Experts in one kernel, each with rows of its own: rows offs[n - 1] to offs[n] of x times w[n]. A product for
    each; rows behind the last are zeros."""
    if x.ndim != 2 or w.ndim != 3 or offs is None or bias is not None:
        return r.call(aten._grouped_mm.default, x, w, offs, bias, out_dtype)
    parts, at = [], 0
    for n in range(w.shape[0]):
        end = int(r.call(aten._local_scalar_dense.default, r.call(aten.select.int, offs, 0, n)))
        if end > at:
            parts.append(mm(r, r.call(aten.slice.Tensor, x, 0, at, end), r.call(aten.select.int, w, 0, n)))
        at = max(at, end)
    if at < x.shape[0] or not parts:
        parts.append(x.new_zeros(x.shape[0] - at, w.shape[2]))
    return r.call(aten.cat.default, parts)
