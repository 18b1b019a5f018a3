"""The right numbers in a wrong place: another order of elements, another input, another weight, another table.

A fingerprint does not see an order, so that two runs may part long after one of them was laid out in another way: here
values that both have are compared element by element. As in surgery.causes, each is tried on the target's run.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from surgery.mapper.record import MOVES, Node, Ref, fingerprint, same
from surgery.pairing import MATCH, UNFIT, Edit, Found, Place, Run, Untold, op_name

PRODUCTS = ("mm", "bmm", "convolution")
_ARITHMETIC = ("mul", "add", "sub", "div")
_MOST_AXES = 5
_TRIALS = 40


def layouts(theirs: Tensor, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """One of the reference's values in our layout: axes in any order, cut or joined where they lie side by side."""
    if theirs.numel() != math.prod(shape):
        return
    if len(shape) > _MOST_AXES:
        yield theirs.reshape(shape)
        return
    wide = [a for a, n in enumerate(shape) if n != 1]
    for order in itertools.permutations(wide):
        cut = theirs.reshape([shape[a] for a in order])
        back = [order.index(a) for a in wide]
        yield cut.permute(back).reshape(shape) if back else cut.reshape(shape)


def _close(a: Tensor, b: Tensor) -> bool:
    return bool(((a - b).abs() <= MATCH * b.abs().max().clamp(min=1e-300)).all())


def order(place: Place) -> Iterator[Found]:
    """The elements of a value that both have stand in another order: rolled, turned, joined or cut otherwise."""
    run, other = place.pair.ours, place.pair.theirs
    nodes = sorted({*run.before(run.data_inputs(place.first), 60, data=True), *place.ours_after[:16]})
    known: dict[int, bool] = {}
    tried = 0

    def lies_alike(vid: int) -> bool:
        if vid not in known:
            known[vid] = _lies_alike(place, vid)
        return known[vid]

    for index in nodes:
        if op_name(run.tape.nodes[index]) in PRODUCTS:
            continue  # the order of a weight's rows: surgery.wrong_weights
        if time.monotonic() > place.until or tried > _TRIALS:
            return
        for o in run.tape.nodes[index].outs:
            if o < 0 or run.both[o] is not True or not run.twins.get(o) or lies_alike(o):
                continue
            if not all(lies_alike(v) for v in run.data_inputs(index)):
                continue  # it was so before
            y = run.held(o)
            for w in run.twins[o][:3]:
                for z in layouts(other.held(w), tuple(y.shape)):
                    tried += 1
                    edit = Edit(leaves={o: z.contiguous()})
                    if place.ok(edit):
                        cause, said = _order_of(y, z, run.tape.nodes[index])
                        edit = _likewise(place, edit, index)
                        yield Found(cause, said, edit, index, place.scope(run.tape.nodes[index].module))
                        return


def _likewise(place: Place, edit: Edit, index: int) -> Edit:
    """The change, with other values of the same module that lie otherwise (value beside key), where that mends more."""
    run, other = place.pair.ours, place.pair.theirs
    module = run.tape.nodes[index].module
    nodes = [n for n in range(index + 1, min(index + 60, len(run.tape.nodes))) if run.tape.nodes[n].module == module]
    for n in nodes:
        for o in run.tape.nodes[n].outs:
            if o < 0 or run.both[o] is not True or o in edit.leaves or _lies_alike(place, o):
                continue
            if not all(_lies_alike(place, v) for v in run.data_inputs(n)):
                continue
            left = place.left(edit)
            for w in run.twins[o][:3]:
                more = next(
                    (
                        e
                        for z in layouts(other.held(w), run.tape.values[o].shape)
                        if place.ok(e := edit.with_(Edit(leaves={o: z.contiguous()})))
                        and (not (now := place.left(e)) or (left and now[0] > left[0]))
                    ),
                    None,
                )
                if more is not None:
                    edit = more
                    break
    return edit


