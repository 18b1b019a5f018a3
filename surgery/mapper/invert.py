"""Weights that are computed from weights: settle what they are computed from.

Where both programs compute alike (weight norm of weight norm, exp of exp), the arguments correspond; where only the
target computes, the computation is inverted (a weight-norm gain is the norm of the direction: Salimans & Kingma 2016).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surgery.mapper.affine import NotAffine
from surgery.mapper.factors import factors, multiplied, pair, virtual_holder
from surgery.mapper.kinds import base
from surgery.mapper.record import Node, Ref
from surgery.mapper.terms import Virtual
from surgery.mapper.unify import Assignment

if TYPE_CHECKING:
    from surgery.mapper.hypothesis import Hypothesis
    from surgery.mapper.reference import Reference

INVERSE = {
    "exp": "log",
    "log": "exp",
    "neg": "neg",
    "reciprocal": "reciprocal",
    "sqrt": "square",
    "rsqrt": "rsqrt_inverse",
}


def solve(h: Hypothesis, u: Virtual, at: Tensor, sources: list[Tensor]) -> bool:
    """Make the elements `at` of a computed weight equal to source elements. False where that cannot be done."""
    if len(sources) != 1:
        return False
    numbers = sources[0].to(torch.int64)
    ref = h.reference
    if multiplied(h, u) is not None:
        return pair(h, factors(h, at + u.offset), factors(ref, numbers), _pair)
    ru = virtual_holder(ref, numbers)
    if ru is not None and ru.how == u.how and _same_operator(h, u, ref, ru):
        # Computed alike: the arguments must correspond. Another constant (an eps) is another function.
        return _alike(h, u, at, ru, numbers - ru.offset)
    return _inverted(h, u, at, numbers)


def _same_operator(h: Hypothesis, u: Virtual, ref: Reference, ru: Virtual) -> bool:
    a, b = _node(h, u.vid), _node(ref, ru.vid)
    return a is not None and b is not None and base(a.op) == base(b.op)


def _node(p: Any, vid: int) -> Node | None:
    v = p.tape.values[vid]
    return p.tape.nodes[v.node] if v.origin == "node" else None


def _alike(h: Hypothesis, u: Virtual, at: Tensor, ru: Virtual, pos: Tensor) -> bool:
    ref = h.reference
    if u.how:  # 1/a against 1/b: a against b
        return _pair(h, h.weight_matrix(u.vid).flat()[at], ref.weight_matrix(ru.vid).flat()[pos])
    nt, nr = _node(h, u.vid), _node(ref, ru.vid)
    if nt is None or nr is None or base(nt.op) != base(nr.op):
        return False
    if not _same_constants(h, nt, ref, nr):
        return False
    shape_t, shape_r = h.tape.values[u.vid].shape, ref.tape.values[ru.vid].shape
    elementwise = base(nt.op) not in ("mm", "bmm", "convolution", "matmul")
    pairs = []
    mine, theirs = _weights(h, nt), _weights(ref, nr)
    if len(mine) != len(theirs):
        return False
    for a, b in zip(mine, theirs, strict=True):
        wa, wb = _ids(h, a), _ids(ref, b)
        if wa is None or wb is None:
            return False
        if elementwise:
            try:
                pairs.append((wa.expand(shape_t).reshape(-1)[at], wb.expand(shape_r).reshape(-1)[pos]))
            except RuntimeError:
                return False
        elif wa.shape == wb.shape and at.numel() == math.prod(shape_t):
            pairs.append((wa.reshape(-1), wb.reshape(-1)))
        else:
            return False
    return bool(pairs) and all(_pair(h, a, b) for a, b in pairs)


def _weights(p: Any, node: Node) -> list[int]:
    out = []

    def walk(x: Any) -> None:
        if isinstance(x, Ref) and p.tape.values[x.vid].weights:
            out.append(x.vid)
        elif isinstance(x, (list, tuple)):
            for y in x:
                walk(y)

    walk(node.args)
    return out


def _ids(p: Any, vid: int) -> Tensor | None:
    try:
        found: Tensor = p.weight_matrix(vid).dense()
    except NotAffine:
        return None
    return found


def _same_constants(h: Hypothesis, a: Node, ref: Reference, b: Node) -> bool:
    """The arguments that are no weights must agree."""

    def plain(p: Any, node: Node) -> list[Any]:
        out: list[Any] = []
        for x in node.args:
            if isinstance(x, Ref):
                if not p.tape.values[x.vid].weights:
                    k = p.known(x.vid)
                    out.append(None if k is None else k.flatten().tolist()[:64])
            elif isinstance(x, (int, float, bool)):
                out.append(float(x))
        return out

    x, y = plain(h, a), plain(ref, b)
    return len(x) == len(y) and all(
        p == q or (isinstance(p, float) and isinstance(q, float) and math.isclose(p, q, rel_tol=1e-12))
        for p, q in zip(x, y, strict=True)
    )


def _pair(h: Hypothesis, a: Tensor, b: Tensor) -> bool:
    a, b = a.to(torch.int64), b.to(torch.int64)
    keys, inverse = torch.unique(a, return_inverse=True)
    vals = torch.empty_like(keys)
    vals[inverse] = b
    if not bool((vals[inverse] == b).all()) or bool((keys == 0).any()):
        return False
    return h.settle([Assignment.of(keys, vals)])


def _inverted(h: Hypothesis, u: Virtual, at: Tensor, numbers: Tensor) -> bool:
    ref = h.reference
    if u.how == "reciprocal":
        ids = h.weight_matrix(u.vid).flat()[at]
        return _pair(h, ids, ref.derive("reciprocal", {}, numbers))
    node = _node(h, u.vid)
    if node is None:
        return False
    name = base(node.op)
    args = _weights(h, node)
    if name == "_weight_norm_interface":
        v, g, dim = node.args[0].vid, node.args[1].vid, node.args[2] if len(node.args) > 2 else 0
        shape = h.tape.values[v].shape
        if at.numel() != math.prod(shape):
            return False
        full = torch.empty(math.prod(shape), dtype=torch.int64)
        full[at] = numbers
        gain = ref.derive("norm_except", {"dim": dim}, full.reshape(shape))
        return _pair(h, h.weight_matrix(v).flat(), full) and _pair(h, h.weight_matrix(g).flat(), gain.reshape(-1))
    if len(args) != 1:
        return False
    ids = h.weight_matrix(args[0]).dense()
    if ids.shape != h.tape.values[u.vid].shape:
        return False
    ids = ids.reshape(-1)[at]
    if name in INVERSE:
        return _pair(h, ids, ref.derive(INVERSE[name], {}, numbers))
    if name in ("add", "sub"):
        other = next((x for x in node.args[:2] if not (isinstance(x, Ref) and x.vid == args[0])), None)
        c = _scalar(h, other)
        if c is None:
            return False
        first = isinstance(node.args[0], Ref) and node.args[0].vid == args[0]
        if name == "sub" and not first:  # c - w
            return _pair(h, ids, ref.derive("shift", {"by": c}, ref.derive("neg", {}, numbers)))
        return _pair(h, ids, ref.derive("shift", {"by": -c if name == "add" else c}, numbers))
    return False


def _scalar(h: Hypothesis, x: Any) -> float | None:
    if isinstance(x, (int, float)):
        return float(x)
    if isinstance(x, Ref):
        k = h.known(x.vid)
        if k is not None and k.numel() == 1:
            return float(k)
    return None
