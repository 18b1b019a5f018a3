"""Where two sums meet: which weights make a value of the target equal to a value of the reference.

A target value and a reference value, each a sum of terms (see affine.py), are laid over each other: products by the
rows that both see, scaled and known values by value, weights by the pattern in which they recur. What comes out is a
list of assignments: numbers of target elements, and for each the number of the source element (or of several, to be
added; or none, which means zero). Nothing here knows a name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from surgery.mapper.align import align_products, align_values, flat, function, orders
from surgery.mapper.beside import Beside, MadeOf
from surgery.mapper.grid import Grid
from surgery.mapper.masks import masked
from surgery.mapper.record import fingerprint, same
from surgery.mapper.rows import Rows, match_sites
from surgery.mapper.terms import Site, Term, compact, informative


@dataclass
class Assignment:
    """Target elements and, for each, the source elements whose sum it is; no sources: zero. `factors`: what each of
    the sources is multiplied by (none: all by 1)."""

    target: Grid
    sources: list[Grid] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, target: Tensor, *sources: Tensor) -> Assignment:
        return cls(*_rows_apart(target, sources))


def _rows_apart(target: Tensor, sources: Sequence[Tensor]) -> tuple[Grid, list[Grid]]:
    """Numbers that run on in rows of one length, on all sides, as rows and columns."""
    n = len(target)
    jumps = torch.nonzero(target[1:] - target[:-1] != 1).flatten() if target.ndim == 1 else torch.zeros(0)
    width = int(jumps[0]) + 1 if len(jumps) else n
    if 1 < width < n and n % width == 0 and all(s.shape == target.shape for s in sources):
        step = torch.arange(width)
        rows = [t.to(torch.int64).reshape(-1, width) for t in (target, *sources)]
        if all(bool((r == r[:, :1] + step).all()) and bool((r[:, 0] > 0).all()) for r in rows):
            grids = [Grid((n // width, width), 0, [r[:, :1], step[None]]) for r in rows]
            return grids[0], grids[1:]
    return Grid.of(target), [Grid.of(s) for s in sources]


@dataclass
class Match:
    """One way to make the values equal. `missing`: addends of the reference that the target has no place for."""

    assignments: list[Assignment]
    penalty: float = 0.0
    missing: int = 0
    zeros: int = 0
    swapped: bool = False  # addends of one sum that could as well change places
    gain: float = 1.0  # how many times the reference's value the target's is
    like: int = -1  # the value of the reference that was matched
    folds: int = -1  # the product of two values (a node of the target) whose constant factor the weights take
    inner: bool = False  # the reference's value is an addend of a larger sum, and nothing else


def live(t: Term) -> bool:
    """A product of rows that are not all zero."""
    if t.kind != "product":
        return False
    assert t.site is not None
    assert t.row is not None
    if t.site.conv:
        return informative(t.site.x)
    rows = present_rows(t)
    return informative(t.site.x[rows[:4]]) or informative(t.site.x[rows])


def present_rows(t: Term) -> Tensor:
    assert t.row is not None
    rows = flat(compact(t.row))
    if rows.numel() and int(rows[0]) == 1 and int(rows[-1]) == len(rows) and bool((rows[1:] > rows[:-1]).all()):
        return rows - 1
    seen = torch.zeros(int(rows.max()) + 1 if rows.numel() else 1, dtype=torch.bool)
    seen[rows] = True
    seen[0] = False
    return torch.nonzero(seen).flatten() - 1


def unify(
    target: list[Term],
    shape_t: tuple[int, ...],
    source: list[Term],
    shape_r: tuple[int, ...],
    *,
    exact: bool = False,
    made_of: tuple[MadeOf, MadeOf] | None = None,
) -> list[Match]:
    """All the ways in which the target's sum can be made equal to the reference's, up to a constant factor (`gain`),
    by the source's own values. `exact`: equal without such a factor; where constants differ, the weights take them.
    `made_of`: which tensors the weights of a term of either side are computed from."""
    target, source = _merged(target), _merged(source)
    tp, rp = [t for t in target if live(t)], [t for t in source if live(t)]
    ts, rs = [t for t in target if t.kind == "scale"], [t for t in source if t.kind == "scale"]
    settled = any(t.kind == "known" and t.value is not None and informative(t.value) for t in target)
    if len(tp) > len(rp) or (len(tp) < len(rp) and not (tp and settled)) or (not tp and len(ts) != len(rs)):
        return []  # a product of the reference may be settled, and so known, in the target; never the other way round
    out: list[Match] = []
    if tp:
        for pairing in _pairings(tp, rp, exact):
            out += _by_products(pairing, target, shape_t, source, shape_r, exact, made_of)
    elif ts:
        for perm in _scales_in_order(ts, rs):
            out += _by_values(list(zip(ts, perm, strict=True)), target, source, exact, made_of)
            if out:
                break
    else:
        out += _by_known(target, shape_t, source, shape_r, exact)
    return out


def _scales_in_order(ts: list[Term], rs: list[Term]) -> Iterator[Sequence[Term]]:
    """Scaled values of one side in orders in which they may stand for those of the other: first by what is scaled."""
    left, order = list(rs), []
    for t in ts if len(ts) > 2 else ():
        f = fingerprint(t.value) if t.value is not None else None
        found = [r for r in left if f and r.value is not None and (g := fingerprint(r.value)) and same(f, g)]
        if not found:
            break
        order.append(found[0])
        left = [r for r in left if r is not found[0]]
    if len(order) == len(rs):
        yield order
    yield from itertools.islice(itertools.permutations(rs), 6)


def _merged(terms: list[Term]) -> list[Term]:
    """Terms that stand in different elements (parts of a concatenation, steps that were stacked) as one: scaled values,
    products with one matrix, one and the same weights."""
    out: list[Term] = []
    for t in terms:
        for k, o in enumerate(out):
            if o.kind == t.kind and o.coef == t.coef and (joined := _joined(o, t)) is not None:
                out[k] = joined
                break
        else:
            out.append(t)
    return out


def _joined(a: Term, b: Term) -> Term | None:
    if a.kind == "product":
        return _stacked(a, b)
    if a.kind not in ("scale", "weight") or a.ids is None or b.ids is None or bool(((a.ids > 0) & (b.ids > 0)).any()):
        return None
    if a.kind == "scale":
        if a.value is None or b.value is None:
            return None
        return replace(a, value=torch.where(b.ids > 0, b.value, a.value), ids=a.ids + b.ids)
    if a.place is not None or b.place is not None or not torch.equal(torch.unique(a.ids), torch.unique(b.ids)):
        return None
    return replace(a, ids=a.ids + b.ids)


def _stacked(a: Term, b: Term) -> Term | None:
    """Two products with one matrix, in different elements, as the product of all their rows."""
    s, t = a.site, b.site
    if s is None or t is None or a.row is None or b.row is None or a.col is None or b.col is None:
        return None
    if s.conv or t.conv or s.x.shape[1] != t.x.shape[1] or s.w.lo != t.w.lo or not s.w.same(t.w):
        return None
    if bool(((a.row > 0) & (b.row > 0)).any()):
        return None
    row = torch.where(b.row > 0, b.row + len(s.x), a.row)
    site = Site(s.node, torch.cat([s.x, t.x]), -1, s.w)
    return replace(a, site=site, row=row, col=a.col + b.col)


def _pairings(tp: list[Term], rp: list[Term], exact: bool) -> Iterator[list[tuple[Term, Term, Rows]]]:
    """Products of one side paired with products of the other that read the same rows (or multiples of them)."""

    def go(i: int, free: list[int], acc: list[tuple[Term, Term, Rows]]) -> Iterator[list[tuple[Term, Term, Rows]]]:
        if i == len(tp):
            yield list(acc)
            return
        for j in free:
            a, b = tp[i].site, rp[j].site
            assert a is not None
            assert b is not None
            rows = match_sites(a, b, present_rows(tp[i]), scaled=exact)
            if rows is not None:
                acc.append((tp[i], rp[j], rows))
                yield from go(i + 1, [f for f in free if f != j], acc)
                acc.pop()

    yield from itertools.islice(go(0, list(range(len(rp))), []), 24)


def _by_products(
    pairs: list[tuple[Term, Term, Rows]],
    target: list[Term],
    shape_t: tuple[int, ...],
    source: list[Term],
    shape_r: tuple[int, ...],
    exact: bool,
    made_of: tuple[MadeOf, MadeOf] | None,
) -> list[Match]:
    lead_t, lead_r, rows = pairs[0]
    paired = [(t, r) for t, r, _ in pairs]
    out = []
    for e, ct, cr, penalty in align_products(lead_t, lead_r, rows, shape_t, shape_r):
        assignments = _weights(lead_t, lead_r, rows, ct, cr, exact)
        ok = assignments is not None
        for t, r, more in pairs[1:]:
            if not ok or not (exact or math.isclose(t.coef / lead_t.coef, r.coef / lead_r.coef, rel_tol=1e-9)):
                ok = False
                break
            pt = (flat(t.row) > 0) & (e >= 0)
            if not bool(pt.any()):
                ok = False
                break
            pair = function(flat(t.col)[pt], flat(r.col)[e[pt]])
            if pair is None or bool((pair[1] == 0).any()):
                ok = False
                break
            extra = _weights(t, r, more, pair[0] - 1, pair[1] - 1, exact)
            if extra is None:
                ok = False
                break
            assert assignments is not None
            assignments += extra
        scaled = _scales(e, target, source, lead_t.coef / lead_r.coef, exact) if ok else None
        if scaled is not None and assignments is not None:
            made, more_pairs = scaled
            assignments += made
            beside = Beside(target, source, paired + more_pairs, made_of)
            m = _rest(e, beside, lead_t.coef, lead_r.coef, exact)
            if m is not None:
                m.assignments = assignments + m.assignments
                m.penalty += penalty
                out.append(m)
    return out


def _weights(t: Term, r: Term, rows: Rows, ct: Tensor, cr: Tensor, exact: bool) -> list[Assignment] | None:
    """The weight matrix of one product from the other's, column by column."""
    assert t.site is not None
    assert r.site is not None
    factors = [rows.gain * r.coef / t.coef] if exact else []
    if t.site.conv and r.site.conv:
        wt, wr = t.site.kernel().take(0, ct), r.site.kernel().take(0, cr)
        if rows.columns is not None:
            if bool((rows.columns < 0).any()):
                return None
            wr = wr.take(1, rows.columns)
    else:
        a, b = t.site.linear(), r.site.linear()
        assert a is not None
        assert b is not None
        wt = a[1] if _all(ct, a[1].shape[1]) else a[1].take(1, ct)
        wr = b[1] if _all(cr, b[1].shape[1]) else b[1].take(1, cr)
        if rows.columns is not None:
            wr = wr.take(0, rows.columns)
    if wt.shape != wr.shape:
        return None
    if not wt.holes and not wr.holes:
        return [Assignment(wt, [wr], factors)]
    it, ir = wt.flat(), wr.flat()
    if bool(((it == 0) & (ir != 0)).any()):
        return None
    keep = it != 0
    it, ir = it[keep], ir[keep]
    zero = ir == 0
    out = [Assignment(Grid.of(it[~zero]), [Grid.of(ir[~zero])], factors)] if not bool(zero.all()) else []
    if bool(zero.any()):
        out.append(Assignment.of(it[zero]))
    return out


