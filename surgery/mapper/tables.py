"""Tables of constants that weights multiply: coordinates from which a small network makes the biases of attention.

What such a network computes depends on no input, yet it is no weight moved about either: its table is to it what the
inputs are to the rest of the program. So, where a program without it cannot be filled, it is read again with these
tables as inputs, and their values are met as those of any input are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from surgery.mapper.kinds import base
from surgery.mapper.record import MOVES, Node, Tape

PRODUCTS = frozenset({"mm", "bmm", "convolution"})


@dataclass(frozen=True)
class Tables:
    """Names of the buffers that are such tables. `any`: is there a table at all, also of no name?"""

    mine: frozenset[str] = frozenset()
    theirs: frozenset[str] = frozenset()
    any: bool = False

    @classmethod
    def of(cls, target: tuple[nn.Module, Tape], reference: tuple[nn.Module, Tape]) -> Tables:
        (mine, some), (theirs, others) = _multiplied(*target), _multiplied(*reference)
        return cls(mine, theirs, some or others)


def _multiplied(module: nn.Module, tape: Tape) -> tuple[frozenset[str], bool]:
    """(buffers that are multiplied with parameters, is there a product of constants with weights?)"""
    buffers = {n for n, _ in module.named_buffers(remove_duplicate=False)}
    names: set[str] = set()
    found = False
    for node in tape.nodes:
        for table in _tables(node, tape, buffers):
            value = tape.values[table]
            found = True
            if value.name in buffers and value.origin == "param":
                names.add(value.name)
    return frozenset(names), found


def _tables(node: Node, tape: Tape, buffers: set[str]) -> Iterator[int]:
    """The factors of a product with parameters that are constants, or buffers."""
    if base(node.op) not in PRODUCTS or any(tape.values[v].data for v in node.inputs):
        return
    roots = [_root(tape, v) for v in node.inputs[:2]]
    constant = [not tape.values[r].weights or tape.values[r].name in buffers for r in roots]
    if len(roots) == 2 and sum(constant) == 1:
        yield roots[constant.index(True)]


def _root(tape: Tape, vid: int) -> int:
    """The value that this one is, moved."""
    while (made := tape.values[vid].node) >= 0 and base(tape.nodes[made].op) in MOVES:
        vid = tape.nodes[made].inputs[0]
    return vid