def order_at_weight(place: Place) -> Iterator[Found]:
    """A weight meets the reference's numbers in another order: they were flattened or joined otherwise."""
    run, other = place.pair.ours, place.pair.theirs
    theirs = list(_meetings(other, range(len(other.tape.nodes))))
    for index, print_, mine in _meetings(run, place.ours_after[:12]):
        for _, f, wanted in theirs:
            if not same(print_, f, MATCH) or wanted not in run.twins.get(mine, []):
                continue
            now = run.held(mine)
            for z in layouts(other.held(wanted), tuple(now.shape)):
                edit = Edit(ops={index: put(run.tape.nodes[index], mine, z)})
                if not _close(z, now) and place.ok(edit):
                    cause, said = _order_of(now, z, run.tape.nodes[index])
                    said = (
                        said
                        if cause != "layout"
                        else "the same numbers reach its weight in another order than the source's"
                    )
                    made = run.tape.values[mine].node
                    while (
                        made > 0 and op_name(run.tape.nodes[made]) in ("view", "_unsafe_view") and run.data_inputs(made)
                    ):
                        before = run.tape.values[run.data_inputs(made)[0]].node
                        if before < 0 or run.tape.nodes[before].module != run.tape.nodes[made].module:
                            break
                        made = before
                    node = made if made >= 0 else index
                    yield Found(cause, said, edit, node, place.giver(mine))
                    return


def _lies_alike(place: Place, vid: int) -> bool:
    run, other = place.pair.ours, place.pair.theirs
    if run.tape.values[vid].origin != "node" or not run.twins.get(vid):
        return True
    try:
        y = run.held(vid)
        return any(_close(y, z) for w in run.twins[vid][:6] for z in layouts(other.held(w), tuple(y.shape)))
    except UNFIT:
        return True


def _order_of(ours: Tensor, theirs: Tensor, node: Node) -> tuple[str, str]:
    """(cause, words): how two arrangements of the same elements differ."""
    if op_name(node) == "cat" and any(
        _same_rows(ours.movedim(a, 0), theirs.movedim(a, 0)) for a in range(ours.ndim) if ours.shape[a] > 1
    ):
        return "block order", "it joins its parts in another order than the source's"
    for axis in range(ours.ndim):
        n = ours.shape[axis]
        if n > 1 and _close(ours.flip(axis), theirs):
            return "block order", f"axis {axis} runs the other way round than the source's"
        for by in range(1, n):
            if 2 * by != n and _close(ours.roll(-by, axis), theirs):
                by = by if by <= n // 2 else by - n
                return "shifted", f"along axis {axis} it is shifted by {by} against the source's"
    if op_name(node) in ("repeat", "expand", "index_select") and ours.ndim > 3:
        return "head order", "it repeats its heads in another order than the source's"
    for axis in range(ours.ndim):
        if _same_blocks(ours.movedim(axis, 0), theirs.movedim(axis, 0)):
            return "block order", f"what lies along axis {axis} stands in another order than the source's"
    several = [a for a in range(ours.ndim) if ours.shape[a] > 1]
    for a, b in itertools.combinations(several, 2):
        if ours.shape[a] == ours.shape[b] and _close(ours.transpose(a, b), theirs):
            return "transposed", f"its axes {a} and {b} stand in each other's place"
    return "layout", "it lays the same numbers out in another order than the source does"


def _same_blocks(a: Tensor, b: Tensor) -> bool:
    """Are these a few equal blocks in another order?"""
    return any(len(a) % k == 0 and _same_rows(a.reshape(k, -1), b.reshape(k, -1)) for k in range(2, min(len(a), 4) + 1))


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Are these the same rows in another order?"""
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    if len(a) < 2 or len(a) > 4096:
        return False
    p, q = a.sum(-1).argsort(), b.sum(-1).argsort()
    return _close(a[p], b[q])


def axes(place: Place) -> Iterator[Found]:
    """Two axes stand in each other's place, or one somewhere else, before they are flattened or met by a weight."""
    run = place.pair.ours
    upstream = run.before(run.tape.nodes[place.first].inputs, 24, data=True)
    for index in [place.first, *upstream]:
        node = run.tape.nodes[index]
        if op_name(node) not in ("permute", "transpose", "t") or not node.outs:
            continue
        n = len(run.tape.values[node.outs[0]].shape)
        for turn in _turns(n):
            edit = Edit(ops={index: _turned(node, turn)})
            if place.ok(edit, soon=True):
                moved = [a for a in range(n) if turn[a] != a]
                said = f"its axes {', '.join(map(str, moved))} stand in another order than the source's"
                yield Found("layout", said, edit, index, place.scope(node.module))
                return


def _turns(n: int) -> Iterator[tuple[int, ...]]:
    """Orders of n axes in which two are exchanged, or one stands elsewhere."""
    found: dict[tuple[int, ...], None] = {}
    for a, b in itertools.permutations(range(n), 2):
        rest = [x for x in range(n) if x != a]
        found[(*rest[:b], a, *rest[b:])] = None
        swapped = list(range(n))
        swapped[a], swapped[b] = b, a
        found[tuple(swapped)] = None
    return iter(found)