def _all(columns: Tensor, n: int) -> bool:
    return len(columns) == n and bool((columns == torch.arange(n)).all())


def _scales(
    e: Tensor, target: list[Term], source: list[Term], gain: float, exact: bool
) -> tuple[list[Assignment], list[tuple[Term, Term]]] | None:
    """The scaled values of the target beside a product, each with one of the reference's whose known factor is the
    same under e, and the pairs; None where one has none, or where one of the reference's is left and the target adds
    nothing known."""
    free = [r for r in source if r.kind == "scale" and r.value is not None]
    out: list[Assignment] = []
    pairs: list[tuple[Term, Term]] = []
    for t in target:
        if t.kind != "scale":
            continue
        for r in free:
            alike = exact or math.isclose(t.coef / gain, r.coef, rel_tol=1e-9)
            if alike and (made := _scale(e, t, r)) is not None:
                made.factors = [r.coef / t.coef] if exact else []
                out.append(made)
                pairs.append((t, r))
                free = [f for f in free if f is not r]
                break
        else:
            return None
    known = any(t.kind == "known" and t.value is not None and informative(t.value) for t in target)
    return None if free and not known else (out, pairs)


def _scale(e: Tensor, t: Term, r: Term) -> Assignment | None:
    """The scale of one known value from the scale of another, where the two values are the same under e."""
    here = (flat(t.ids) > 0) & (e >= 0)
    if t.value is None or r.value is None or not bool(here.any()):
        return None
    a, b = t.value.reshape(-1)[here], r.value.reshape(-1)[e[here]]
    if not bool(((a - b).abs() <= 1e-8 * b.abs().max()).all()):
        return None
    pair = function(flat(t.ids)[here], flat(r.ids)[e[here]])
    return None if pair is None or bool((pair[1] == 0).any()) else Assignment.of(*pair)


