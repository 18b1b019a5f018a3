"""Weights that a plan put in a wrong place or spoilt: what stands there, beside what the reference would compute with.

A candidate for what should stand in a tensor is one of the reference's own tensors in the target's layout, a part of
one, or the tensor's own blocks in another order. It is the right one where the target's run, with it, comes to values
that the reference has; then what stands there now is told by how it differs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery import twin
from surgery.mapper.names import claims
from surgery.pairing import Edit, Found, Place, Run, Untold

_MOST = 200  # candidates for one tensor
LARGE = 1 << 25  # elements of both sides from which they are not all held in float64
Named = Mapping[str, Tensor]


@dataclass
class Stores:
    """What both sides hold, in float64, by name; and the target's names by what they are called in the reference."""

    ours: Named
    theirs: Named


def near(place: Place, stores: Stores) -> Iterator[Found]:
    """The weights that meet the data where the two part."""
    run = place.pair.ours
    direct = [v for v in run.tape.nodes[place.first].inputs if not run.tape.values[v].data]
    vids = [*direct, *(v for n in run.before(direct, 24, data=False) for v in run.tape.nodes[n].inputs)]
    close = _theirs_near(place)
    for vid in _parameters(run, vids):
        yield from _one(place, stores, vid, close)


def far(place: Place, stores: Stores) -> Iterator[Found]:
    """Weights of the same shape that stand in each other's place: what they make occurs, with the parts exchanged."""
    run = place.pair.ours
    data = run.data_inputs(place.first)
    vids = [v for n in run.before(data, 60) for v in run.tape.nodes[n].inputs]
    several = _parameters(run, vids)[:12]
    for a, b in itertools.combinations(several, 2):
        x, y = (_held(run, v) for v in (a, b))
        if x is None or y is None or x.shape != y.shape or x.ndim < 2 or torch.equal(x, y):
            continue
        edit = Edit(leaves={a: y, b: x})
        beside = {p.rpartition(".")[0]: p for p in run.tape.params}
        mine, other = (_owner(run, v) for v in (a, b))
        left, right = run.tape.params.get(f"{mine}.bias"), run.tape.params.get(f"{other}.bias")
        tries = [edit]
        if left is not None and right is not None and beside:
            p, q = _held(run, left), _held(run, right)
            if p is not None and q is not None and p.shape == q.shape:
                tries.append(Edit(leaves={a: y, b: x, left: q, right: p}))
        for trial in tries:
            if place.ok(trial):
                said = f"{_name(run, a)} and {_name(run, b)} stand in each other's place"
                yield Found("swapped tensors", said, trial, place.first, min(mine, other))
                return
    for vid in several[:6]:
        now = _held(run, vid)
        if now is None:
            continue
        added = run.tape.params.get(f"{_owner(run, vid)}.bias", vid)
        shift = _held(run, added) if added != vid else None
        shifts = dict(_blocks(shift)) if shift is not None else {}
        for said, blocks in _blocks(now):
            trial = Edit(leaves={vid: blocks, **({added: shifts[said]} if said in shifts else {})})
            if place.ok(trial) or place.ok(Edit(leaves={vid: blocks})):
                cause, words = relation(now, blocks, stores, _name(run, vid), "")
                if any(_equal(t, now) for p in stores.theirs.values() for t in _laid(p, now)):
                    cause, words = "block order", f"what takes it reads it otherwise: {said}"
                yield Found(cause, f"{_name(run, vid)}: {words}", trial, place.first, _owner(run, vid))
                return
    for vid in several[:6]:  # rows in another order make the same values in other places: seen only further on
        yield from _one(place, stores, vid, _theirs_near(place), most=24, soon=False)


def _parameters(run: Run, vids: list[int]) -> list[int]:
    return [v for v in dict.fromkeys(vids) if run.tape.values[v].origin == "param"]


def _held(run: Run, vid: int) -> Tensor | None:
    try:
        return run.held(vid)
    except Untold:
        return None


