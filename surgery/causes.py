"""Why two programs part at a place: each cause is a change of the target's run, and is claimed only where running the
rest with that change removes the difference there.

What to try is read off the reference's run at the same place (its constants, its operators, what its softmax hides)
rather than guessed; a short list of activations is tried beside it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from surgery import arrangement, attention, structure
from surgery.mapper.record import HUGE, MOVES, RANDOM, Node, Ref, fingerprint
from surgery.pairing import NORMS, SOFTMAX, UNFIT, Edit, Found, Place, Untold, op_name, recalled

SMALL = 1e-2  # an added number below it keeps a quotient finite
EPS = (1e-12, 1e-8, 1e-7, 1e-6, 1e-5, 1e-3)
_SHAPES = (
    *MOVES,
    "expand",
    "cat",
    "constant_pad_nd",
    "full",
    "new_empty",
    "empty",
    "arange",
    "index",
    "sync",
    "_local_scalar_dense",
)
_SAID = {
    "eps": "eps", "p": "p", "alpha": "alpha", "dim": "axis", "correction": "correction", "approximate": "approximate"
}  # fmt: skip


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _quick(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "GELU (erf)": F.gelu,
    "GELU (tanh)": _gelu_tanh,
    "quick GELU": _quick,
    "ReLU": F.relu,
    "SiLU": F.silu,
    "ReLU6": F.relu6,
    "hard swish": F.hardswish,
    "leaky ReLU": F.leaky_relu,
    "ELU": F.elu,
    "squared ReLU": lambda x: F.relu(x).square(),
    "softplus": F.softplus,
    "Mish": F.mish,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hard sigmoid": F.hardsigmoid,
    "no activation": lambda x: x,
}


def causes(place: Place) -> Iterator[Found]:
    """Changes of the target's program that remove the divergence, most specific first."""
    for look in (
        constants,
        dropout,
        attention.softmax_axis,
        activation,
        attention.mask,
        positions,
        padding,
        statistics,
        scale,
        arrangement.another_weight,
        arrangement.table,
        structure.residual,
        structure.added,
        structure.dropped,
        attention.heads,
        attention.swapped_operands,
        structure.pooling,
        arrangement.another_input,
        arrangement.order,
        arrangement.order_at_weight,
        arrangement.axes,
    ):
        yield from tried(look(place))


def tried(found: Iterator[Found]) -> Iterator[Found]:
    """What is found until a trial raises: what was tried does not fit the values it meets, and is not the cause."""
    with contextlib.suppress(*UNFIT):
        yield from found


# -- the same operator with other constants ---------------------------------------------------------------------------
def constants(place: Place) -> Iterator[Found]:
    """An eps, an axis, a correction, a stride: the reference calls the same operator with another one."""
    run, other = place.pair.ours, place.pair.theirs
    near = [*place.ours_after[:12], *run.before(run.tape.nodes[place.first].inputs, 12, data=False)]
    theirs = [*place.theirs_after[:24]]
    for first in place.theirs[:4]:
        theirs += other.before(other.tape.nodes[first].inputs, 16, data=False)
    for index in dict.fromkeys(near):
        node = run.tape.nodes[index]
        name = op_name(node)
        if name in _SHAPES or not hasattr(node.op, "_schema"):
            continue
        seen: set[str] = set()
        for t in dict.fromkeys(theirs):
            yield from _with_constants_of(place, index, other.tape.nodes[t], seen)
        for eps in EPS:
            yield from _with_eps(place, index, eps)