def _by_values(
    pairs: list[tuple[Term, Term]],
    target: list[Term],
    source: list[Term],
    exact: bool,
    made_of: tuple[MadeOf, MadeOf] | None,
) -> list[Match]:
    """Scaled values: the same known factor on both sides."""
    lead_t, lead_r = pairs[0]
    if lead_t.value is None or lead_r.value is None:
        return []
    out = []
    for e in align_values(lead_t.value, lead_r.value):
        assignments = []
        for t, r in pairs:
            it, ir = flat(t.ids), flat(r.ids)[e]
            if t is not lead_t:
                if t.value is None or r.value is None:
                    break
                a, b = t.value.reshape(-1), r.value.reshape(-1)[e]
                if not bool(((a - b).abs() <= 1e-8 * b.abs().max()).all()):
                    break
            here = it > 0
            pair = function(it[here], ir[here])
            if pair is None or bool((pair[1] == 0).any()):
                break
            assignments.append(Assignment.of(pair[0], pair[1]))
            if exact:
                assignments[-1].factors = [r.coef / t.coef]
        else:
            m = _rest(e, Beside(target, source, pairs, made_of), lead_t.coef, lead_r.coef, exact)
            if m is not None:
                m.assignments = assignments + m.assignments
                out.append(m)
    return out


