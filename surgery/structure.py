"""Operators that one side has and the other has not, where two programs part: a bias, a residual, a norm, a pooling.

As in surgery.causes, each is tried on the target's run, with the target's own values.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from surgery.arrangement import PRODUCTS, layouts, put
from surgery.mapper.record import MOVES, Node
from surgery.pairing import NORMS, SOFTMAX, UNFIT, Edit, Found, Place, Run, Untold, call, op_name

ELEMENTWISE = ("gelu", "relu", "silu", "tanh", "sigmoid", "hardtanh", "hardswish", "elu", "leaky_relu", "softplus")


def added(place: Place) -> Iterator[Found]:
    """The reference does something to the value first: adds a bias or what came in, scales, normalises, turns it."""
    run, other = place.pair.ours, place.pair.theirs
    back = {w: v for v, ws in run.twins.items() for w in ws}
    returned = [o for o in place.node.outs if o in run.outputs and run.twins.get(o)]
    starts = list(place.theirs[:4])
    if returned:  # what is returned occurs in the reference, which goes on with it
        starts = sorted({c for o in returned for w in run.twins[o] for c in other.tape.consumers[w]})[:4]
    for start, in_ours in itertools.product(starts, (True, False)):
        made: dict[int, Tensor] = {}
        chains: dict[int, list[int]] = {}
        outs = [o for o in other.tape.nodes[start].outs if o >= 0]
        for t in [start, *other.after(outs, 14)]:
            node = other.tape.nodes[t]
            try:
                out = call(node, _values(place, made, back, in_ours))
            except UNFIT:
                break
            chain = sorted({n for v in node.inputs for n in chains.get(v, [])} | {t})
            for o, y in zip(node.outs, out, strict=True):
                if o >= 0:
                    made[o], chains[o] = y, chain
            if node.outs and node.outs[0] >= 0:
                yield from _inserted(place, made[node.outs[0]], [other.tape.nodes[n] for n in chain], returned)


def _values(place: Place, made: dict[int, Tensor], back: dict[int, int], in_ours: bool) -> Callable[[int], Tensor]:
    return lambda vid: made[vid] if vid in made else _as_ours(place, vid, back if in_ours else {})


def _as_ours(place: Place, vid: int, back: dict[int, int]) -> Tensor:
    """A value of the reference's, as the target has laid it out where it has it."""
    value = place.pair.theirs.tape.values[vid]
    if value.data and vid in back:
        return place.pair.ours.held(back[vid])
    return place.pair.theirs.held(vid)


def _inserted(place: Place, z: Tensor, chain: list[Node], returned: list[int]) -> Iterator[Found]:
    """z in place of what our node takes, wherever the reference's operator took it; or of what it returns."""
    run = place.pair.ours
    tries: list[tuple[int, Edit]] = []
    for o in returned:
        tries += [(o, Edit(leaves={o: y})) for y in layouts(z, run.tape.values[o].shape)]
    taken = run.data_inputs(place.first)
    for vid in taken if not returned else ():
        shape = run.tape.values[vid].shape
        users = [c for c in run.tape.consumers[vid] if c >= place.first and c in place.ours_after]
        alike = [z] if shape == tuple(z.shape) else []
        if not alike and len(shape) == z.ndim > 1:
            alike = [y for y in layouts(z, shape) if tuple(y.shape) == shape][:6]
        for y in alike:
            for several in dict.fromkeys(((place.first,), tuple(users))):
                tries.append((vid, Edit(ops={c: _other_input(run.tape.nodes[c], vid, y) for c in several})))
    for vid in dict.fromkeys(place.pair.origin(v) for v in taken) if not returned else ():
        if vid not in taken and run.tape.values[vid].shape == tuple(z.shape) and run.tape.values[vid].origin == "node":
            tries.append((vid, Edit(leaves={vid: z})))
    for vid, edit in tries:
        if place.ok(edit):
            cause, said = _missing(place, chain)
            module: str | None = place.giver(vid) if not returned else place.caller()
            owner: str | None = None
            if cause == "pre/post norm":
                owner = _norm_of(place, chain)
                module = place.scope(owner.rpartition(".")[0]) if owner is not None else module
            if cause == "pre/post norm" and owner is None and not returned and _is_norm(place):
                cause, said, module = _other_value(place, chain, vid)
            if cause == "missing bias" and not returned:
                made_by = run.tape.values[place.pair.origin(vid)].node
                maker = run.tape.nodes[made_by] if made_by >= 0 else None
                product = maker is not None and (op_name(maker) in PRODUCTS or _adds_weight(place, maker))
                if not product and place.left(edit):
                    continue  # a sum of which nothing is shown but that it occurs
                module = maker.module if product and maker is not None else place.giver(vid)
            yield Found(cause, said, edit, place.first, module)


