"""Gradients of a recorded run a piece at a time: what lies between two cuts is computed again when it is walked back.

A graph of the whole run holds every activation, and every weight raised to float64. Here only what crosses a cut is
held. Cuts are where little crosses, which in a stack of blocks is between two of them. The gradients are those of the
whole run (Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.gradients import Deferring, largest
from surgery.mapper.record import Tape

PIECE = 1 << 25  # bytes that a piece computes, at least
STATES = 1 << 26  # bytes that cross the cuts, up to which all of them are held
WINDOW = 32  # and at most so many times as much: a cut is where the least crosses, between the two

Replay = Callable[[list[int], Mapping[int, Tensor], list[int]], dict[int, Tensor]]  # nodes, leaves, values to keep


@dataclass(frozen=True)
class Piece:
    """Nodes that are walked back together, and the values that they take from earlier pieces."""

    nodes: list[int]
    taken: list[int]


def cut(tape: Tape, nodes: list[int], outputs: list[int]) -> list[Piece]:
    """The nodes in pieces, in order."""
    sizes = [sum(_bytes(tape, o) for o in tape.nodes[index].outs if o >= 0) for index in nodes]
    crossing = _crossing(tape, nodes, outputs)
    ends: list[int] = []
    at = 0
    while at < len(nodes):
        total, best = 0, len(nodes)
        for i in range(at, len(nodes)):
            total += sizes[i]
            if total >= PIECE * WINDOW and best < len(nodes):
                break
            if total >= PIECE and (best == len(nodes) or crossing[i + 1] < crossing[best]):
                best = i + 1
        ends.append(best)
        at = best
    made: set[int] = set()
    pieces, start = [], 0
    for end in ends:
        part = nodes[start:end]
        later = {v for index in nodes[start:] for v in tape.nodes[index].inputs} | set(outputs)
        pieces.append(Piece(part, sorted(made & later)))
        made |= {o for index in part for o in tape.nodes[index].outs if o >= 0 and tape.values[o].origin == "node"}
        start = end
    return pieces


def _bytes(tape: Tape, vid: int) -> int:
    return 8 * math.prod(tape.values[vid].shape)


def _crossing(tape: Tape, nodes: list[int], outputs: list[int]) -> list[int]:
    """Before each node, and at the end: the bytes of what was computed and is still needed."""
    last = {v: i for i, index in enumerate(nodes) for v in tape.nodes[index].inputs}
    last |= dict.fromkeys(outputs, len(nodes))
    change = [0] * (len(nodes) + 2)
    for i, index in enumerate(nodes):
        for o in tape.nodes[index].outs:
            if o >= 0 and o in last:
                change[i + 1] += _bytes(tape, o)
                change[last[o] + 1] -= _bytes(tape, o)
    found, total = [], 0
    for each in change[: len(nodes) + 1]:
        total += each
        found.append(total)
    return found


def pulled(
    tape: Tape,
    nodes: list[int],
    outputs: list[int],
    leaves: Mapping[int, Tensor],
    replay: Replay,
    total_of: Callable[[Mapping[int, Tensor]], Tensor | None],
) -> dict[int, list[Tensor]]:
    """For each leaf and each of its axes, the largest gradient in each line of the number that `total_of` makes of the
    outputs; of the same numbers as surgery.gradients.pulled."""
    pieces = cut(tape, nodes, outputs)
    stages = _stages(tape, pieces)
    ends = [*stages[1:], len(pieces)]
    with torch.no_grad():
        starts: list[dict[int, Tensor]] = []
        known: dict[int, Tensor] = {}
        for first, end in zip(stages, ends, strict=True):
            starts.append({v: known[v] for v in pieces[first].taken})
            known = _states(pieces, first, end, starts[-1], leaves, outputs, replay)[-1]
    grads = _of_outputs(known, outputs, total_of)
    known = {}
    used: dict[int, int] = {}  # of each leaf, the first piece that uses it, which is walked back last
    for i, piece in reversed(list(enumerate(pieces))):
        used |= {v: i for index in piece.nodes for v in tape.nodes[index].inputs if v in leaves}
    done: dict[int, list[Tensor]] = {}
    for first, end in reversed(list(zip(stages, ends, strict=True))):
        with torch.no_grad():
            states = _states(pieces, first, end - 1, starts.pop(), leaves, outputs, replay, all_of=True)
        for i in reversed(range(first, end)):
            last = {v for v, at in used.items() if at == i}
            with torch.enable_grad():
                _walk_back(tape, pieces[i], states.pop(), leaves, grads, replay, last, done)
    return done


def _stages(tape: Tape, pieces: list[Piece]) -> list[int]:
    """The first pieces of the stages that are run again as wholes, so that of n states that would have to be held only
    about twice the root of n are, at the price of one more run. One stage, where they are small."""
    sizes = [sum(_bytes(tape, v) for v in piece.taken) for piece in pieces]
    if sum(sizes) <= STATES:
        return [0]
    stages, held = [0], 0
    for i, size in enumerate(sizes):
        if held + size > sum(sizes) / math.sqrt(len(sizes)) and i > stages[-1]:
            stages.append(i)
            held = 0
        held += size
    return stages


def _states(
    pieces: list[Piece],
    first: int,
    end: int,
    start: dict[int, Tensor],
    leaves: Mapping[int, Tensor],
    outputs: list[int],
    replay: Replay,
    *,
    all_of: bool = False,
) -> list[dict[int, Tensor]]:
    """What the pieces from `first` up to `end` itself take, run from `start` on; or only what the last of them takes.
    After the last piece, the outputs."""
    states = [start]
    for i in range(first, end):
        keep = pieces[i + 1].taken if i + 1 < len(pieces) else outputs
        found = replay(pieces[i].nodes, {**leaves, **states[-1]}, keep)
        state = {v: found[v] for v in keep if v in found}
        states = [*states, state] if all_of else [state]
    return states


def _of_outputs(
    known: Mapping[int, Tensor], outputs: list[int], total_of: Callable[[Mapping[int, Tensor]], Tensor | None]
) -> dict[int, Tensor]:
    ends = {v: known[v].detach() for v in outputs if v in known}
    for t in ends.values():
        if t.is_floating_point() or t.is_complex():
            t.requires_grad_()
    with torch.enable_grad():
        total = total_of(ends)
        if total is None or not total.requires_grad:
            return {}
        total.backward()
    return {v: t.grad for v, t in ends.items() if t.grad is not None}


def _walk_back(
    tape: Tape,
    piece: Piece,
    state: Mapping[int, Tensor],
    leaves: Mapping[int, Tensor],
    grads: dict[int, Tensor],
    replay: Replay,
    last: set[int],
    done: dict[int, list[Tensor]],
) -> None:
    """One piece: the gradients of what it computed become those of what it took, and of its leaves. `last`: the leaves
    that no earlier piece uses, whose gradients are complete then."""
    made = {o for index in piece.nodes for o in tape.nodes[index].outs if o in grads}
    taken = {v: t.detach() for v, t in state.items()}
    for t in taken.values():
        if t.is_floating_point() or t.is_complex():
            t.requires_grad_()
    if made:
        known = replay(piece.nodes, {**leaves, **taken}, sorted(made))
        ends = [(known[v], grads.pop(v)) for v in sorted(made)]
        ends = [(t, g) for t, g in ends if t.requires_grad]
        used = {v for index in piece.nodes for v in tape.nodes[index].inputs}
        inputs = [t for v, t in taken.items() if v in used and t.requires_grad]
        inputs += [t for v, t in leaves.items() if v in used and t.requires_grad]
        if ends and inputs:
            handles = [_when_complete(v, leaves[v], done) for v in last if v in leaves]
            try:
                with Deferring():
                    torch.autograd.backward([t for t, _ in ends], [g for _, g in ends], inputs=inputs)
            finally:
                for handle in handles:
                    handle.remove()
        for v, t in taken.items():
            if t.grad is not None:
                grads[v] = grads[v] + t.grad if v in grads else t.grad
    for v in last:  # what later pieces left, where this one came to nothing
        grad = leaves[v].grad
        if grad is not None:
            done[v] = largest(grad.detach())
            leaves[v].grad = None


def _when_complete(vid: int, leaf: Tensor, done: dict[int, list[Tensor]]) -> torch.utils.hooks.RemovableHandle:
    """Its gradient is looked at as soon as it is there, and not kept."""

    def look(held: Tensor) -> None:
        assert held.grad is not None
        done[vid] = largest(held.grad.detach())
        held.grad = None

    return leaf.register_post_accumulate_grad_hook(look)
