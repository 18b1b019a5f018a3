"""Differences between two models that no output can tell, seen in a plan's rows: heads or neurons in another order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from surgery.expr import Name, kind, names
from surgery.plan import Row


def reordered(rows: Iterable[Row], values: Mapping[str, Tensor], read: Mapping[str, Tensor]) -> Iterator[str]:
    """In words, the rows that take all lines of one source tensor, in another order than it has them. The proof that
    they are in shows that what takes the lines takes them in that order too.

    values: by target name, what the rows make; read: by source name, the tensors that are in memory.
    """
    for row in rows:
        if row.expr is None or isinstance(row.expr, Name) or kind(row.expr) != "exact" or row.target not in values:
            continue
        sources = list(dict.fromkeys(names(row.expr)))
        if len(sources) != 1 or sources[0] not in read:
            continue
        made, source = values[row.target], read[sources[0]]
        if made.shape != source.shape or not made.is_floating_point() or torch.equal(made, source.to(made.dtype)):
            continue
        for axis in range(min(2, made.ndim)):
            a, b = (t.movedim(axis, 0).reshape(t.shape[axis], -1).double() for t in (made, source))
            if len(a) > 1 and torch.equal(a[a[:, 0].argsort()], b[b[:, 0].argsort()]):
                line = "rows" if axis == 0 else "columns"
                yield f"{row.target}: its {line} are those of {sources[0]} in another order, which no output can tell"
                break