def _adds_weight(place: Place, node: Node) -> bool:
    values = [place.pair.ours.tape.values[v] for v in node.inputs]
    return op_name(node) == "add" and any(v.weights and not v.data for v in values)


def _is_norm(place: Place) -> bool:
    """Is our first node in a module that does nothing but normalise?"""
    run, module = place.pair.ours, place.node.module
    own = [run.tape.nodes[i] for i in place.ours_after[:12] if run.tape.nodes[i].module == module]
    return module in place.leaves and any(place.normalises(run, n) for n in own)


def _other_value(place: Place, chain: list[Node], vid: int) -> tuple[str, str, str]:
    """(cause, words, module): the same norm takes another value than in the reference."""
    run, other = place.pair.ours, place.pair.theirs
    module = place.node.module
    caller = place.between(place.scope(module.rpartition(".")[0]), vid)
    taken = {v for w in other.before(chain[0].inputs, 1) for v in other.tape.nodes[w].inputs} | set(chain[0].inputs)
    ours = [v for v, ws in run.twins.items() if taken.intersection(ws) and run.tape.values[v].node >= 0]
    if any(op_name(run.tape.nodes[run.tape.values[v].node]) == "add" for v in ours):
        return "parallel residual", f"{module} takes another value: in the source what is added up before it", caller
    return "wrong input", f"{module} takes another value than in the source", caller


def _other_input(node: Node, vid: int, z: Tensor) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
    return put(node, vid, z)


def _missing(place: Place, chain: list[Node]) -> tuple[str, str]:
    other = place.pair.theirs
    if any(place.normalises(other, n) for n in chain):
        return "pre/post norm", "the source normalises this value first: its norm stands at another place"
    while len(chain) > 1 and op_name(chain[-1]) in (*MOVES, "cat"):
        chain = chain[:-1]
    before = [other.tape.nodes[n] for n in other.before(chain[-1].inputs, 10, data=True)]
    if turns(other, [*chain, *(n for n in before if any(o >= 0 and other.both[o] is False for o in n.outs))]):
        return "rotary", "the source turns this value by its position first: rotary positions are missing"
    node = chain[-1]
    weights = [v for v in node.inputs if other.tape.values[v].weights and not other.tape.values[v].data]
    if op_name(node) == "add" and weights:
        names_ = [other.tape.values[other.root(v)].name for v in weights]
        return "missing bias", f"no bias is added, the source adds {names_[0] or 'one'}"
    looked_up = _looked_up(other, node) if op_name(node) == "add" else ""
    if looked_up:
        return "missing embedding", f"no embedding is added, the source adds rows of {looked_up}"
    if op_name(node) in ("add", "sub") and len([v for v in node.inputs if other.tape.values[v].data]) == 2:
        return "missing residual", "the residual is missing: the source adds what came in"
    if op_name(node) in ("mul", "div"):
        return "scale", "the source scales this value first"
    if op_name(node) in ("gelu", "relu", "silu", "tanh", "sigmoid", "clamp"):
        return "activation", f"the source applies {op_name(node)} first"
    free = [v for v in node.inputs if not other.tape.values[v].data and not other.tape.values[v].weights]
    follows = [op_name(other.tape.nodes[n]) for n in other.after([o for o in node.outs if o >= 0], 4)]
    if op_name(node) in ("add", "masked_fill", "where") and free and any(n in SOFTMAX for n in follows):
        return "mask", "the source masks its attention here: the mask is missing"
    return f"missing {op_name(node)}", f"the source applies {op_name(node)} to this value first"