def _with_constants_of(place: Place, index: int, theirs: Node, seen: set[str]) -> Iterator[Found]:
    node = place.pair.ours.tape.nodes[index]
    if theirs.op is not node.op or len(theirs.args) != len(node.args):
        return
    mine, spec = tree_flatten((node.args, node.kwargs))
    yours, spec2 = tree_flatten((theirs.args, theirs.kwargs))
    if spec != spec2 or any(isinstance(a, Ref) != isinstance(b, Ref) for a, b in zip(mine, yours, strict=True)):
        return
    new = [a if isinstance(a, Ref) else b for a, b in zip(mine, yours, strict=True)]
    key = repr([n for n in new if not isinstance(n, Ref)])
    if key in seen or all(isinstance(a, Ref) or a == b for a, b in zip(mine, new, strict=True)):
        return
    seen.add(key)
    args, kwargs = torch.utils._pytree.tree_unflatten(new, spec)
    edit = Edit(ops={index: recalled(node.op, args, kwargs)})
    if place.ok(edit):
        names = [a.name for a in node.op._schema.arguments]
        changed = [(names[i], a, args[i]) for i, a in enumerate(node.args) if not _same(a, args[i])]
        changed += [(k, v, kwargs[k]) for k, v in node.kwargs.items() if not _same(v, kwargs[k])]
        yield _constant(place, index, edit, changed)


def _same(a: Any, b: Any) -> bool:
    return isinstance(a, Ref) or repr(a) == repr(b)


def _constant(place: Place, index: int, edit: Edit, changed: list[tuple[str, Any, Any]]) -> Found:
    node = place.pair.ours.tape.nodes[index]
    name = op_name(node)
    what, has, wants = changed[0]
    if what == "eps" or (name == "add" and isinstance(has, float) and abs(has) < SMALL):
        return Found("eps", f"eps is {has:g}, the source has {wants:g}", edit, index)
    if name == "gelu":
        return Found("gelu", f'its GELU is approximate="{has}", the source has "{wants}"', edit, index)
    if name in ("mul", "div"):
        return Found("scale", f"it scales by {_number(name, has)}, the source by {_number(name, wants)}", edit, index)
    if what == "correction" or name.startswith(("var", "std")):
        return Found("variance", f"its variance has correction={has}, the source's {wants}", edit, index)
    if name in SOFTMAX and what == "dim":
        return Found("softmax axis", f"its softmax is over axis {has}, the source's over {wants}", edit, index)
    if name.startswith(("avg_pool", "max_pool")):
        said = ", ".join(f"{k} is {_short(a)}, the source has {_short(b)}" for k, a, b in changed)
        return Found("pooling", f"in its pooling, {said}", edit, index)
    if name == "convolution":
        what, has, wants = next((c for k in ("dilation", "stride") for c in changed if c[0] == k), changed[0])
    if name == "native_group_norm" and what == "group":
        return Found("groups", f"it normalises in {has} groups, the source in {wants}", edit, index)
    if name == "add" and isinstance(has, int) and _indexes(place, index):
        return Found("position offset", f"its positions begin at {has}, the source's at {wants}", edit, index)
    if name.startswith(("convolution", "reflection_pad", "replication_pad")):
        return Found(what, f"{what} is {_short(has)}, the source has {_short(wants)}", edit, index)
    if name == "native_batch_norm":
        return Found("statistics", _STATISTICS, edit, index)
    said = ", ".join(f"{k} is {_short(a)}, the source has {_short(b)}" for k, a, b in changed[:2])
    return Found("constant", f"in {name}, {said}", edit, index)


def _indexes(place: Place, index: int) -> bool:
    """Do rows of a table get looked up by what this node gives?"""
    run = place.pair.ours
    return any(op_name(run.tape.nodes[n]) in ("index", "index_select", "gather", "embedding")
               for n in run.after([o for o in run.tape.nodes[index].outs if o >= 0], 6))  # fmt: skip


def _number(op: str, x: Any) -> str:
    return f"1/{x:g}" if op == "div" and isinstance(x, (int, float)) else _short(x)


def _short(x: Any) -> str:
    if isinstance(x, (list, tuple)) and len(set(x)) == 1:
        return str(x[0])
    return f"{x:g}" if isinstance(x, float) else str(x)


