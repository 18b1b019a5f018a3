"""What goes wrong inside attention: its mask, the axis of its softmax, the order of its heads, its operands.

As in surgery.causes, each is tried on the target's run. What the reference hides is read off its softmax.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from surgery import twin
from surgery.mapper.record import MOVES
from surgery.pairing import SOFTMAX, Edit, Found, Place, Untold, op_name, recalled


def softmax_axis(place: Place) -> Iterator[Found]:
    run = place.pair.ours
    for index in [i for i in place.ours_after[:30] if op_name(run.tape.nodes[i]) in SOFTMAX][:2]:
        node = run.tape.nodes[index]
        axis = node.args[1]
        ndim = len(run.tape.values[node.inputs[0]].shape)
        for other in range(ndim):
            if other % ndim != axis % ndim:
                args = (node.args[0], other, *node.args[2:])
                edit = Edit(ops={index: recalled(node.op, args, node.kwargs)})
                if place.ok(edit):
                    said = f"its softmax is over axis {axis % ndim - ndim}, the source's over {other - ndim}"
                    yield Found("softmax axis", said, edit, index)


def mask(place: Place) -> Iterator[Found]:
    """The reference's softmax hides other places."""
    run, other = place.pair.ours, place.pair.theirs
    theirs = [t for t in place.theirs_after[:60] if op_name(other.tape.nodes[t]) in SOFTMAX]
    for index in [i for i in place.ours_after[:30] if op_name(run.tape.nodes[i]) in SOFTMAX][:2]:
        node = run.tape.nodes[index]
        into = node.inputs[0]
        base = _unmasked(place, into)
        try:
            scores, ours = run.held(base), run.held(node.outs[0])
        except Untold:
            continue
        for t in theirs:
            p = other.tape.values[other.tape.nodes[t].outs[0]].tensor
            if p is None or p.numel() != scores.numel() or p.shape[-1] != scores.shape[-1]:
                continue
            hidden = (twin.lift(p) == 0).reshape(scores.shape)
            edit = Edit(leaves={into: scores.masked_fill(hidden, -torch.inf)})
            if place.ok(edit):
                yield Found("mask", _about_mask(ours.reshape(scores.shape) == 0, hidden), edit, index)
        bare = Edit(leaves={into: scores})
        if base != into and place.ok(bare):
            yield Found("mask", "it masks attention where the source masks nothing", bare, index)


def _unmasked(place: Place, vid: int) -> int:
    """Attention scores before what depends on no weight was added or filled in."""
    run = place.pair.ours
    for _ in range(12):
        value = run.tape.values[vid]
        node = run.tape.nodes[value.node] if value.node >= 0 else None
        if node is None or op_name(node) not in ("add", "sub", "masked_fill", "where", "maximum", *MOVES, "mul"):
            break
        weighed = [v for v in node.inputs if run.tape.values[v].weights and run.tape.values[v].data]
        free = [v for v in node.inputs if not run.tape.values[v].weights]
        if len(weighed) != 1 or run.tape.values[weighed[0]].shape != value.shape:
            break
        if not free and op_name(node) in ("add", "sub", "where", "mul"):
            break
        vid = weighed[0]
    return vid


def _about_mask(ours: Tensor, theirs: Tensor) -> str:
    t, s = ours.shape[-1], ours.shape[-2]
    causal = torch.ones(s, t, dtype=torch.bool, device=ours.device).triu(1)
    if not bool(ours.any()):
        what = "the source is causal" if s == t and bool((theirs & causal == causal).all()) else "the source hides some"
        return f"its attention hides nothing, {what}: the mask is missing"
    if bool((ours != theirs).all()) or bool((ours == ~theirs)[..., 0, :].all()):
        return "its mask is inverted: it hides what the source shows"
    both = s == t and all(bool((m & causal == causal).all()) for m in (ours, theirs))
    if both:
        return "its mask hides other places of the past than the source's: padding, or a window"
    if s == t and bool((theirs & causal == causal).all()) and bool((ours & causal.triu(2) == causal.triu(2)).all()):
        return "its causal mask is off by one: it shows the next place"
    if s == t and bool((ours & causal == causal).all()) and not bool((theirs & causal == causal).all()):
        return "its attention is causal, the source's is not"
    if s == t and bool((theirs & causal == causal).all()):
        return "its attention is not causal, the source's is"
    return "its mask hides other places than the source's"


def swapped_operands(place: Place) -> Iterator[Found]:
    """The scores are the source's, transposed: query and key stand in each other's place."""
    run = place.pair.ours
    upstream = run.before(run.tape.nodes[place.first].inputs, 16, data=True)
    for index in [place.first, *upstream]:
        node = run.tape.nodes[index]
        if op_name(node) not in ("bmm", "mm") or len(run.data_inputs(index)) != 2:
            continue
        shape = run.tape.values[node.outs[0]].shape
        if len(shape) < 2 or shape[-1] != shape[-2]:
            continue
        edit = Edit(ops={index: lambda args, kwargs: (args[0] @ args[1]).transpose(-1, -2).contiguous()})
        if place.ok(edit):
            module = _maker(place, index)
            yield Found("swapped query and key", "query and key are swapped", edit, index, module)


def _maker(place: Place, index: int) -> str | None:
    """The module whose weights made what goes into a node."""
    run = place.pair.ours
    for n in run.before(run.data_inputs(index), 16, data=True):
        if any(run.tape.values[v].weights and not run.tape.values[v].data for v in run.tape.nodes[n].inputs):
            return run.tape.nodes[n].module
    return None


def heads(place: Place) -> Iterator[Found]:
    """An axis is cut into the same numbers in another order: heads first, or each head's width first."""
    run = place.pair.ours
    upstream = [*run.before(run.tape.nodes[place.first].inputs, 40, data=True), *place.ours_after[:24]]
    views: dict[int, list[list[int]]] = {}
    for index in upstream:
        node = run.tape.nodes[index]
        if op_name(node) not in ("view", "_unsafe_view", "reshape"):
            continue
        before = list(run.tape.values[node.inputs[0]].shape)
        after = list(run.tape.values[node.outs[0]].shape)
        for k in (2, 3):
            if before and len(after) >= k + 1 and math.prod(after[-k:]) == before[-1] and 1 not in after[-k:]:
                views[index] = [list(p) for p in _orders(k)]
                break
    by_module: dict[str, list[int]] = {}
    for v in sorted(views):
        by_module.setdefault(run.tape.nodes[v].module, []).append(v)
    groups: list[list[int]] = [*by_module.values(), list(views), *([v] for v in views)]
    for group in groups:
        k = min((len(views[v][0]) for v in group), default=0)
        for order in _orders(k):
            edit = Edit(ops={v: _reordered(order) for v in group if len(views[v][0]) == k})
            if place.ok(edit):
                at = min(group)
                yield Found("head order", "its heads are cut in another order than the source's", edit, at)
                return


def _orders(k: int) -> list[tuple[int, ...]]:
    return [p for p in itertools.permutations(range(k)) if p != tuple(range(k))]


def _reordered(order: tuple[int, ...]) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    def run(args: tuple[Any, ...], _: dict[str, Any]) -> Tensor:
        x, size = args[0], list(args[1])
        k = len(order)
        size = list(x.reshape(size).shape)
        cut = size[-k:]
        y = x.reshape(*size[:-k], *(cut[i] for i in order))
        n = len(size) - k
        back = [order.index(i) for i in range(k)]
        return y.permute(*range(n), *(n + b for b in back)).contiguous()

    return run