def _looked_up(run: Run, node: Node) -> str:
    """The table of which a sum adds rows, where the other addend is none."""
    found = []
    for v in (v for v in node.inputs if run.tape.values[v].data):
        made = run.tape.values[v].node
        if made >= 0 and op_name(run.tape.nodes[made]) in ("index", "embedding", "index_select"):
            tables = [w for w in run.tape.nodes[made].inputs if run.tape.values[w].weights]
            found += [run.tape.values[w].name for w in tables]
    return found[-1] if found else ""


def turns(run: Run, chain: list[Node]) -> bool:
    """Do these operators rotate pairs of a value's elements by angles that depend on the place alone?"""
    names = [op_name(n) for n in chain]

    def angles(node: Node) -> bool:
        held = [run.tape.values[v] for v in node.inputs if not run.tape.values[v].data]
        return any(not v.weights and v.dtype.is_floating_point and len(v.shape) > 1 for v in held)

    swaps = any(n in ("cat", "stack") for n in names)
    return swaps and sum(angles(n) for n in chain if op_name(n) == "mul") >= 2


def _norm_of(place: Place, chain: list[Node]) -> str | None:
    """Our module that holds the gain of the reference's norm."""
    other = place.pair.theirs
    for node in chain:
        for v in (v for v in node.inputs if not other.tape.values[v].data):
            value = other.tape.values[other.root(v)]
            if value.origin == "param" and value.tensor is not None and (name := place.named_like(value.tensor)):
                return name.rpartition(".")[0]
    return None


def residual(place: Place) -> Iterator[Found]:
    """What came in is added, or is not, where the reference does otherwise."""
    run = place.pair.ours
    earlier = [
        v
        for v, value in enumerate(run.tape.values)
        if value.data and value.tensor is not None and 0 <= value.node < place.first and run.both[v] is True
    ][-40:]
    for vid in dict.fromkeys([*run.data_inputs(place.first), *(o for _, o, _ in place.results(place.ours_after[:8]))]):
        try:
            y = run.held(vid)
        except Untold:
            continue
        if not y.is_floating_point():
            continue
        for x_vid in earlier:
            if tuple(run.tape.values[x_vid].shape) != tuple(y.shape) or x_vid == vid:
                continue
            x = run.held(x_vid)
            for z, said in ((y + x, "missing"), (y - x, "one too many")):
                if place.pair.occurs(z):
                    users = [c for c in run.tape.consumers[vid] if c >= place.first]
                    edit = Edit(
                        leaves={vid: z} if vid in run.outputs else {},
                        ops={c: _other_input(run.tape.nodes[c], vid, z) for c in users},
                    )
                    if place.ok(edit):
                        cause = "missing residual" if said == "missing" else "extra residual"
                        told = {
                            "missing": "the residual is missing: the source adds what came in",
                            "one too many": "it adds what the source does not",
                        }
                        yield Found(cause, told[said], edit, place.first, place.adder(vid, x_vid))
                        return


def dropped(place: Place) -> Iterator[Found]:
    """Our operators between two values that stand for one in the reference: leave them out."""
    run = place.pair.ours
    for start in dict.fromkeys(run.data_inputs(place.first)):
        try:
            x = run.held(start)
        except Untold:
            continue
        chain: list[Node] = []
        for index, out, y in place.results(place.ours_after[:8]):
            chain.append(run.tape.nodes[index])
            if y.shape != x.shape:
                continue
            edit = Edit(leaves={out: x})
            if place.ok(edit) and _carries(place, edit):
                yield _extra(place, chain, edit)
                return


def _carries(place: Place, edit: Edit) -> bool:
    """Is something computed of what a change puts in place, and right? That it is passed on shows nothing."""
    left = place.left(edit)
    if not left:
        return True
    known = place.pair.rerun(edit)
    both = place.pair.findings(known)
    run = place.pair.ours
    made = [run.tape.values[v].node for v in known if both[v] is True and v not in edit.leaves]
    return any(n >= 0 and op_name(run.tape.nodes[n]) not in (*MOVES, "cat") for n in made)