def _with_eps(place: Place, index: int, eps: float) -> Iterator[Found]:
    node = place.pair.ours.tape.nodes[index]
    name = op_name(node)
    at = -1
    if name == "add" and len(node.args) == 2 and isinstance(node.args[1], float) and 0 <= node.args[1] < SMALL:
        at = 1
    elif name in NORMS:
        at = [a.name for a in node.op._schema.arguments].index("eps")
    if at < 0 or node.args[at] == eps:
        return
    args = tuple(eps if i == at else a for i, a in enumerate(node.args))
    edit = Edit(ops={index: recalled(node.op, args, node.kwargs)})
    if place.ok(edit):
        yield Found("eps", f"eps is {node.args[at]:g}, the source has {eps:g}", edit, index)


# -- one value in place of another ------------------------------------------------------------------------------------
def activation(place: Place) -> Iterator[Found]:
    run = place.pair.ours
    inputs = [v for i in place.ours_after[:3] for v in run.data_inputs(i) if run.both[v] is not False]
    for vid in dict.fromkeys(inputs):
        if not run.tape.values[vid].dtype.is_floating_point:
            continue
        try:
            x = run.held(vid)
        except Untold:
            continue
        results = [(i, o, y) for i, o, y in place.results(place.ours_after[:12]) if y.shape == x.shape]
        if run.both[vid] and results == []:
            continue
        for name, f in ACTIVATIONS.items():
            fx = f(x)
            if name != "no activation" and not place.pair.occurs(fx):
                continue
            for index, out, y in results:
                has = next((n for n, g in ACTIVATIONS.items() if n != name and _close(g(x), y)), "")
                if not has:
                    continue
                edit = Edit(leaves={out: fx})
                if place.ok(edit):
                    kind = "gelu" if "GELU" in has and "GELU" in name else "activation"
                    yield Found(kind, f"its activation is {has}, the source has {name}", edit, index)


def _close(a: Tensor, b: Tensor) -> bool:
    top = float(b.abs().max()) if b.numel() else 0.0
    if a.shape != b.shape or not top < HUGE:  # of what is masked with large numbers, anything would be close
        return False
    return float((a - b).abs().max()) <= 1e-12 * max(top, 1e-300)


def dropout(place: Place) -> Iterator[Found]:
    run = place.pair.ours

    def drawn(vid: int) -> bool:
        return any(op_name(run.tape.nodes[n]).lstrip("_").startswith(RANDOM) for n in run.before([vid], 4))

    for index in place.ours_after[:10]:
        node = run.tape.nodes[index]
        if op_name(node) not in ("mul", "native_dropout"):
            continue
        noise = [v for v in node.inputs if drawn(v)]
        kept = [v for v in node.inputs if v not in noise]
        if (noise or op_name(node) == "native_dropout") and len(kept) == 1:
            edit = Edit(leaves={node.outs[0]: run.held(kept[0])})
            if place.ok(edit):
                yield Found("dropout", "dropout is left on: it draws at random also in eval mode", edit, index)


def scale(place: Place) -> Iterator[Found]:
    """A value that is a multiple of one of the reference's."""
    other = place.pair.theirs
    wanted = []
    for t in place.theirs_after[:40]:
        wanted += [o for o in other.tape.nodes[t].outs if o >= 0 and other.both[o] is False]
    for index, out, y in place.results(place.ours_after[:8]):
        mine = fingerprint(y)
        if mine is None:
            continue
        for w in wanted:
            value = other.tape.values[w]
            f = value.fingerprint
            if f is None or math.prod(value.shape) != y.numel():
                continue
            c = f[0] / mine[0]
            if abs(c - 1) < 1e-9 or not 1e-6 < c < 1e6 or abs(f[1] - c * c * mine[1]) > 1e-9 * f[1]:
                continue
            edit = Edit(leaves={out: y * c})
            if place.ok(edit):
                name = op_name(place.pair.ours.tape.nodes[index])
                softly = any(op_name(place.pair.ours.tape.nodes[n]) in SOFTMAX for n in place.ours_after[:12])
                what = "its attention scores are" if softly else f"the result of its {name} is"
                yield Found("scale", f"{what} {_times(c)} the source's", edit, index)


