"""The reference must hold these weights: its live tensors, found by value among the checkpoint's.

A library may rename, fuse, split or transpose on load, so that the names of a running reference are not the file's.
Each live tensor is linked to an expression over the checkpoint's tensors that gives it bit for bit, up to the cast that
loading made. One that has no such expression would make every proof one about other weights.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from surgery import dtypes
from surgery.expr import Expr, Name, call
from surgery.expr import names as names_of

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint


def link(reference: nn.Module, source: Checkpoint) -> dict[str, Expr]:
    """{live state-dict name: expression over the checkpoint}. A live tensor that cannot be linked is left out.

    The search for one that has no namesake: equal bytes under another name; the same elements under another shape or
    order of axes; rows of a larger tensor; several tensors joined along an axis.
    """
    live = {n: t for n, t in reference.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    names: dict[int, list[str]] = {}  # tied tensors are one, and found under any of their names
    for name, t in live.items():
        names.setdefault(id(t), []).append(name)
    found: dict[str, Expr] = {}
    rest: list[list[str]] = []
    for several in names.values():
        t = live[several[0]].detach()
        namesake = next((n for n in several if n in source and source[n].shape == tuple(t.shape)), None)
        if namesake is not None and _holds(source, namesake, t):
            found.update(dict.fromkeys(several, Name(namesake)))
        else:
            rest.append(several)
    if rest:
        index = _Index(source)
        for several in rest:
            expr = index.find(several[0], live[several[0]].detach())
            if expr is not None:
                found.update(dict.fromkeys(several, expr))
    return {n: found[n] for n in live if n in found}


def _holds(source: Checkpoint, name: str, t: Tensor) -> bool:
    """Is this tensor of the checkpoint t, once t is cast to its type? Read past the map where that can be: of a file
    that is compared as a whole, no page need stay."""
    span = source.span(name)
    return _equal(source.read(name), t) if span is None or t.is_meta else span.equals(source[name], t)


def held(reference: nn.Module, source: Checkpoint, links: Mapping[str, Expr]) -> dict[str, Tensor]:
    """The checkpoint's tensors that the reference holds as they are, bit for bit: they need not be read again."""
    live = reference.state_dict(keep_vars=True)
    out = {}
    for name, expr in links.items():
        if isinstance(expr, Name) and name in live and live[name].device.type == "cpu":
            t = live[name].detach()
            if dtypes.name_of(t.dtype) == source[expr.name].dtype and tuple(t.shape) == tuple(source[expr.name].shape):
                out[expr.name] = t
    return out


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.to(device=b.device, dtype=b.dtype), b))


def _sums(t: Tensor) -> tuple[int, float, float]:
    x = t.detach().to("cpu", torch.float64).reshape(-1)
    return x.numel(), float(x.sum()), float((x * x).sum())


class _Index:
    """The checkpoint's tensors by what they hold."""

    def __init__(self, source: Checkpoint) -> None:
        self.source = source
        self.tensors = {n: source.read(n) for n in source}
        self.by_size: dict[int, list[tuple[str, float, float]]] = {}
        for n, t in self.tensors.items():
            size, a, b = _sums(t)
            self.by_size.setdefault(size, []).append((n, a, b))

    def find(self, name: str, t: Tensor) -> Expr | None:
        if t.is_meta or t.numel() == 0:
            return None
        return self._whole(name, t) or self._rows_of(name, t) or self._joined(name, t)

    def _whole(self, name: str, t: Tensor, without: Iterable[str] = ()) -> Expr | None:
        """t as all of one tensor, its elements perhaps in another order of axes."""
        size, a, b = _sums(t)
        near = [
            n
            for n, x, y in self.by_size.get(size, ())
            if n not in without and abs(x - a) <= 1e-2 * (b * size) ** 0.5 + 1e-6 and _close(y, b)
        ]
        for n in sorted(near, key=lambda n: -likeness(n, name)):
            expr = self._same_elements(n, t)
            if expr is not None:
                return expr
        return None

    def _same_elements(self, n: str, t: Tensor) -> Expr | None:
        s = self.tensors[n]
        if _equal(s, t):
            return Name(n)
        if s.numel() == t.numel() and _equal(s.reshape(t.shape), t):
            return call("reshape", n, shape=tuple(t.shape))
        if 2 <= s.ndim <= 4:
            for p in itertools.permutations(range(s.ndim)):
                moved = s.permute(p)
                if p == tuple(range(s.ndim)) or moved.numel() != t.numel():
                    continue
                if moved.shape == t.shape and _equal(moved, t):
                    return call("transpose", n) if s.ndim == 2 else call("permute", n, dims=p)
                if _equal(moved.reshape(t.shape), t):
                    return call("reshape", call("permute", n, dims=p), shape=tuple(t.shape))
        return None

    def _rows_of(self, name: str, t: Tensor) -> Expr | None:
        """t as consecutive rows of a larger tensor."""
        if t.ndim == 0:
            return None
        for n in sorted(self.tensors, key=lambda n: -likeness(n, name)):
            s = self.tensors[n]
            if s.ndim != t.ndim or s.shape[1:] != t.shape[1:] or s.shape[0] <= t.shape[0]:
                continue
            at = _first_row(s, t[0])
            if at is not None and at + len(t) <= len(s) and _equal(s[at : at + len(t)], t):
                return call("slice", n, axis=0, start=at, stop=at + len(t))
        return None

    def _next(self, name: str, t: Tensor, used: Iterable[str]) -> Expr | None:
        """A tensor that is the first rows of t, in another shape or order of axes."""
        row = t[0].numel()
        for size in sorted(self.by_size):
            if size % row == 0 and 0 < size <= t.numel():
                found = self._whole(name, t[: size // row], used)
                if found is not None:
                    return found
        return None

    def _joined(self, name: str, t: Tensor) -> Expr | None:
        """t as several tensors one after another along its first axis (or stacked along a new one)."""
        if t.ndim == 0:
            return None
        parts: list[Expr] = []
        used: list[str] = []
        at = 0
        pool: Iterable[str] = [n for n, s in self.tensors.items() if s.ndim == t.ndim and s.shape[1:] == t.shape[1:]]
        pool = sorted(pool, key=lambda n: -likeness(n, name))
        while at < len(t):
            for n in pool:
                s = self.tensors[n]
                if n not in used and 0 < len(s) <= len(t) - at and _equal(s, t[at : at + len(s)]):
                    parts.append(Name(n))
                    used.append(n)
                    at += len(s)
                    break
            else:
                moved = self._next(name, t[at:], used)
                if moved is None:
                    break
                parts.append(moved)
                used += names_of(moved)
                at += sum(self.tensors[n].numel() for n in names_of(moved)) // (t.numel() // len(t))
        if at == len(t) and len(parts) > 1:
            return call("cat", *parts, axis=0)
        stack = [n for n, s in self.tensors.items() if tuple(s.shape) == tuple(t.shape[1:])]
        rows = []
        for row in t:
            hit = next((n for n in stack if n not in rows and _equal(self.tensors[n], row)), None)
            if hit is None:
                return None
            rows.append(hit)
        if len(rows) < 2:
            return None
        return call("cat", *(call("reshape", n, shape=(1, *t.shape[1:])) for n in rows), axis=0)


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-2 * max(abs(a), abs(b), 1e-30)


def _first_row(s: Tensor, row: Tensor) -> int | None:
    eq = (s.to(row.dtype) == row).reshape(len(s), -1).all(1) if row.numel() else torch.zeros(0)
    hits = torch.nonzero(eq).flatten()
    return int(hits[0]) if len(hits) else None


def likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()