def _extra(place: Place, chain: list[Node], edit: Edit) -> Found:
    names = [op_name(n) for n in chain]
    index = place.first
    if any(place.normalises(place.pair.ours, n) for n in chain):
        said = "it normalises this value, the source does not: its norm stands at another place"
        module = place.giver(place.pair.ours.data_inputs(place.first)[0])
        return Found("pre/post norm", said, edit, index, module)
    run = place.pair.ours
    if turns(run, chain):
        return Found("rotary", "it turns this value by its position, the source does not", edit, index)
    node = chain[-1]
    weights = [v for v in node.inputs if run.tape.values[v].weights and not run.tape.values[v].data]
    if names[-1] == "add" and weights:
        return Found("extra bias", "it adds a bias that the source does not add", edit, index)
    numbers = [a for a in node.args[1:] if isinstance(a, (int, float))]
    if names[-1] in ("add", "sub") and numbers:
        return Found("constant", f"it adds {numbers[0]:g}, the source does not", edit, index)
    if names[-1] in ("add", "sub"):
        return Found("extra residual", "it adds what the source does not", edit, index)
    if names[-1] in ("mul", "div"):
        return Found("scale", "it scales this value, the source does not", edit, index)
    if names[-1] in ("clamp", "clamp_min", "clamp_max"):
        return Found("activation", f"it applies {names[-1]}, the source nothing", edit, index)
    if names[-1] in SOFTMAX:
        return Found("activation", "it applies a softmax, the source nothing", edit, index)
    if names[-1] in ELEMENTWISE:
        return Found("activation", f"it applies {names[-1]}, the source nothing", edit, index)
    return Found(f"extra {names[-1]}", f"it applies {names[-1]} to this value, the source does not", edit, index)


def pooling(place: Place) -> Iterator[Found]:
    """One of many positions, or all of them in one: the reference takes others."""
    run = place.pair.ours
    taken = place.ours_after[:4]
    for index in taken:
        node = run.tape.nodes[index]
        for v in run.data_inputs(index)[:2]:
            origin = place.pair.origin(v)
            for x_vid in dict.fromkeys((v, origin)):
                x = run.held(x_vid)
                if not x.is_floating_point() or x.ndim < 2:
                    continue
                for axis in range(x.ndim):
                    if x.shape[axis] < 2:
                        continue
                    for name, z in _pooled(x, axis):
                        yield from _pooled_in(place, taken, name, z, node)


def _pooled(x: Tensor, axis: int) -> Iterator[tuple[str, Tensor]]:
    yield "the first position", x.select(axis, 0)
    yield "the last position", x.select(axis, -1)
    yield "the mean of all", x.mean(axis)
    yield "the largest of all", x.amax(axis)


def _pooled_in(place: Place, taken: list[int], name: str, z: Tensor, _: Node) -> Iterator[Found]:
    run = place.pair.ours
    if not place.pair.occurs(z):
        return
    for index in taken:
        for o in run.tape.nodes[index].outs:
            value = run.tape.values[o] if o >= 0 else None
            if value is None or run.both[o] is True or len([n for n in value.shape if n != 1]) != z.squeeze().ndim:
                continue
            if z.numel() == torch.Size(value.shape).numel():
                edit = Edit(leaves={o: z.reshape(value.shape)})
                if o in run.outputs or place.ok(edit):
                    yield Found("pooling", f"the source takes {name}", edit, index)
                    return


# -- another operator -------------------------------------------------------------------------------------------------
def instead(place: Place) -> Iterator[Found]:
    """The reference makes something else of the same values: what it makes, in place of what ours does, mends the rest.
    The cause is told by the operators in which the two differ."""
    run, other = place.pair.ours, place.pair.theirs
    wanted: list[tuple[Tensor, list[Node]]] = []
    tried = 0
    for start in place.theirs[:3]:
        outs = [o for o in other.tape.nodes[start].outs if o >= 0]
        chain = [start]
        for t in [start, *other.after(outs, 12)]:
            chain = list(dict.fromkeys([*chain, t]))
            for o in other.tape.nodes[t].outs:
                if o >= 0 and other.tape.values[o].data and other.both[o] is False:
                    wanted.append((other.held(o), [other.tape.nodes[n] for n in chain]))
    for index, out, y in place.results(place.ours_after[:14]):
        mine = [run.tape.nodes[n] for n in place.ours_after if n <= index]
        for z, theirs in wanted:
            if z.numel() != y.numel() or not z.is_floating_point():
                continue
            for laid in itertools.islice(layouts(z, tuple(y.shape)), 8):
                tried += 1
                edit = Edit(leaves={out: laid.contiguous()})
                if tried > TRIALS:
                    return
                if place.ok(
                    edit, soon=True
                ):  # the shortest way that mends is what differs, whether it has a name or not
                    told = _difference(place, mine, theirs)
                    if told is not None:
                        yield Found(*told, edit, place.first)
                    return