def _turned(node: Node, turn: tuple[int, ...]) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return node.op(*args, **kwargs).permute(turn).contiguous()

    return run


# -- another input ----------------------------------------------------------------------------------------------------
def another_input(place: Place) -> Iterator[Found]:
    """A weight meets another value than in the reference, one that is there."""
    run = place.pair.ours
    back = {w: v for v, ws in run.twins.items() for w in ws}
    theirs = list(_meetings(place.pair.theirs, range(len(place.pair.theirs.tape.nodes))))
    for index, print_, mine in _meetings(run, place.ours_after[:40]):
        if run.both[run.tape.nodes[index].outs[0]] is True:
            continue
        for _, f, wanted in theirs:
            if not same(print_, f, MATCH) or wanted in run.twins.get(mine, []) or wanted not in back:
                continue
            across = [
                g for i, g, v in _meetings(run, place.ours_after[:40]) if i != index and wanted in run.twins.get(v, [])
            ]
            if any(same(g, h, MATCH) and w in run.twins.get(mine, []) for g in across for _, h, w in theirs):
                continue  # two weights stand in each other's place: surgery.wrong_weights
            yield from _given(place, index, mine, back[wanted])


def _meetings(run: Run, nodes: Any) -> Iterator[tuple[int, Any, int]]:
    """(node, fingerprint of the weight, the value it meets) of the products of a run."""
    for index in nodes:
        node = run.tape.nodes[index]
        if op_name(node) not in PRODUCTS:
            continue
        data = run.data_inputs(index)
        held = [v for v in node.inputs if not run.tape.values[v].data and run.tape.values[v].weights]
        if len(data) != 1 or len(held) != 1:
            continue
        f = fingerprint(run.held(held[0]))
        if f is not None:
            yield index, f, data[0]


def _given(place: Place, index: int, mine: int, wanted: int) -> Iterator[Found]:
    run = place.pair.ours
    node = run.tape.nodes[index]
    owner = node.module.rpartition(".")[0] if node.module in place.leaves else node.module
    has = place.pair.origin(mine)
    users = [c for c in place.pair.users(has) if run.tape.nodes[c].module.startswith(owner)]
    for z in layouts(run.held(wanted), run.tape.values[mine].shape):
        alone = Edit(ops={index: put(node, mine, z)})
        several = Edit(ops={c: put(run.tape.nodes[c], v, z) for c in users for v in [_of(run, c, mine)] if v >= 0})
        for edit in (alone, several):
            if place.ok(edit):
                yield _told_input(place, index, mine, wanted, edit)
                return


def _of(run: Run, node: int, like: int) -> int:
    """Which input of a node is this value, in the same layout."""
    shape = run.tape.values[like].shape
    f = run.tape.values[like].fingerprint
    for v in run.data_inputs(node):
        if run.tape.values[v].shape == shape and (v == like or run.tape.values[v].fingerprint == f):
            return v
    return -1


def _told_input(place: Place, index: int, mine: int, wanted: int, edit: Edit) -> Found:
    run = place.pair.ours
    has, wants = place.pair.origin(mine), place.pair.origin(wanted)
    between = run.before([wants], 12, data=True)
    back = run.before([has], 12, data=True)
    made_of = has in {v for n in between for v in run.tape.nodes[n].inputs}
    made_from = wants in {v for n in back for v in run.tape.nodes[n].inputs}
    node = run.tape.nodes[index]
    outer = node.module.rpartition(".")[0] if node.module in place.leaves else node.module
    module = place.between(place.scope(outer), has)
    a, b = (place.maker(v) or "the inputs" for v in (has, wants))
    b = f"another value of {b}" if a == b else b
    said = f"{node.module or 'it'} takes what {a} gives, in the source what {b} gives"
    chain = between if made_of else back if made_from else []
    if any(place.normalises(run, run.tape.nodes[n]) for n in chain[:6]):
        return Found("pre/post norm", f"{said}: a norm stands at another place", edit, place.first, module)
    if chain and any(op_name(run.tape.nodes[n]) == "add" for n in chain[:3]):
        return Found("parallel residual", f"{said}: they are computed beside, not after, each other", edit, place.first,
                     module)  # fmt: skip
    return Found("wrong input", said, edit, place.first, module)