def _name(run: Run, vid: int) -> str:
    return run.tape.values[vid].name


def _owner(run: Run, vid: int) -> str:
    return run.tape.values[vid].name.rpartition(".")[0]


def _theirs_near(place: Place) -> list[str]:
    other = place.pair.theirs
    found: list[str] = []
    for node in [*place.theirs[:4], *place.theirs_after[:12]]:
        vids = list(other.tape.nodes[node].inputs)
        vids += [v for n in other.before(vids, 12, data=False) for v in other.tape.nodes[n].inputs]
        found += [_name(other, v) for v in _parameters(other, vids)]
    return list(dict.fromkeys(found))


def _one(
    place: Place, stores: Stores, vid: int, close: list[str], most: int = _MOST, soon: bool = True
) -> Iterator[Found]:
    run = place.pair.ours
    now = _held(run, vid)
    if now is None or not now.is_floating_point():
        return
    order = [*close, *(n for n in stores.theirs if n not in close)]
    pool = {n: stores.theirs[n] for n in order if n in stores.theirs}
    alike = sorted((n for n, p in pool.items() if p.numel() == now.numel()), key=lambda n: _apart(pool[n], now))
    pool = {n: pool[n] for n in dict.fromkeys([*alike[:4], *pool])}  # what is nearly it comes first
    tried = 0
    for said, right, of in _candidates(now, pool):
        if right.shape != now.shape or torch.equal(right, now):
            continue
        tried += 1
        if tried > most:
            return
        edit = Edit(leaves={vid: right.contiguous()})
        if place.ok(edit, soon=soon):
            cause, words = relation(now, right, stores, _name(run, vid), of)
            yield Found(cause, f"{_name(run, vid)}: {said or words}", edit, place.first, _owner(run, vid))
            return


def _apart(p: Tensor, now: Tensor) -> float:
    """How far two tensors of one size are apart, whatever the order of their rows."""
    a, b = p.sum(-1).flatten().sort().values, now.sum(-1).flatten().sort().values
    return float((a - b).abs().max()) if a.shape == b.shape and a.numel() else float("inf")


def _candidates(now: Tensor, pool: Named) -> Iterator[tuple[str, Tensor, str]]:
    """(what to say where it needs no comparison, the value, the reference's tensor it is made of)."""
    for name, p in pool.items():
        yield from (("", t, name) for t in _laid(p, now))
    if not any(_equal(t, now) for p in pool.values() for t in _laid(p, now)):
        for said, t in _reordered(now):  # what is one of the source's tensors as it is was not spoilt
            yield said, t, ""
    for name, p in pool.items():
        yield from (("", t, name) for t in _parts(p, now))


def _laid(p: Tensor, now: Tensor) -> Iterator[Tensor]:
    if p.numel() != now.numel():
        return
    if p.shape == now.shape:
        yield p
        if p.ndim >= 2 and p.shape[0] == p.shape[1]:
            yield p.transpose(0, 1)
        return
    if p.ndim == 2 and tuple(p.shape[::-1]) == tuple(now.shape):
        yield p.t()
        return
    yield p.reshape(now.shape)
    if p.ndim >= 2:
        yield p.transpose(0, 1).reshape(now.shape)


