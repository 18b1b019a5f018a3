"""Constants that a program multiplies by: where they stand, and whether weights must take them.

A product of two values, as the scores of attention are one, says nothing of how a constant factor is shared among its
two factors and itself. What the weights of either factor are is therefore settled up to a constant; here it is found
out whether the constants that both programs spell out make up for one another.
"""

from __future__ import annotations

import math

from surgery.mapper.affine import Affine
from surgery.mapper.kinds import LAYOUT, base
from surgery.mapper.record import Node, Ref

LINEAR = ("layout", "sum", "scale")
ELEMENTWISE = ("mul", "div", "where", "masked_fill")  # masks, as some write them
BILINEAR = frozenset({"mm", "bmm", "mul", "div", "convolution"})


def of(node: Node) -> float | None:
    """The constant by which an operator multiplies a value; None where it does not."""
    name = base(node.op)
    if name == "neg":
        return -1.0
    if name not in ("mul", "div") or len(node.args) < 2:
        return None
    numbers = [a for a in node.args[:2] if not isinstance(a, Ref)]
    if len(numbers) != 1 or not isinstance(numbers[0], (int, float)):
        return None
    return float(numbers[0]) if name == "mul" else 1.0 / float(numbers[0])


def _constant(p: Affine, node: Node) -> list[float]:
    """The constant that stands there; a learned scale is one that may have any value."""
    found = of(node)
    return [found] if found is not None else [1.0] if p.kind(node) == "scale" else []


def before(p: Affine, vid: int) -> list[float]:
    """The constants that a value was multiplied by since the products that it is a sum of."""
    out, queue, seen = [], [vid], set()
    while queue:
        v = queue.pop()
        value = p.tape.values[v]
        if v in seen or value.origin != "node":
            continue
        seen.add(v)
        node = p.tape.nodes[value.node]
        if p.kind(node) in LINEAR:
            out += _constant(p, node)
            told = [i for i in node.inputs if p.tape.values[i].data]  # a bias beside it does not count
            queue += told or node.inputs
    return out


def after(p: Affine, vid: int) -> list[float]:
    """The constants that a value is multiplied by before an operation that is not linear."""
    out, queue, seen = [], [vid], set()
    while queue:
        v = queue.pop()
        for c in p.tape.consumers[v]:
            node = p.tape.nodes[c]
            if c not in seen and (p.kind(node) in LINEAR or base(node.op) in ELEMENTWISE):
                seen.add(c)
                out += _constant(p, node)
                queue += [o for o in node.outs if o >= 0]
    return out


def stated(p: Affine, node: Node) -> list[float]:
    """All constants around a product of two values."""
    a, b = (x.vid for x in node.args[:2])
    return [*before(p, a), *before(p, b), *after(p, node.outs[0])]


def bilinear(p: Affine, node: Node) -> bool:
    """A product of two values, neither of which is a weight as it is stored (but may be computed from weights)."""
    if base(node.op) not in BILINEAR or not all(isinstance(a, Ref) for a in node.args[:2]):
        return False
    if p.kind(node) == "barrier":
        return True
    weights = [a.vid for a in node.args[:2] if p.weight_only(a.vid)]
    return p.kind(node) in ("product", "scale") and all(_computed(p, v) for v in weights)


def _computed(p: Affine, vid: int) -> bool:
    g = p.grid(vid)
    return g is None or g.hi >= p.real_end


def meets(p: Affine, vids: list[int]) -> list[int]:
    """The products of two values (nodes) that one of these values is a factor of."""
    out = []
    for v in vids:
        for c in p.tape.consumers[v]:
            node = p.tape.nodes[c]
            if base(node.op) in ("mm", "bmm") and bilinear(p, node):
                out.append(c)
    return list(dict.fromkeys(out))


def _beside(p: Affine, node: Node) -> list[int]:
    """The products of two values that have a factor in common with this one: the same value moved, or some of it."""
    seen = {x.vid for x in node.args[:2] if isinstance(x, Ref)}
    queue = list(seen)
    while queue:
        v = queue.pop()
        made = p.tape.values[v].node
        near = [v] if made < 0 or base(p.tape.nodes[made].op) not in LAYOUT else p.tape.nodes[made].inputs[:1]
        for c in p.tape.consumers[v]:
            if base(p.tape.nodes[c].op) in LAYOUT and p.tape.nodes[c].inputs[0] == v:
                near = [*near, *(o for o in p.tape.nodes[c].outs if o >= 0)]
        fresh = [i for i in near if i not in seen and p.tape.values[i].dtype.is_floating_point]
        seen.update(fresh)
        queue += fresh
    return meets(p, sorted(seen))


def missing(target: Affine, node: Node, reference: Affine, vids: list[int]) -> list[float]:
    """The factors that the reference spells out around the products of these values, and that the target leaves to its
    weights: at this product of its own, and at any other that shares a factor with it (a few of the scores, reckoned
    first to choose among the queries), it multiplies by nothing at all. A target that does multiply says itself which
    function it is."""
    if any(stated(target, target.tape.nodes[c]) for c in _beside(target, node)):
        return []
    found = [math.prod(stated(reference, reference.tape.nodes[c])) for c in meets(reference, vids)]
    return list(dict.fromkeys(f for f in found if f != 0.0 and not math.isclose(f, 1.0, rel_tol=1e-12)))