def _times(c: float) -> str:
    inverse = 1 / c
    root = inverse * inverse
    known = f" (sqrt({root:.0f}))" if abs(root - round(root)) < 1e-6 and 1 < root < 4096 else ""
    return f"{inverse:.6g}{known} times" if inverse >= 1 else f"1/{c:.6g} times"


# -- positions, padding, statistics -----------------------------------------------------------------------------------
def positions(place: Place) -> Iterator[Found]:
    """Rows of a table that begin at another place."""
    run = place.pair.ours
    for v in run.tape.nodes[place.first].inputs:
        value = run.tape.values[v]
        near = run.before([v], 6) if not value.data else []
        if value.data:  # looked up by numbers that the inputs make
            near = [n for n in run.before([v], 8) if op_name(run.tape.nodes[n]) in ("index", "index_select", "gather")]
        for index in near:
            node = run.tape.nodes[index]
            held = [i for i in node.inputs if not run.tape.values[i].data and len(run.tape.values[i].shape) > 1]
            table = next((i for i in held if run.tape.values[i].dtype.is_floating_point), None)
            if table is None or not node.outs or node.outs[0] < 0:
                continue
            yield from _shifted_rows(place, index, table)
    node = place.node
    if op_name(node) in ("index", "index_select"):
        for i in node.inputs:
            if run.tape.values[i].weights and not run.tape.values[i].data:
                yield from _shifted_rows(place, place.first, i)


def _shifted_rows(place: Place, index: int, table: int) -> Iterator[Found]:
    run = place.pair.ours
    try:
        w = run.held(table)
    except Untold:
        return
    owner = run.tape.values[place.pair.ours.root(table)].name.rpartition(".")[0] or None
    axes = [a for a in range(w.ndim) if w.shape[a] > 1][:2]
    for axis in axes:
        for by in (1, 2, -1, -2, 3, -3, 4, -4):
            if abs(by) < w.shape[axis]:
                edit = Edit(leaves={table: torch.roll(w, -by, axis)})
                if place.ok(edit):
                    said = f"its positions begin {abs(by)} {'too early' if by > 0 else 'too late'} in the table"
                    yield Found("position offset", said, edit, index, None if owner is None else owner)
                    return
        clamped = torch.cat([w.narrow(axis, 1, w.shape[axis] - 1), w.narrow(axis, w.shape[axis] - 1, 1)], axis)
        edit = Edit(leaves={table: clamped})
        if place.ok(edit):
            yield Found("position offset", "its positions begin 1 too early in the table", edit, index, owner)
            return


def padding(place: Place) -> Iterator[Found]:
    """What stands beyond the border of a convolution."""
    run = place.pair.ours
    for index in place.ours_after[:14]:
        node = run.tape.nodes[index]
        if op_name(node) != "convolution":
            continue
        pad, transposed = node.args[4], node.args[6]
        if transposed:
            continue
        kernel = run.tape.values[node.args[1].vid].shape[2:]
        wide = len(kernel)
        x_vid = node.args[0].vid
        has, base, around = "zeros", x_vid, [int(p) for p in pad]
        if not any(around):  # padded before: find what it was
            base, around = _unpadded(place, x_vid, wide)
            has = "another border"
        if not any(around):
            continue
        try:
            x = run.held(base)
            now = run.held(x_vid)
        except Untold:
            continue
        sizes = [n for a in reversed(around) for n in (a, a)]
        for mode in ("constant", "reflect", "replicate", "circular"):
            for sides in _sides(sizes) if wide == 1 else [sizes]:
                try:
                    padded = F.pad(x, sides, mode=mode)
                except (RuntimeError, ValueError):
                    continue  # torch has no such border here (a reflection wider than what it reflects): no cause
                if padded.shape == now.shape and torch.equal(padded, now):
                    has = "zeros" if mode == "constant" else mode
                    continue

                edit = Edit(ops={index: _convolved(padded, wide)})
                if place.ok(edit):
                    wants = "zeros" if mode == "constant" else mode
                    if wants == has:
                        said = f"it pads by {sizes[0]} and {sizes[1]}, the source by {sides[0]} and {sides[1]}"
                    else:
                        said = f"its convolution pads with {has}, the source with {wants}"
                    yield Found("padding mode", said, edit, index)


