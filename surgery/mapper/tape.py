"""A recorded run as data: operators, values, and fingerprints by which values are found again in another layout."""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_iter

from surgery import twin
from surgery.mapper.masks import HUGE, masked

NEAR = 1e-2  # relative; fingerprints further apart are of values that have nothing to do with each other
Fingerprint = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class Ref:
    """A value on a tape, by number."""

    vid: int


@dataclass(slots=True)
class Node:
    """One operator call. `args` and `kwargs` hold Ref where a tensor stood."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int, ...]
    module: str
    inputs: tuple[int, ...] = ()


@dataclass(slots=True)
class Value:
    """What is known of a value of the recorded run. `origin`: param, input, const (made outside), or node."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    origin: str
    name: str = ""  # state-dict name of a parameter or buffer
    node: int = -1  # index of the producing node
    out: int = 0  # which of its outputs
    data: bool = False  # depends on the inputs
    weights: bool = False  # depends on parameters
    fingerprint: Fingerprint | None = None
    tensor: Tensor | None = None  # kept where small enough


@dataclass(frozen=True, slots=True)
class Replaced:
    """One tensor that a call of a module gave, and the value that went on in its place."""

    module: str
    call: int  # the how-manieth of this module
    out: int  # the how-manieth of the tensors that it gave
    taken: tuple[int, ...]  # values from outside that the call consumed, of those that depend on the inputs
    own: int  # what the module computed
    given: int  # what took its place: a leaf of the run, like an input
    nodes: tuple[int, int]  # those of the call, from and to


@dataclass
class Tape:
    """A recorded run. `result` is what the runner returned, with Ref for tensors."""

    nodes: list[Node] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    params: dict[str, int] = field(default_factory=dict)
    consumers: list[list[int]] = field(default_factory=list)
    result: Any = None
    lines: dict[int, tuple[str, int]] = field(default_factory=dict)  # by node, where asked for: file and line
    replaced: list[Replaced] = field(default_factory=list)  # where a departure was cut out (surgery.departure)

    def depending(self, names: set[str]) -> set[int]:
        """The values that depend on these tensors, and these themselves."""
        found = {vid for vid, v in enumerate(self.values) if v.name in names}
        for node in self.nodes:
            if found.intersection(node.inputs):
                found.update(o for o in node.outs if o >= 0)
        return found

    def outputs(self) -> list[int]:
        return [r.vid for r in tree_iter(self.result) if isinstance(r, Ref)]

    def inside(self) -> set[int]:
        """What the calls that were replaced compute."""
        return {o for r in self.replaced for node in self.nodes[slice(*r.nodes)] for o in node.outs if o >= 0}

    def fed(self) -> list[int]:
        """What goes into the calls that were replaced."""
        return list(dict.fromkeys(v for r in self.replaced for v in r.taken))


def fingerprint(t: Tensor) -> Fingerprint | None:
    """Sums that no permutation, reshape or zero padding changes.

    None where a value tells nothing (it is constant, or not finite).
    """
    if t.numel() == 0 or not (t.is_floating_point() or t.is_complex()):
        return None
    x = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    x = x.reshape(-1)
    low, high = torch.aminmax(x)
    top = max(-float(low), float(high))
    if not top < HUGE:  # masked, not a number, or large
        x = torch.where(masked(x), 0.0, x)
        low, high = torch.aminmax(x)
        top = max(-float(low), float(high))
    a = twin.scratch(x.numel()) if x.dtype == torch.float64 and x.device.type == "cpu" else None
    a = x.abs() if a is None else torch.abs(x, out=a)
    s = torch.stack([a.sum(), torch.dot(x, x), x.sum(), torch.dot(x, a), high - low]).tolist()
    if not all(map(math.isfinite, s)) or s[0] == 0.0 or s[4] <= 1e-9 * top:
        return None
    return (s[0], s[1], s[2], s[3])


def same(a: Fingerprint, b: Fingerprint, tol: float = 1e-9) -> bool:
    return (
        abs(a[0] - b[0]) <= tol * a[0]
        and abs(a[1] - b[1]) <= tol * a[1]
        and abs(a[2] - b[2]) <= tol * a[0]
        and abs(a[3] - b[3]) <= tol * a[1]
    )


class FingerprintIndex:
    """Values by fingerprint."""

    def __init__(self, items: Iterable[tuple[int, Fingerprint | None]]) -> None:
        self.rows = sorted((f[1], vid, f) for vid, f in items if f is not None)
        self.keys = [r[0] for r in self.rows]

    def find(self, f: Fingerprint | None, tol: float = 1e-9) -> list[int]:
        if f is None:
            return []
        lo = bisect.bisect_left(self.keys, f[1] * (1 - tol))
        out = []
        while lo < len(self.rows) and self.keys[lo] <= f[1] * (1 + tol):
            if same(f, self.rows[lo][2], tol):
                out.append(self.rows[lo][1])
            lo += 1
        return out
