"""Which rows of one input are which rows of another: what two products have in common."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.mapper.record import fingerprint, same
from surgery.mapper.terms import Site

CLOSE = 1e-9


def row_keys(x: Tensor) -> Tensor:
    """Sums for each row that no permutation of its elements changes (normalised rows share sum and square sum)."""
    a = x.abs()
    return torch.stack([a.sum(1), (x * a).sum(1), (x * x * a).sum(1)], 1)


def _find_rows(a: Tensor, b: Tensor) -> Tensor | None:
    """For each row of keys a, a row of keys b that equals it (-1: none); equal rows are met in order."""
    if a.shape == b.shape and torch.allclose(a, b, rtol=CLOSE, atol=1e-12):
        return torch.arange(len(a))
    tol = CLOSE * b.abs().amax(0).clamp_min(1e-300)
    order = torch.argsort(b[:, 0], stable=True)
    keys = b[order, 0].contiguous()
    lo = torch.searchsorted(keys, (a[:, 0] - tol[0]).contiguous())
    hi = torch.searchsorted(keys, (a[:, 0] + tol[0]).contiguous(), right=True)
    out = torch.full((len(a),), -1, dtype=torch.int64)
    taken: dict[int, int] = {}
    for i in range(len(a)):
        if hi[i] - lo[i] > 4096:
            return None
        hits = order[lo[i] : hi[i]]
        hits = hits[((b[hits] - a[i]).abs() <= 10 * tol).all(1)]
        if len(hits):
            key = int(hits[0])
            turn = taken.get(key, 0)
            taken[key] = turn + 1
            out[i] = hits[min(turn, len(hits) - 1)]
    return out


@dataclass
class Rows:
    """How the rows (and the columns) of one input correspond to another's."""

    rows: Tensor  # for each target row, the reference's, or -1
    columns: Tensor | None  # for each target column, the reference's; None: the same
    gain: float = 1.0  # how many times the target's rows the reference's are


def _apart(a: Tensor, b: Tensor) -> bool:
    """No row of keys b equals the first of a, and no row of a the first of b: nearly all pairs of inputs end here."""
    tol = 10 * CLOSE * b.abs().amax(0).clamp_min(1e-300)
    return not bool(((b - a[:1]).abs() <= tol).all(1).any()) and not bool(((a - b[:1]).abs() <= tol).all(1).any())


def match_rows(
    x: Tensor, present: Tensor, y: Tensor, part: bool = True, keys: tuple[Tensor, Tensor] | None = None
) -> Rows | None:
    """x [N, K] (only the rows `present` count) against y [N', K]: rows of x found among the rows of y."""
    if x.shape[1] != y.shape[1]:
        return None
    probe = present[torch.linspace(0, len(present) - 1, min(4, len(present))).long()]
    kx, ky = keys if keys is not None else (row_keys(x), row_keys(y))
    if not len(present) or not len(y) or _apart(kx[present], ky):
        return None
    if len(present) == len(x) and x.shape == y.shape and torch.allclose(kx, ky, rtol=CLOSE, atol=1e-12):
        found = torch.arange(len(x))
    else:
        quick = _find_rows(kx[probe], ky)
        if quick is None:
            return None
        found = torch.full((len(x),), -1, dtype=torch.int64)
        if bool((quick < 0).any()):
            if not part:
                return None
            back = _find_rows(ky, kx[present])  # the reference may need some of these rows only
            if back is None or bool((back < 0).any()):
                return None
            found[present[back]] = torch.arange(len(y))
            probe = present[back[torch.linspace(0, len(y) - 1, min(4, len(y))).long()]]
        else:
            got = _find_rows(kx[present], ky)
            if got is None or bool((got < 0).any()):
                return None
            found[present] = got
    a, b = x[probe], y[found[probe]]
    scale = b.abs().max().clamp_min(1e-300)
    if bool(((a - b).abs() <= 1e-8 * scale).all()):
        return Rows(found, None)
    at = torch.nonzero(found >= 0).flatten()[:4096]
    g = torch.Generator().manual_seed(17)
    mix = torch.rand(len(at), generator=g, dtype=torch.float64) + 0.5  # a column in one number: ties are equal columns
    ca, cb = mix @ x[at], mix @ y[found[at]]
    oa, ob = torch.argsort(ca), torch.argsort(cb)
    if not bool(((ca[oa] - cb[ob]).abs() <= 1e-8 * cb.abs().max().clamp_min(1e-300)).all()):
        return None
    if not bool(((a[:, oa] - b[:, ob]).abs() <= 1e-8 * scale).all()):
        return None
    columns = torch.empty(x.shape[1], dtype=torch.int64)
    columns[oa] = ob
    return Rows(found, columns)


def _channels(a: Tensor, b: Tensor) -> Tensor | None:
    """For each channel of a, the channel of b that holds the same values, where they are not in the same order."""
    ka, kb = row_keys(a.transpose(0, 1).flatten(1)), row_keys(b.transpose(0, 1).flatten(1))
    if ka.shape != kb.shape or torch.allclose(ka, kb, rtol=CLOSE, atol=1e-12):
        return None
    return _find_rows(ka, kb)


def _keys(s: Site) -> Tensor:
    """The keys of a site's rows, reckoned once."""
    if s.keys is None:
        rows = s.linear()
        assert rows is not None
        s.keys = row_keys(rows[0])
    return s.keys


