"""Two values laid over each other: which element of one is which of the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from surgery.mapper.rows import Rows, match_rows
from surgery.mapper.terms import Term


def orders(shape_t: tuple[int, ...], shape_r: tuple[int, ...]) -> Iterator[Tensor]:
    """Flat positions of the reference's elements in the target's order, for every permutation of axes that fits."""
    n = math.prod(shape_r)
    if math.prod(shape_t) != n:
        return
    grid = torch.arange(n)
    a, b = [s for s in shape_t if s != 1], [s for s in shape_r if s != 1]
    if a == b:
        yield grid
    if sorted(a) == sorted(b) and 1 < len(b) <= 5:
        for p in itertools.permutations(range(len(b))):
            if p != tuple(range(len(b))) and [b[i] for i in p] == a:
                yield grid.reshape(b).permute(p).reshape(-1)


def _first_seen(x: Tensor) -> Tensor:
    """Distinct values in the order in which they first appear."""
    values, inverse = torch.unique(x, return_inverse=True)
    first = torch.full((len(values),), len(x), dtype=torch.int64)
    first.scatter_reduce_(0, inverse, torch.arange(len(x)), "amin")
    return values[torch.argsort(first)]


def flat(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.reshape(-1).to(torch.int64)


def align_products(
    t: Term, r: Term, rows: Rows, shape_t: tuple[int, ...], shape_r: tuple[int, ...]
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """(element of the reference for each target element, columns of the target, columns of the reference, penalty)."""
    rt, ct, rr, cr = flat(t.row), flat(t.col), flat(r.row), flat(r.col)
    pt = rt > 0
    whole = bool(pt.all())  # then there is nothing to leave out

    def present(t: Tensor) -> Tensor:
        return t if whole else t[pt]

    mapped = torch.full_like(rt, -1)
    mapped[pt] = rows.rows[present(rt) - 1] + 1
    for order in orders(shape_t, shape_r):
        if bool((present(mapped) == present(rr[order])).all()):
            pair = function(present(ct), present(cr[order]))
            if pair is not None and len(torch.unique(pair[1])) == len(pair[1]):
                yield order, pair[0] - 1, pair[1] - 1, 0.0
                return
    pr = rr > 0
    seen_t, seen_r = _first_seen(present(ct)), _first_seen(cr[pr])
    size = max(int(rr.max()), int(mapped.max())) + 1
    table = torch.full((size, int(cr.max()) + 1), -1, dtype=torch.int64)
    table[rr[pr], cr[pr]] = torch.nonzero(pr).flatten()
    m, n = len(seen_t), len(seen_r)
    choices: list[tuple[Tensor, float]] = []
    if m == n:
        choices.append((seen_r, 0.5))
        if not torch.equal(torch.sort(seen_r).values, seen_r) or not torch.equal(torch.sort(seen_t).values, seen_t):
            inverse = torch.empty_like(seen_t)
            inverse[torch.argsort(seen_t)] = torch.sort(seen_r).values
            choices.append((inverse, 1.0))
    elif m < n and n % m == 0 and n // m <= 64:
        choices += [(seen_r[i * m : (i + 1) * m], 2.0) for i in range(n // m)]
        choices += [(seen_r[i :: n // m], 3.0) for i in range(n // m)]
    for chosen, penalty in choices:
        column = torch.zeros(int(ct.max()) + 1, dtype=torch.int64)
        column[seen_t] = chosen
        e = torch.full_like(rt, -1)
        to = present(mapped)
        e[pt] = torch.where(to > 0, table[to.clamp_min(0), column[present(ct)]], -1)
        if bool((e[pt & (mapped > 0)] >= 0).all()):
            yield e, seen_t - 1, chosen - 1, penalty


def align_values(a: Tensor, b: Tensor) -> Iterator[Tensor]:
    """Elements of b in the order of a where the two hold the same values (zeros of padding aside)."""
    fa, fb = a.reshape(-1), b.reshape(-1)
    scale = fb.abs().max().clamp_min(1e-300) if fb.numel() else torch.tensor(1.0)
    for order in orders(tuple(a.shape), tuple(b.shape)):
        if bool(((fa - fb[order]).abs() <= 1e-8 * scale).all()):
            yield order
            return
    if a.ndim and b.ndim and a.shape[-1] == b.shape[-1] and a.numel() <= b.numel():  # some of the rows, or all of them
        rows = match_rows(
            a.reshape(-1, a.shape[-1]), torch.arange(a.numel() // a.shape[-1]), b.reshape(-1, b.shape[-1])
        )
        if rows is not None and rows.columns is None:
            k = a.shape[-1]
            e = (rows.rows.unsqueeze(1) * k + torch.arange(k)).reshape(-1)
            if bool(((fa - fb[e.clamp_min(0)]).abs() <= 1e-8 * scale)[e >= 0].all()):
                yield e
                return
    if fa.numel() == fb.numel() and fa.numel() <= 1 << 22:
        oa, ob = torch.argsort(fa, stable=True), torch.argsort(fb, stable=True)
        if bool(((fa[oa] - fb[ob]).abs() <= 1e-8 * scale).all()):
            e = torch.empty_like(oa)
            e[oa] = ob
            yield e


def function(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """The mapping a -> b as (distinct a, their b), or None where one a meets two b."""
    if a.numel() == 0:
        return a, b
    size = int(a.max()) + 1
    lo = int(a.min())
    if size - lo <= 8 * a.numel() + 1024:
        first = torch.full((size - lo,), -1, dtype=torch.int64)
        first[a - lo] = b
        if not bool((first[a - lo] == b).all()):
            return None
        keys = torch.nonzero(first >= 0).flatten()
        return keys + lo, first[keys]
    keys, inverse = torch.unique(a, return_inverse=True)
    vals = torch.empty_like(keys)
    vals[inverse] = b
    return (keys, vals) if bool((vals[inverse] == b).all()) else None
