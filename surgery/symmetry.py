"""Differences between two models that no output can tell: heads or neurons in another order, a bias that is left out
because a softmax cancels it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from surgery import twin
from surgery.errors import GraftError
from surgery.exercise import Item, NotFaithful, backward_slice, followed
from surgery.expr import Name, kind, names
from surgery.mapper.record import NotRecordable
from surgery.plan import WITHOUT, Row

if TYPE_CHECKING:
    from surgery.judge import Judge


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


def left_out(judge: Judge) -> Iterator[str]:
    """In words, the source's biases that the reference adds and the target does not, each with what cancels it."""
    dropped = {d.source for d in judge.plan.dropped if d.reason == WITHOUT and len(judge.source[d.source].shape) == 1}
    live = {n: next(iter(dropped & set(names(e)))) for n, e in judge.links.items() if dropped & set(names(e))}
    if not live:
        return
    at = min(range(len(judge.inputs)), key=lambda i: sum(t.numel() for t in judge.expected[i]))
    try:
        tape = judge.record_reference(at)
        outputs = tape.outputs()
        nodes = backward_slice(tape, outputs)
        for name, source in live.items():
            vid = tape.params.get(name)
            if vid is None or not tape.consumers[vid]:
                continue
            item: Item = (vid, name, 0, torch.arange(judge.source[source].shape[0]))
            with twin.math_only():
                told = followed(tape, nodes, outputs, [item])
            if told and (why := told.get((name, 0), "")):
                yield f"{source}: left out; {why}"
    except NotFaithful:
        return  # the reference's run cannot be run again: nothing is claimed
    except GraftError as error:
        if not isinstance(error.__cause__, NotRecordable):
            raise