def _windows(t: Site, r: Site, present: Tensor) -> Tensor | None:
    """For each row of a convolution, the row of another in which the kernel stands at the same place of what is not
    zero: one may pad its input where the other cuts its output. None where no row is."""
    mine, theirs = _origins(t), _origins(r)
    last = int(present.max()) + 1
    if mine == theirs:
        return torch.arange(last)
    places, batches = [], len(t.x)
    for (size_t, at_t, step), (size_r, at_r, _) in zip(mine, theirs, strict=True):
        if (at_t - at_r) % step:
            return None
        place = torch.arange(size_t) + (at_t - at_r) // step
        places.append(torch.where((place >= 0) & (place < size_r), place, -1))
    out = torch.arange(batches)
    for place, (size_r, _, _) in zip(places, theirs, strict=True):
        out = torch.where((out.unsqueeze(-1) >= 0) & (place >= 0), out.unsqueeze(-1) * size_r + place, torch.tensor(-1))
    out = out.reshape(-1)[:last]
    return out if bool((out[present] >= 0).any()) else None


def _origins(s: Site) -> list[tuple[int, int, int]]:
    """For each axis of space: (how long the output is, where its first element lies relative to the first of the input
    that is not zero, how far it is to the next); in steps of the output where the convolution is a transposed one."""
    stride, padding, dilation, transposed, more, _ = s.geometry
    out = []
    for a in range(s.x.ndim - 2):
        at = [g[a if len(g) > 1 else 0] for g in (stride, padding, dilation, more)]
        seen = (s.x != 0).transpose(0, 2 + a).flatten(1).any(1)
        origin = int(torch.nonzero(seen)[0]) if bool(seen.any()) else 0
        n, reach = s.x.shape[2 + a], at[2] * (s.w.shape[2 + a] - 1)
        if transposed:
            out.append(((n - 1) * at[0] - 2 * at[1] + reach + at[3] + 1, -at[1] - origin * at[0], 1))
        else:
            out.append(((n + 2 * at[1] - reach - 1) // at[0] + 1, -at[1] - origin, at[0]))
    return out


def match_sites(t: Site, r: Site, present: Tensor, *, scaled: bool = False) -> Rows | None:
    """Do two products read the same rows? Two convolutions are compared by input and geometry. `scaled`: rows that are
    those of the other times a constant will do."""
    found = _same_rows(t, r, present)
    return found if found is not None or not scaled else _multiples(t, r, present)


def _multiples(t: Site, r: Site, present: Tensor) -> Rows | None:
    """Rows of one product that are those of the other times one constant."""
    a, b = t.linear(), r.linear()
    if a is None or b is None or a[0].shape[1] != b[0].shape[1] or not len(present):
        return None
    kx, ky = _keys(t), _keys(r)
    size = kx[present, 0].max()
    gain = float(ky[:, 0].max() / size) if len(ky) and float(size) > 0 else 0.0
    if gain == 0.0 or math.isclose(gain, 1.0, rel_tol=CLOSE):
        return None
    kx = kx * torch.tensor([gain, gain**2, gain**3], dtype=kx.dtype)
    if _apart(kx[present], ky):
        return None
    found = match_rows(a[0] * gain, present, b[0], keys=(kx, ky))
    return None if found is None else Rows(found.rows, found.columns, gain)


def _same_rows(t: Site, r: Site, present: Tensor) -> Rows | None:
    if t.conv and r.conv:
        if (
            t.kernel().shape[1:] != r.kernel().shape[1:]
            or t.geometry[0] != r.geometry[0]
            or t.geometry[2:4] != r.geometry[2:4]
        ):
            return None
        if t.geometry[5] != r.geometry[5]:
            return None
        fa, fb = fingerprint(t.x), fingerprint(r.x)
        if fa is None or fb is None or not same(fa, fb):
            return None
        found = _windows(t, r, present)
        if found is None:
            return None
        channels = _channels(t.x, r.x) if t.geometry[5] == 1 else None
        return Rows(found, channels)
    a, b = t.linear(), r.linear()
    if a is None or b is None:
        return None
    return match_rows(a[0], present, b[0], keys=(_keys(t), _keys(r)))


class RowIndex:
    """Which products read a row: all rows of all inputs, by their keys."""

    def __init__(self, sites: Iterable[tuple[int, Site]]) -> None:
        listed = list(sites)
        self.nodes = {i for i, _ in listed}
        keys = [_keys(s)[:, 0] for _, s in listed]
        owner = [torch.full((len(k),), i, dtype=torch.int64) for (i, _), k in zip(listed, keys, strict=True)]
        self.all = _Sorted(torch.cat(keys), torch.cat(owner)) if keys else None
        self.firsts = _Sorted(torch.stack([k[0] for k in keys]), torch.stack([o[0] for o in owner])) if keys else None

    def sharing(self, site: Site, present: Tensor) -> list[int]:
        """Nodes that may read rows of the site's input (those `present`)."""
        if self.all is None or self.firsts is None or not len(present):
            return []
        mine = _keys(site)[present, 0]
        return self.all.near(mine[:1]) + self.firsts.near(mine)


class _Sorted:
    def __init__(self, keys: Tensor, owner: Tensor) -> None:
        order = torch.argsort(keys)
        self.keys, self.owner = keys[order].contiguous(), owner[order]

    def near(self, wanted: Tensor) -> list[int]:
        tol = 10 * CLOSE * wanted.abs().clamp_min(1e-300) + 1e-12
        lo = torch.searchsorted(self.keys, (wanted - tol).contiguous())
        hi = torch.searchsorted(self.keys, (wanted + tol).contiguous(), right=True)
        out: set[int] = set()
        for a, b in zip(lo.tolist(), hi.tolist(), strict=True):
            out.update(self.owner[a:b].tolist())
        return sorted(out)