def _total(terms: list[Term], kind: str, shape: tuple[int, ...]) -> Tensor | None:
    total: Tensor | None = None
    for t in terms:
        if t.kind == kind:
            if t.value is None:
                return None
            v = t.coef * t.value.expand(shape)
            v = torch.where(masked(v), 0.0, v)  # any large number does
            total = v if total is None else total + v
    return total


def _masked(terms: list[Term], shape: tuple[int, ...]) -> Tensor | None:
    """Elements from which a huge number is taken (masked scores): whatever else stands there tells nothing."""
    out: Tensor | None = None
    for t in terms:
        if t.kind == "known" and t.value is not None and bool((here := masked(t.coef * t.value)).any()):
            here = here.expand(shape).reshape(-1)
            out = here if out is None else out | here
    return out


def _by_known(
    target: list[Term], shape_t: tuple[int, ...], source: list[Term], shape_r: tuple[int, ...], exact: bool
) -> list[Match]:
    a, b = _total(target, "known", shape_t), _total(source, "known", shape_r)
    out = []
    if a is not None and b is not None and bool((a != 0).any()):
        ct = next((t.coef for t in target if t.kind == "known"), 1.0)
        cr = next((t.coef for t in source if t.kind == "known"), 1.0)
        hidden, theirs = _masked(target, shape_t), _masked(source, shape_r)
        found = [(e, 1.0, 1.0) for e in align_values(a, b)]
        if not found and (ct, cr) != (1.0, 1.0) and not exact:
            found = [(e, ct, cr) for e in align_values(a / ct, b / cr)]
        for e, ct, cr in found:
            if hidden is not None:
                e = torch.where(hidden, -1, e)
            if theirs is not None:
                e = torch.where((e >= 0) & ~theirs[e.clamp_min(0)], e, -1)
            m = _rest(e, Beside(target, source), ct, cr, exact)
            if m is not None:
                out.append(m)
    elif (a is None or not bool((a != 0).any())) and (b is None or not bool((b != 0).any())):
        lead_t = next((t.coef for t in target if t.kind == "weight"), 1.0)
        lead_r = next((t.coef for t in source if t.kind == "weight"), 1.0)
        by_row = _looked_up(target, source)
        if by_row is not None and (m := _rest(by_row, Beside(target, source), lead_t, lead_r, exact)) is not None:
            m.penalty -= 1.0
            out.append(m)
        for k, e in enumerate(orders(shape_t, shape_r)):
            m = _rest(e, Beside(target, source), lead_t, lead_r, exact)
            if m is not None:
                m.penalty += k
                out.append(m)
    return out


def _looked_up(target: list[Term], source: list[Term]) -> Tensor | None:
    """For rows of a table that were looked up, the elements of the reference that have the same place in theirs: a step
    of a sequence among all of its steps."""
    t, r = ([x for x in terms if x.kind == "weight"] for terms in (target, source))
    if len(t) != 1 or len(r) != 1 or t[0].place is None or r[0].place is None or t[0].coef != r[0].coef:
        return None
    mine, theirs = flat(t[0].place), flat(r[0].place)
    if not len(mine) or not len(theirs):
        return None
    keys, order = torch.sort(theirs, stable=True)
    at = (torch.searchsorted(keys, mine, right=True) - 1).clamp_min(0)
    e = torch.where((keys[at] == mine) & (mine > 0), order[at], -1)
    return e if bool(((e >= 0) | (mine == 0)).all()) else None