def put(node: Node, vid: int, z: Tensor) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    """The operator with z in place of this input."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def there(ref: Any, now: Any) -> Any:
            return z if isinstance(ref, Ref) and ref.vid == vid else now

        here = tree_map(there, node.args, args, is_leaf=lambda x: isinstance(x, Ref))
        return node.op(*here, **kwargs)

    return run


# -- another weight ---------------------------------------------------------------------------------------------------
def another_weight(place: Place) -> Iterator[Found]:
    """The program takes a weight of another place: here alone it is another one than the reference's."""
    run, other = place.pair.ours, place.pair.theirs
    wanted = _weights_near(other, [*place.theirs[:4], *place.theirs_after[:16]])
    found: list[tuple[int, int, str, Tensor]] = []
    for index in place.ours_after[:8]:
        for vid in run.tape.nodes[index].inputs:
            value = run.tape.values[vid]
            if value.data or not value.weights or not value.dtype.is_floating_point:
                continue
            now = run.held(vid)
            for w in wanted:
                if not _as_stored(other, w):
                    continue
                t = other.held(w)
                if t.numel() != now.numel() or _close(t.reshape(now.shape), now):
                    continue
                for z in dict.fromkeys((t.reshape(now.shape), t.t() if t.ndim == 2 else t.reshape(now.shape))):
                    if z.shape == now.shape:
                        found.append((index, vid, _root_name(other, w), z))
    for index, vid, name, z in found[:_TRIALS]:
        edit = Edit(ops={index: put(run.tape.nodes[index], vid, z)})
        if place.ok(edit):
            yield _told_weight(place, index, vid, name, z, edit)
            return
    pairs = ((p, q) for p, q in itertools.combinations(found, 2) if p[0] != q[0])
    for one, two in itertools.islice(pairs, 4 * _TRIALS):
        edit = Edit(ops={i: put(run.tape.nodes[i], v, z) for i, v, _, z in (one, two)})
        if place.ok(edit):
            index, vid, name, z = one
            yield _told_weight(place, index, vid, name, z, edit)
            return


def _weights_near(run: Run, nodes: list[int]) -> list[int]:
    vids = [v for n in nodes for v in run.tape.nodes[n].inputs]
    free = [v for v in vids if run.tape.values[v].weights and not run.tape.values[v].data]
    free += [v for n in run.before(free, 16, data=False) for v in run.tape.nodes[n].inputs]
    return [v for v in dict.fromkeys(free) if run.tape.values[v].dtype.is_floating_point]


def _as_stored(run: Run, vid: int) -> bool:
    """Is a value a weight itself, in whatever layout?"""
    for _ in range(16):
        value = run.tape.values[vid]
        if value.node < 0:
            return value.origin == "param"
        node = run.tape.nodes[value.node]
        if op_name(node) not in MOVES or not node.inputs:
            return False
        vid = node.inputs[0]
    return False


def _root_name(run: Run, vid: int) -> str:
    return run.tape.values[run.root(vid)].name


def _told_weight(place: Place, index: int, vid: int, name: str, z: Tensor, edit: Edit) -> Found:
    run = place.pair.ours
    uses = _root_name(run, vid) or "a weight"
    own = run.held(run.root(vid))
    if own.shape == z.shape and _close(own, z):
        apart = run.held(vid) - z
        if _close(apart, torch.full_like(apart, float(apart.flatten()[0]))):
            return Found("offset", f"it adds {float(apart.flatten()[0]):g} to {uses}, the source does not", edit, index)
        return Found("scale", f"it takes {uses} changed, the source as it is", edit, index)
    mine = place.named_like(z)
    here = f", which is your {mine}" if mine and mine != uses else ""
    said = f"it takes {uses} here, the source {name or 'another one'}{here}"
    statistics = any(s in f"{uses} {name}" for s in ("running_", "mean", "var"))
    return Found("statistics" if statistics else "wrong tensor", said, edit, index)


