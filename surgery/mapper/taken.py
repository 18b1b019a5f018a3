"""Lines of a tensor taken in an order of their own: a table looked up by a fixed index, and laid out anew."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor


def lines(shape: tuple[int, ...], local: Tensor, most: int) -> Iterator[tuple[int, list[int], tuple[int, ...], Tensor]]:
    """Positions in a tensor of `shape` as those in one that holds some of its lines along one axis, at most `most` of
    them: (axis, which lines, the shape of that tensor, positions in it).

    So a table of biases, looked up once for every pair of places, is a tensor of the pairs with its axes moved.
    """
    if local.numel() == 0 or int(local.max()) >= math.prod(shape):
        return
    for axis, per in enumerate(shape):
        inner = math.prod(shape[axis + 1 :])
        line = (local // inner) % per
        rest = local // (inner * per) * inner + local % inner  # where it stands, but for the axis
        along = _moving(line)
        if not along or along & _moving(rest):
            continue
        index = line[tuple(slice(None) if a in along else 0 for a in range(local.ndim))].reshape(-1)
        if len(index) > most:
            continue
        place = torch.arange(len(index)).reshape([n if a in along else 1 for a, n in enumerate(local.shape)])
        taken = rest // inner * (inner * len(index)) + place * inner + rest % inner
        yield axis, index.tolist(), (*shape[:axis], len(index), *shape[axis + 1 :]), taken


def _moving(t: Tensor) -> set[int]:
    """The axes along which it is not the same everywhere."""
    return {a for a, n in enumerate(t.shape) if n > 1 and not bool((t == t.narrow(a, 0, 1)).all())}
