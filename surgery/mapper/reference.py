"""The reference's run: every value is known, every weight element has its number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from surgery.mapper.affine import Affine, Term
from surgery.mapper.record import FingerprintIndex, Tape, fingerprint


def _norm_except(v: Tensor, dim: int) -> Tensor:
    return v.norm(2) if dim == -1 else v.norm(2, [d for d in range(v.ndim) if d != dim % v.ndim], keepdim=True)


DERIVE: dict[str, Callable[..., Tensor]] = {
    "log": torch.log,
    "exp": torch.exp,
    "neg": torch.neg,
    "reciprocal": torch.reciprocal,
    "square": torch.square,
    "rsqrt_inverse": lambda t: t.square().reciprocal(),
    "shift": lambda t, by: t + by,
    "norm_except": _norm_except,
}


@dataclass
class Derived:
    """Source values computed by a rule, numbered like source elements."""

    offset: int
    size: int
    fn: str
    params: dict[str, Any]
    numbers: Tensor
    shape: tuple[int, ...]
    value: Tensor


class Reference(Affine):
    """The reference's tape: every value is known, and every weight has its number."""

    def __init__(self, tape: Tape) -> None:
        super().__init__(tape, cut=True)
        values = tape.values
        self.index = FingerprintIndex((i, v.fingerprint) for i, v in enumerate(values))
        self.products: list[int] = []
        self.scales: list[int] = []
        self.pure: list[int] = []
        self.derived: list[Derived] = []
        for i, node in enumerate(tape.nodes):
            kind = self.kind(node)
            if kind == "product":
                self.products.append(i)
            elif kind == "scale":
                self.scales.append(i)
        self._pure()
        self._source: dict[int, Tensor] = {}

    @cached_property
    def slices(self) -> FingerprintIndex:
        """Parts of values along their second axis: one head of all."""
        items = []
        for vid, v in enumerate(self.tape.values):
            if v.data and v.fingerprint and v.tensor is not None and v.tensor.ndim == 4 and 1 < v.shape[1] <= 64:
                items += [(vid, fingerprint(part)) for part in v.tensor.unbind(1)]
        return FingerprintIndex(items)

    def known(self, vid: int) -> Tensor | None:
        t = self.tape.values[vid].tensor
        return None if t is None else t.to(torch.float64) if t.is_floating_point() else t

    def _pure(self) -> None:
        """Values that are sums of weights alone (embeddings, class tokens): what a product cannot lead to."""
        pure = {v for v in self.tape.params.values()}
        for node in self.tape.nodes:
            if self.kind(node) in ("layout", "sum"):
                floats = [v for v in node.inputs if self.tape.values[v].dtype.is_floating_point]
                if floats and all(v in pure for v in floats):
                    pure.update(o for o in node.outs if o >= 0)
        outputs = set(self.tape.outputs())
        for v in sorted(pure):
            if self.tape.values[v].origin == "node" and (self.is_end(v) or v in outputs or self._leaves(v, pure)):
                self.pure.append(v)

    def _leaves(self, vid: int, pure: set[int]) -> bool:
        return any(o not in pure for c in self.tape.consumers[vid] for o in self.tape.nodes[c].outs if o >= 0)

    def closure(self, vids: list[int], limit: int = 400) -> list[int]:
        """Values that are these, moved or added to: ends first."""
        seen, queue = dict.fromkeys(vids), list(vids)
        while queue and len(seen) < limit:
            vid = queue.pop(0)
            for c in self.tape.consumers[vid]:
                if self.kind(self.tape.nodes[c]) in ("layout", "sum"):
                    for o in self.tape.nodes[c].outs:
                        if o >= 0 and o not in seen:
                            seen[o] = None
                            queue.append(o)
        outputs = set(self.tape.outputs())
        return sorted(seen, key=lambda v: (not (self.is_end(v) or v in outputs), v))

    def values_of(self, numbers: Tensor) -> Tensor:
        """The values of weight elements, in float64; 0 where the number is 0."""
        out = torch.zeros(numbers.shape, dtype=torch.float64)
        flat, dest = numbers.reshape(-1), out.reshape(-1)
        lo, hi = (int(flat.min()), int(flat.max())) if flat.numel() else (0, 0)
        n = flat.numel()
        spans = [(first, size, self.tape.params[name]) for first, size, name in self.names]
        spans += [(u.offset, u.size, -1 - k) for k, u in enumerate(self.virtual.values())]
        spans += [(d.offset, d.size, -(1 << 20) - k) for k, d in enumerate(self.derived)]
        for first, size, vid in spans:
            if first > hi or first + size <= lo:
                continue
            src = self._flat(vid)
            if lo >= first and hi < first + size:
                if n == size and lo == first and bool((flat[1:] - flat[:-1] == 1).all()):
                    return src.reshape(numbers.shape).clone()
                return src[flat - first].reshape(numbers.shape)
            here = (flat >= first) & (flat < first + size)
            dest[here] = src[flat[here] - first]
        return out

    def computed(self, terms: list[Term]) -> list[Term]:
        """The same sum with weights that were computed from weights as the known values that they are."""
        out = []
        for t in terms:
            if t.kind == "weight" and t.ids is not None and int(t.ids.max()) >= self.real_end:
                value = self.values_of(t.ids.to(torch.int64))
                out.append(Term("known", t.coef, value=value))
            else:
                out.append(t)
        return out

    def derive(self, fn: str, params: dict[str, Any], numbers: Tensor) -> Tensor:
        """Numbers for fn(these elements): source values that a target weight needs and no source tensor holds."""
        value = DERIVE[fn](self.values_of(numbers.to(torch.int64)), **params)
        d = Derived(self.next, value.numel(), fn, params, numbers, tuple(value.shape), value)
        self.derived.append(d)
        self.next += d.size
        return torch.arange(d.offset, d.offset + d.size).reshape(value.shape)

    def _flat(self, vid: int) -> Tensor:
        if vid <= -(1 << 20):
            return self.derived[-vid - (1 << 20)].value.reshape(-1)
        if vid < 0:
            u = list(self.virtual.values())[-1 - vid]
            t = self.known(u.vid)
            assert t is not None
            return (t.reciprocal() if u.how else t).reshape(-1)
        found = self._source.get(vid)
        if found is None:
            t = self.tape.values[vid].tensor
            assert t is not None
            found = t.reshape(-1).to(torch.float64)
        return found