# -- another table ----------------------------------------------------------------------------------------------------
def table(place: Place) -> Iterator[Found]:
    """Constants that a program makes itself: the angles of rotary positions, sinusoids."""
    run, other = place.pair.ours, place.pair.theirs
    uses: dict[int, Tensor] = {}
    for index in dict.fromkeys([*_beside(run, place.first), *place.ours_after[:24]]):
        for vid, t in _constants_of(run, index):
            uses[vid] = t
    nodes = [*place.theirs[:4], *place.theirs_after[:24]]
    pool: list[Tensor] = []
    for index in dict.fromkeys([*nodes, *(n for t in place.theirs[:2] for n in _beside(other, t))]):
        for _, t in _constants_of(other, index):
            flat = t.reshape([n for n in t.shape if n != 1])
            halves = [flat[..., : flat.shape[-1] // 2], flat[..., ::2]] if flat.ndim and flat.shape[-1] % 2 == 0 else []
            for each in (flat, *halves):
                if not any(each.shape == p.shape and _close(each, p) for p in pool):
                    pool.append(each)
    options: dict[int, list[Tensor]] = {}
    for vid, t in list(uses.items())[:6]:
        plain = tuple(n for n in t.shape if n != 1)
        alike = [p.reshape(t.shape) for p in pool if tuple(p.shape) == plain]
        options[vid] = [z for p in alike for z in (p, -p)]
    several = [(vid, z) for vid, zs in options.items() for z in zs if not _close(z, uses[vid])]
    for vid, z in several[:_TRIALS]:
        edit = Edit(leaves={vid: z})
        if place.ok(edit):
            yield _told_table(place, [(uses[vid], z)], uses, edit)
            return
    pairs = ((p, q) for p, q in itertools.combinations(several, 2) if p[0] != q[0])
    for (a, x), (b, y) in itertools.islice(pairs, 8 * _TRIALS):
        edit = Edit(leaves={a: x, b: y})
        if place.ok(edit):
            yield _told_table(place, [(uses[a], x), (uses[b], y)], uses, edit)
            return


def _constants_of(run: Run, index: int) -> Iterator[tuple[int, Tensor]]:
    node = run.tape.nodes[index]
    if op_name(node) not in _ARITHMETIC:
        return
    for vid in node.inputs:
        value = run.tape.values[vid]
        if value.data or value.weights or not value.dtype.is_floating_point or math.prod(value.shape) < 2:
            continue
        try:
            t = run.held(vid)
        except Untold:
            continue
        if bool(torch.isfinite(t).all()) and float(t.abs().max()) < 1e4:
            yield vid, t


def _beside(run: Run, index: int) -> list[int]:
    """The operators of the same module shortly before and after one."""
    near = range(max(0, index - 24), min(index + 32, len(run.tape.nodes)))
    return [n for n in near if run.tape.nodes[n].module == run.tape.nodes[index].module]


def _told_table(place: Place, changed: list[tuple[Tensor, Tensor]], uses: dict[int, Tensor], edit: Edit) -> Found:
    module = place.scope(place.node.module)
    turning = any(_circle(a, b) for a, b in itertools.combinations([*uses.values()], 2))
    if not turning:
        now, right = changed[0]
        rows = [n for n in range(1, min(5, len(now))) if now.ndim > 1 and _close(now[n:], right[:-n])]
        said = f"it begins {rows[0]} too late in its table" if rows else "a table of constants is another one"
        return Found("position offset" if rows else "constant", f"{said} than the source's" if not rows else said, edit,
                     place.first, module)  # fmt: skip
    return Found("rotary", _rotation(changed), edit, place.first, module)


def _circle(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _close(a * a + b * b, torch.ones_like(a))


def _rotation(changed: list[tuple[Tensor, Tensor]]) -> str:
    """How the angles of two rotations differ."""
    if len(changed) == 1:
        now, right = changed[0]
        return "its rotary positions turn the other way" if _close(-now, right) else "its rotary angles are others"
    (a, x), (b, y) = changed
    plain = [t.reshape([n for n in t.shape if n != 1]) for t in (a, x, b, y)]
    ours, theirs = (torch.atan2(s, c) for c, s in ((plain[0], plain[2]), (plain[1], plain[3])))
    if not float(theirs.abs().reshape(len(theirs), -1)[0].max()) < 1e-9:  # the cosine is the other one
        ours, theirs = (torch.atan2(s, c) for c, s in ((plain[2], plain[0]), (plain[3], plain[1])))
    for by in range(1, min(4, len(ours))):
        if _close(ours[:-by].sin(), theirs[by:].sin()):
            return f"its rotary positions begin {by} too early"
        if _close(ours[by:].sin(), theirs[:-by].sin()):
            return f"its rotary positions begin {by} too late"
    n = ours.shape[-1]
    if ours.ndim == 2 and n > 1 and len(ours) > 1:
        bases = [float(t[1, 1]) ** -n for t in (ours, theirs) if float(t[1, 1]) > 0]
        if len(bases) == 2 and abs(bases[0] / bases[1] - 1) > 1e-6:
            return f"the base of its rotary angles is {bases[0]:.6g}, the source's {bases[1]:.6g}"
    return "its rotary angles are others than the source's"