def _parts(p: Tensor, now: Tensor) -> Iterator[Tensor]:
    """Where one side holds in one tensor what the other holds in several."""
    if p.ndim != now.ndim or not p.ndim:
        return
    for q in (p, p.t()) if p.ndim == 2 else (p,):
        for axis in range(min(2, now.ndim)):
            rest_p, rest_n = (tuple(s for a, s in enumerate(t.shape) if a != axis) for t in (q, now))
            if rest_p != rest_n or q.shape[axis] == now.shape[axis]:
                continue
            n, m = q.shape[axis], now.shape[axis]
            if m > n and m % n == 0 and m // n <= 4:
                for j in range(m // n):
                    out = now.clone()
                    out.narrow(axis, j * n, n).copy_(q)
                    yield out
            elif n > m:
                starts = range(0, n, m) if n % m == 0 and n // m <= 4 else range(min(5, n - m + 1))
                yield from (q.narrow(axis, s, m) for s in starts if s + m <= n)


def _reordered(now: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor's own blocks in other orders; its rows moved by one; turned."""
    if now.ndim == 2 and now.shape[0] == now.shape[1]:
        yield "it is transposed", now.t()
    yield from _blocks(now)
    for by in (1, -1):
        yield f"its rows are shifted by {by}", torch.roll(now, -by, 0)
    yield "it is larger by one than the source's", now - 1
    yield "it is smaller by one than the source's", now + 1


def _blocks(now: Tensor) -> Iterator[tuple[str, Tensor]]:
    for axis in range(min(2, now.ndim)):
        n = now.shape[axis]
        for k in (2, 3, 4):
            if n % k or n == k:
                continue
            blocks = now.chunk(k, axis)
            for order in itertools.permutations(range(k)):
                if order != tuple(range(k)):
                    said = f"its {k} blocks along axis {axis} stand in another order than the source's"
                    yield said, torch.cat([blocks[i] for i in order], axis)


def relation(now: Tensor, right: Tensor, stores: Stores, name: str, of: str) -> tuple[str, str]:
    """(cause, words): how what stands in a tensor differs from what should."""
    for look in (_whole, _rows):
        found = look(now, right)
        if found is not None:
            return found
    place = _of_another(now, right, stores, name, of)
    if place is not None:
        return place
    apart = int((now != right).reshape(len(now), -1).any(1).sum()) if now.ndim else 1
    count = len(now) if now.ndim else 1
    return "wrong values", f"{apart} of {count} rows hold other values than the source's {of}"


def _whole(now: Tensor, right: Tensor) -> tuple[str, str] | None:
    if not bool((now != 0).any()):
        return "zeroed", "it is zero, the source's is not"
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(right.to(dtype).to(now.dtype), now):
            return "rounding", f"it was rounded through {str(dtype).removeprefix('torch.')}"
    if now.ndim >= 2 and now.shape[0] == now.shape[1] and torch.equal(now.transpose(0, 1), right):
        return "transposed", "it is transposed"
    used = right != 0
    if bool(used.any()) and bool((now[~used] == 0).all()):
        ratio = now[used] / right[used]
        middle = float(ratio.median())
        if middle == -1 and bool((ratio == -1).all()):
            return "sign", "it has the other sign"
        if middle != 1 and float((ratio - middle).abs().max()) < 1e-6 * abs(middle) + 1e-9:
            return "scaled", f"it is {middle:.7g} times the source's"
    shift = now - right
    if abs(float(shift.reshape(-1)[0])) > 1e-9 and float((shift - shift.reshape(-1)[0]).abs().max()) < 1e-9:
        return "offset", f"{float(shift.reshape(-1)[0]):g} is added to the source's"
    return None


def _rows(now: Tensor, right: Tensor) -> tuple[str, str] | None:
    for axis in range(min(2, now.ndim)):
        a, b = now.movedim(axis, 0), right.movedim(axis, 0)
        differs = torch.nonzero((a != b).reshape(len(a), -1).any(1)).flatten()
        line = "row" if axis == 0 else "column"
        some, they = a[differs], b[differs]
        first, last = int(differs[0]), int(differs[-1])
        if not bool((some != 0).any()):
            return "zeroed", f"{line}s {first} to {last} are zero" if last > first else f"{line} {first} is zero"
        if len(differs) < len(a) and torch.equal(some, -they):
            return "sign", f"{line}s {first} to {last} have the other sign"
        for by in (1, -1, 2, -2):
            if len(a) > abs(by) and torch.equal(torch.roll(b, by, 0), a):
                return "shifted", f"its {line}s are shifted by {by}"
            if len(some) > abs(by) and torch.equal(some[max(by, 0) : len(some) + min(by, 0)],
                                                   they[max(-by, 0) : len(some) - max(by, 0)]):  # fmt: skip
                return "shifted", f"its {line}s {first} to {last} are shifted by {by}"
        if len(differs) > 1 and _permuted(some, they):
            return "block order", f"its {line}s {first} to {last} stand in another order than the source's"
        if len(differs) == 1 and len(a) > 1:
            return "one row", f"{line} {first} holds other values than the source's"
    return None


def _permuted(a: Tensor, b: Tensor) -> bool:
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return torch.equal(a[a[:, 0].argsort()], b[b[:, 0].argsort()])


def _of_another(now: Tensor, right: Tensor, stores: Stores, name: str, of: str) -> tuple[str, str] | None:
    """It is another of the source's tensors, or part of it is."""
    tied = next((n for n, t in stores.ours.items() if n != name and t.shape == right.shape and _equal(t, right)), "")
    standing = next((n for n, t in stores.theirs.items() if n != of and _holds(t, now)), "")
    whole = stores.theirs.get(of)
    if not standing and whole is not None and whole.numel() > now.numel() and _holds(whole, now):
        cause = "swapped query and key" if tied and _query_key(name, tied) else "swapped tensors"
        return cause, f"it holds another part of the source's {of}"
    if standing:
        if tied and not _tied_there(stores, of):
            both = _query_key(of, standing)
            where = "query and key are swapped" if both else f"swapped with {tied}"
            cause = "swapped query and key" if both else _exchanged(of, standing)
            return cause, f"it holds the source's {standing} and not {of}: {where}"
        return "duplicated", f"it holds the source's {standing}, and not {of}"
    if tied:
        return "stale tie", f"it holds other values than {tied}, which the source ties it to"
    for n, t in stores.theirs.items():
        if n != of and t.numel() < now.numel() and any(torch.equal(x, now) for x in _parts(t, now)):
            return "swapped query and key" if _query_key(of, n) else "swapped tensors", f"a part of it is {n}, not {of}"
    return None


def _holds(theirs: Tensor, now: Tensor) -> bool:
    """Are these values one of the source's tensors, or a part of it?"""
    parts = _parts(theirs, now) if theirs.numel() > now.numel() else ()
    return any(_equal(x, now) for x in (*_laid(theirs, now), *parts))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _tied_there(stores: Stores, of: str) -> bool:
    own = stores.theirs.get(of)
    return own is not None and any(n != of and _equal(t, own) for n, t in stores.theirs.items())


def _query_key(a: str, b: str) -> bool:
    """Does one name say query, and the other key?"""
    said = {dict(claims(tuple(n.split(".")))[0]).get("projection") for n in (a, b)}
    return said == {"query", "key"}


def _exchanged(a: str, b: str) -> str:
    """Of two layers where the names differ in a number alone, else of two places in one."""
    unnumbered = [["" if part.isdigit() else part for part in name.split(".")] for name in (a, b)]
    return "swapped layers" if a != b and unnumbered[0] == unnumbered[1] else "swapped tensors"


def stores_of(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], keep: Callable[[str], bool]) -> Stores:
    """Both sides' floating tensors in float64; of large models raised to it where one is looked at."""
    large = sum(t.numel() for t in (*ours.values(), *theirs.values())) > LARGE

    def wide(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        named = {n: t for n, t in tensors.items() if t.is_floating_point() or _lifted(t)}
        if large:
            return {n: twin.lifted_tensor(t, written=False) for n, t in named.items()}
        return {n: twin.lift(t).detach() for n, t in named.items()}

    return Stores(wide(ours), {n: t for n, t in wide(theirs).items() if keep(n)})


def _lifted(t: Tensor) -> bool:
    return isinstance(t, twin.Lifted)