def _convolved(padded: Tensor, wide: int) -> Callable[[tuple[Any, ...], dict[str, Any]], Tensor]:
    def run(args: tuple[Any, ...], _: dict[str, Any]) -> Tensor:
        return torch.convolution(padded, args[1], None, args[3], [0] * wide, args[5], False, args[7], args[8])

    return run


def _sides(sizes: list[int]) -> list[list[int]]:
    total = sum(sizes)
    return [sizes, *([a, total - a] for a in range(total + 1) if [a, total - a] != sizes)]


def _unpadded(place: Place, vid: int, wide: int) -> tuple[int, list[int]]:
    run = place.pair.ours
    shape = run.tape.values[vid].shape
    for n in run.before([vid], 24):
        for v in run.tape.nodes[n].inputs:
            s = run.tape.values[v].shape
            if run.tape.values[v].data and len(s) == len(shape) and s[: len(s) - wide] == shape[: len(s) - wide]:
                extra = [(a - b) for a, b in zip(shape[-wide:], s[-wide:], strict=True)]
                if all(e >= 0 and e % 2 == 0 for e in extra) and any(extra) and run.both[v] is not False:
                    return v, [e // 2 for e in extra]
    return vid, [0] * wide


_STATISTICS = "it normalises by the batch's own statistics, the source by the running ones"


def statistics(place: Place) -> Iterator[Found]:
    """Another kind of normalisation: of the batch, of the layer, by the root mean square."""
    run = place.pair.ours
    near = place.ours_after[:14]
    names = {op_name(run.tape.nodes[i]) for i in near}
    for index in near[:4]:
        if op_name(run.tape.nodes[index]) == "native_batch_norm":
            yield from _batch_statistics(place, index)
    if not names & {*NORMS, "sqrt", "rsqrt", "reciprocal"}:
        return
    for v in run.data_inputs(place.first)[:1]:
        try:
            x = run.held(v)
        except Untold:
            return
        if not x.is_floating_point():
            return
        several = [(i, o) for i, o, y in place.results(near) if y.shape == x.shape]
        for name, f in _normalised(x):
            if not place.pair.occurs(f) or any(_close(f, run.held(o)) for _, o in several):
                continue
            for index, out in several:
                edit = Edit(leaves={out: f})
                if place.ok(edit):
                    yield Found(
                        "normalisation", f"it normalises otherwise than the source, which takes {name}", edit, index
                    )
                    return


def _normalised(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    for eps in EPS:
        yield f"layer norm (eps {eps:g})", F.layer_norm(x, x.shape[-1:], eps=eps)
        yield f"root mean square (eps {eps:g})", x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def _batch_statistics(place: Place, index: int) -> Iterator[Found]:
    """A batch norm that took the batch's statistics: with the running ones, scale and shift included."""
    run = place.pair.ours
    node = run.tape.nodes[index]
    x = run.held(node.inputs[0])
    named = {v.name: i for i, v in enumerate(run.tape.values) if v.name.startswith(node.module)}
    view = [1, -1] + [1] * (x.ndim - 2)
    for name, mean in named.items():
        var = named.get(name.replace("running_mean", "running_var"))
        if not name.endswith("running_mean") or var is None or run.held(mean).numel() != x.shape[1]:
            continue
        m, s = (run.held(v).reshape(view) for v in (mean, var))
        edit = Edit(leaves={node.outs[0]: (x - m) / torch.sqrt(s + node.args[7])})
        if place.ok(edit):
            yield Found("statistics", _STATISTICS, edit, index, name.rpartition(".")[0])
            return