TRIALS = 400
POOLS = ("avg_pool", "max_pool", "adaptive", "amax", "mean", "_adaptive", "max")


def _difference(place: Place, ours: list[Node], theirs: list[Node]) -> tuple[str, str] | None:
    """(cause, words) of two ways from the same values; None where nothing says what it is."""
    run, other = place.pair.ours, place.pair.theirs
    steps = [_stride(nodes) for nodes in (ours, theirs)]
    if steps[0] != steps[1] and len(steps[0]) == len(steps[1]):
        return "stride", f"its convolutions step by {steps[0]}, the source's by {steps[1]}"
    a, b = (_names(r, nodes) for r, nodes in ((run, ours), (other, theirs)))
    only_a, only_b = [n for n in a if n not in b], [n for n in b if n not in a]
    soft = [any(n in SOFTMAX for n in side) for side in (a, b)]
    ends = {a[-1], b[-1]} & {*ELEMENTWISE, *SOFTMAX}
    if soft[0] != soft[1] and not ends & {*SOFTMAX}:
        return None
    if soft[0] != soft[1]:
        has, wants = ("a softmax" if s else next((n for n in side if n in ELEMENTWISE), "none")
                      for s, side in zip(soft, (a, b), strict=True))  # fmt: skip
        return "activation", f"it takes {has}, the source {wants}"
    roots = [any(n in ("sqrt", "rsqrt", "reciprocal", *NORMS) for n in side) for side in (a, b)]
    pools = [next((n for n in side if n.startswith(POOLS)), "") for side in (a, b)]
    if pools[0] and pools[1] and not any(roots) and (pools[0] != pools[1] or "pool" in pools[0]):
        return "pooling", f"it pools by {pools[0]}, the source by {pools[1]}, or over other windows"
    stored = [_statistics_of(r, nodes) for r, nodes in ((run, ours), (other, theirs))]
    if stored[1] and stored[0] != stored[1]:
        has = "another norm's statistics" if stored[0] else "statistics of its own"
        return "statistics", f"it normalises by {has}, the source by the running ones"
    if all(roots):
        if _after_root(a) != _after_root(b):
            return "eps", "it adds its eps on the other side of the square root than the source"
        if all(any(n in NORMS for n in side) for side in (a, b)):
            return None  # the same norm, of another value
        return "normalisation", "it normalises by other statistics than the source"
    acts = [next((n for n in side if n in ELEMENTWISE), "") for side in (only_a, only_b)]
    if any(acts) and acts[0] != acts[1] and ends:
        return "activation", f"its activation is {acts[0] or 'none'}, the source's {acts[1] or 'none'}"
    return None


def _names(run: Run, nodes: list[Node]) -> list[str]:
    """The operators, and those that make what they take beside the data."""
    free = {v for n in nodes for v in n.inputs if not run.tape.values[v].data}
    before = [op_name(run.tape.nodes[n]) for n in sorted(run.before(free, 24, data=False))]
    return [*before, *(op_name(n) for n in nodes)]


def _stride(nodes: list[Node]) -> list[Any]:
    return [n.args[3][0] for n in nodes if op_name(n) == "convolution"]


def _statistics_of(run: Run, nodes: list[Node]) -> list[float]:
    """A number for each stored statistic that operators take, to tell them apart."""
    vids = {v for n in nodes for v in n.inputs if not run.tape.values[v].data}
    vids |= {v for n in run.before(vids, 16, data=False) for v in run.tape.nodes[n].inputs}
    held = [run.tape.values[v] for v in sorted(vids) if "var" in run.tape.values[v].name.rpartition(".")[2]]
    return [float(v.tensor.sum()) for v in held if v.tensor is not None] or [0.0 for _ in held]


def _after_root(names: list[str]) -> bool:
    """Is something added between a root and what divides by it?"""
    root = next((i for i, n in enumerate(names) if n in ("sqrt", "rsqrt")), -1)
    return root >= 0 and "add" in names[root + 1 : root + 2]