def _rest(e: Tensor, beside: Beside, ct: float, cr: float, exact: bool) -> Match | None:
    """Assign the weights that stand alone in the sums (biases, table rows, tokens), element by element under e."""
    us = [t for t in beside.target if t.kind == "weight"]
    vs = [t for t in beside.source if t.kind == "weight"]
    if exact:
        ct = cr = 1.0
    m = Match([], gain=ct / cr)
    if not us and not vs:
        return m
    here = e >= 0
    et = e[here]
    iu = [flat(t.ids)[here] for t in us]
    iv = [flat(t.ids)[et] for t in vs]
    signs_u, signs_v = [t.coef / ct for t in us], [t.coef / cr for t in vs]
    code = torch.zeros(int(here.sum()), dtype=torch.int64)
    for k, x in enumerate(iu + iv):
        code |= (x > 0).to(torch.int64) << k
    many = len(us) > 1 and len(vs) > 1
    kin = {(i, j): (beside.shared(u, v), beside.near(u, v)) for i, u in enumerate(us) for j, v in enumerate(vs) if many}
    for pattern in torch.nonzero(torch.bincount(code)).flatten().tolist():
        if pattern == 0:
            continue
        at = code == pattern
        mine = [k for k in range(len(us)) if pattern >> k & 1]
        theirs = [k for k in range(len(vs)) if pattern >> (len(us) + k) & 1]
        if not _region(at, mine, theirs, iu, iv, signs_u, signs_v, kin, m, exact):
            return None
    return m


def _region(
    at: Tensor,
    mine: list[int],
    theirs: list[int],
    iu: list[Tensor],
    iv: list[Tensor],
    su: list[float],
    sv: list[float],
    kin: dict[tuple[int, int], tuple[int, bool]],
    m: Match,
    exact: bool,
) -> bool:
    """One set of elements in which the same weights stand on both sides."""
    u = {k: iu[k][at] for k in mine}
    v = {k: iv[k][at] for k in theirs}
    forward = {
        (i, j): f
        for i in mine
        for j in theirs
        if (exact or math.isclose(su[i], sv[j], rel_tol=1e-9)) and (f := function(u[i], v[j])) is not None
    }
    taken: dict[int, list[int]] = {i: [] for i in mine}
    left = set(theirs)
    both = {
        p: (kin.get(p, (0, False))[0], _likeness(f))
        for p, f in forward.items()
        if len(torch.unique(f[1])) == len(f[1])  # one to one
    }
    while both:  # the likeliest pair first
        (i, j) = max(both, key=lambda p: (*both[p], kin.get(p, (0, False))[1], -p[0], -p[1]))
        rivals = [p for p in both if p != (i, j) and both[p] == both[(i, j)] and (p[0] == i or p[1] == j)]
        if rivals and len(mine) > 1 and len(theirs) > 1:
            m.swapped = True
        taken[i].append(j)
        left.discard(j)
        both = {p: s for p, s in both.items() if p[0] != i and p[1] != j}
    for j in sorted(left):  # addends without a partner go where they fit, the smallest weight first
        hosts = [i for i in mine if (i, j) in forward]
        if not hosts:
            m.missing += 1
            m.penalty += 4.0
            continue
        host = min(hosts, key=lambda i: (len(forward[i, j][0]), i))
        taken[host].append(j)
        m.penalty += 1.0
    for i in mine:
        if not taken[i]:
            m.assignments.append(Assignment.of(torch.unique(u[i])))
            m.zeros += 1
            m.penalty += 1.0
            continue
        keys = forward[i, taken[i][0]][0]
        m.assignments.append(Assignment.of(keys, *(forward[i, j][1] for j in taken[i])))
        if exact:
            m.assignments[-1].factors = [sv[j] / su[i] for j in taken[i]]
    return True


def _likeness(f: tuple[Tensor, Tensor]) -> int:
    """Two weights that recur in one pattern are likelier a pair where their numbers run in step."""
    keys, vals = f
    if len(keys) < 2:
        return 1
    dk, dv = keys[1:] - keys[:-1], vals[1:] - vals[:-1]
    return 2 if bool((dk == dv).all()) else int(float((dk == dv).float().mean()) > 0.5)
