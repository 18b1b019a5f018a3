"""Comparing: two tensors up to layout; and finding the reference's outputs among the target's activations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surgery.mapper.record import NEAR, FingerprintIndex, Tape, fingerprint
from surgery.proof import GATE
from surgery.running import Call

INF = float("inf")
_PEEK = 16  # elements looked at before all are


def relative(expected: Tensor, got: Tensor) -> float:
    """max |got - expected| / max |expected|, of two tensors of one shape. Infinities must stand at the same places."""
    if not expected.is_floating_point() and not expected.is_complex():
        return 0.0 if bool(torch.equal(expected.to(got.device), got.to(expected.dtype))) else INF
    if expected.is_complex() != got.is_complex():
        return INF
    a, b = _real(expected), _real(got).to(expected.device)
    finite = torch.isfinite(a)
    if not bool((finite == torch.isfinite(b)).all()) or not bool((a[~finite] == b[~finite]).all()):
        return INF
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0
    top = float(a.abs().max())
    apart = float((a - b).abs().max())
    return 0.0 if apart == 0.0 else INF if top == 0.0 else apart / top


def _real(t: Tensor) -> Tensor:
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    return t.to(torch.float64)


def shows_nothing(t: Tensor) -> str:
    """Why an output of the reference can prove nothing, or an empty text."""
    if t.numel() == 0:
        return "is empty"
    if t.is_floating_point() or t.is_complex():
        x = _real(t)
        if bool(torch.isnan(x).any()):
            return "is not a number in places"
        x = x[torch.isfinite(x)]
        if not x.numel():
            return "is nowhere finite"
        if x.numel() > 1 and bool((x == x.flatten()[0]).all()):
            return "is the same number everywhere"
    return ""


def squeezed(shape: Any) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def aligned(expected: Tensor, got: Tensor, *, anywhere: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Ways to lay the two over each other. Shapes that agree up to axes of length 1 have one way, unless `anywhere`;
    else axes may be permuted, and (anywhere) neighbours merged."""
    if squeezed(expected.shape) == squeezed(got.shape):
        yield expected, got.reshape(expected.shape)
        if not anywhere:
            return
    if expected.numel() != got.numel():
        return
    a, b = expected.reshape(squeezed(expected.shape)), got.reshape(squeezed(got.shape))
    if not anywhere and sorted(a.shape) != sorted(b.shape):
        return
    if max(a.ndim, b.ndim) > 6:
        return
    for p in itertools.permutations(range(a.ndim)):
        if anywhere or tuple(a.shape[i] for i in p) == tuple(b.shape):
            yield a.permute(p).reshape(b.shape), b
    if anywhere and b.ndim > a.ndim:
        for p in itertools.permutations(range(b.ndim)):
            yield a, b.permute(p).reshape(a.shape)


def residual(expected: Tensor, got: Tensor, *, anywhere: bool = False) -> float:
    """The smallest relative difference over the ways to lay the two over each other; infinite where there is none."""
    best = INF
    for a, b in aligned(expected, got, anywhere=anywhere):
        if best < INF and a.numel() > 4 * _PEEK and _peek(a, b) > best:
            continue
        best = min(best, relative(a, b))
        if best <= GATE:
            break
    return best


def _peek(a: Tensor, b: Tensor) -> float:
    """A lower bound of the difference, from a few elements."""
    x, y = a.reshape(-1)[:_PEEK], b.reshape(-1)[:_PEEK].to(a.device)
    top = float(a.abs().max()) or 1.0
    d = float(torch.nan_to_num((x - y).abs()).max())
    return d / top


@dataclass(frozen=True)
class Place:
    """Where in the target an activation is computed. `call` and `out` say which output of which call of the module it
    is; -1 where it lies inside the module's forward."""

    module: str
    call: int = -1
    out: int = -1

    def __str__(self) -> str:
        name = self.module or "the module itself"
        return name if self.out >= 0 else f"the forward of {name}"


@dataclass(frozen=True)
class Found:
    """A reference output among the target's activations."""

    residual: float
    vids: tuple[int, ...] = ()  # on the tape
    places: frozenset[Place] = frozenset()


def search(expected: Tensor, tape: Tape, index: FingerprintIndex, calls: list[Call]) -> Found:
    """The activations that equal `expected` up to layout; else the nearest one. Only values that depend on inputs and
    on filled tensors are in `index`."""
    f = fingerprint(expected)
    best, near = INF, -1
    for tol in (1e-9, 1e-5, NEAR):
        hits = []
        for vid in index.find(f, tol):
            value = tape.values[vid]
            if value.tensor is None or math.prod(value.shape) != expected.numel():
                continue
            r = residual(expected, value.tensor, anywhere=True)
            if r < best:
                best, near = r, vid
            if r <= GATE:
                hits.append(vid)
        if hits:
            return Found(best, tuple(hits), _places(expected, tape, hits, calls))
    return Found(
        best, (near,) if near >= 0 else (), _places(expected, tape, [near], calls) if near >= 0 else frozenset()
    )


def _places(expected: Tensor, tape: Tape, vids: list[int], calls: list[Call]) -> frozenset[Place]:
    places = {Place(tape.nodes[tape.values[vid].node].module) for vid in vids if tape.values[vid].node >= 0}
    seen: dict[str, int] = {}
    top = tape.values[vids[0]].tensor
    for call in calls:
        n = seen[call.module] = seen.get(call.module, -1) + 1
        for i, t in enumerate(call.out):
            equal = top is not None and t.shape == top.shape and torch.equal(t, top)
            if equal or (t.numel() == expected.numel() and t.is_floating_point() and _same(expected, t)):
                places.add(Place(call.module, n, i))
    return frozenset(places)


def _same(expected: Tensor, t: Tensor) -> bool:
    if not torch.isclose(t.double().sum(), expected.double().sum(), rtol=1e-9, atol=1e-9 * float(expected.abs().sum())):
        return False
    return residual(expected, t, anywhere=True) <= GATE


def innermost(places: frozenset[Place]) -> Place:
    """The most telling of several places of one value: the output of the innermost module."""
    return min(places, key=lambda p: (p.out < 0, -p.module.count("."), -len(p.module), p.module, p.call, p.out))


def indexed(tape: Tape) -> FingerprintIndex:
    """The activations that may be a declared output: they depend on the inputs and on filled tensors."""
    return FingerprintIndex(
        (vid, v.fingerprint) for vid, v in enumerate(tape.values) if v.origin == "node" and v.data and v.weights
    )
