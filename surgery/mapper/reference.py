"""The reference's run: every value is known, every weight element has its number."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from surgery.mapper.affine import Affine, NotAffine
from surgery.mapper.grid import Grid, cut, read
from surgery.mapper.parts import Part, cut_up
from surgery.mapper.record import FingerprintIndex, Node, Tape, fingerprint
from surgery.mapper.rows import RowIndex, match_rows
from surgery.mapper.terms import Site, Term, Virtual


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
    "scale": lambda t, by: t * by,
    "norm_except": _norm_except,
}


@dataclass
class Derived:
    """Source values computed by a rule, numbered like source elements."""

    offset: int
    shape: tuple[int, ...]
    fn: str
    params: dict[str, Any]
    numbers: Grid
    make: Callable[[], Tensor]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @cached_property
    def value(self) -> Tensor:
        """In float64, made when it is first asked for."""
        return self.make()


@dataclass
class Product:
    """Products of source values, numbered like source elements. The factors broadcast to the shape."""

    offset: int
    shape: tuple[int, ...]
    factors: tuple[Grid, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def at(self, places: Tensor) -> list[Tensor]:
        """The numbers of the factors at these (flat) places."""
        where = []
        for n in reversed(self.shape):
            where.append(places % n)
            places = places // n
        where.reverse()
        return [f.at(where) for f in self.factors]


def _flat(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.reshape(-1)


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
        self._rows: RowIndex | None = None
        self._slices: dict[int, FingerprintIndex] = {}
        self.multiples: dict[tuple[int, float], int] = {}  # (a tensor's first number, factor) -> that of the multiple
        self.multiplied: list[Product] = []
        self._ones: dict[tuple[int, int], int] = {}
        for i, node in enumerate(tape.nodes):
            kind = self.kind(node)
            if kind == "product":
                self.products.append(i)
            elif kind == "scale":
                self.scales.append(i)
        self._pure()

    def slices(self, n: int) -> FingerprintIndex:
        """Parts of n elements of values: one head of all along their second axis, one gate of all that one operator has
        seen."""
        if n not in self._slices:
            items = []
            for vid, v in enumerate(self.tape.values):
                parts = v.shape[1] if v.data and v.fingerprint and len(v.shape) == 4 else 0
                if 1 < parts <= 64 and math.prod(v.shape) == n * parts and (whole := self.known(vid)) is not None:
                    items += [(vid, fingerprint(part)) for part in whole.unbind(1)]
            for vid, part in self._cut_up:
                shape = self.tape.values[vid].shape
                if math.prod(part.shape(shape)) == n and (whole := self.known(vid)) is not None:
                    items.append((vid, fingerprint(part.cut(whole))))
            self._slices[n] = FingerprintIndex(items)
        return self._slices[n]

    @cached_property
    def _cut_up(self) -> list[tuple[int, Part]]:
        return [(vid, part) for vid, v in enumerate(self.tape.values) if v.data for part in cut_up(self, vid)]

    def known(self, vid: int) -> Tensor | None:
        v = self.tape.values[vid]
        t = v.tensor
        if t is None and v.origin == "node":  # weights in another layout, or what the recorder let go: made again
            t = self.run(self.tape.nodes[v.node], {})
            t = t[v.out] if isinstance(t, (tuple, list)) else t
        return None if t is None else t.to(torch.float64) if t.is_floating_point() else t

    def _pure(self) -> None:
        """Values that are sums of weights alone (embeddings, class tokens): what a product cannot lead to."""
        pure = set(self.tape.params.values())
        for node in self.tape.nodes:
            if self.kind(node) == "product" and self._of_zeros(node):  # the first step of a recurrence
                pure.update(o for o in node.outs if o >= 0)
            elif self.kind(node) in ("layout", "sum"):
                floats = [v for v in node.inputs if self.tape.values[v].dtype.is_floating_point]
                if floats and all(v in pure for v in floats):
                    pure.update(o for o in node.outs if o >= 0)
        outputs = set(self.tape.outputs())
        for v in sorted(pure):
            used = self.is_end(v) or v in outputs or self._leaves(v, pure)
            if self.tape.values[v].origin == "node" and used and not self._matrix(v):
                self.pure.append(v)

    def _matrix(self, vid: int) -> bool:
        """Is it nothing but the matrix of products?"""
        consumers = [self.tape.nodes[c] for c in self.tape.consumers[vid]]
        return bool(consumers) and self.weight_only(vid) and all(self.kind(c) == "product" for c in consumers)

    @cached_property
    def lookups(self) -> list[Term]:
        """For each table, all of its rows that were looked up anywhere, as one term."""
        found: dict[int, list[Term]] = {}
        for vid in self.pure:
            try:
                terms = self.terms(vid)
            except NotAffine:
                continue
            if len(terms) == 1 and terms[0].place is not None and terms[0].ids is not None and terms[0].coef == 1.0:
                held = self.holder(int(terms[0].ids.max()))
                if held is not None:
                    found.setdefault(held[0], []).append(terms[0])
        return [
            Term(
                "weight", 1.0, ids=torch.cat([_flat(t.ids) for t in ts]), place=torch.cat([_flat(t.place) for t in ts])
            )
            for ts in found.values()
        ]

    def _of_zeros(self, node: Node) -> bool:
        known = [self.known(v) for v in node.inputs if not self.weight_only(v)]
        return bool(known) and all(t is not None and not bool((t != 0).any()) for t in known)

    def _leaves(self, vid: int, pure: set[int]) -> bool:
        return any(o not in pure for c in self.tape.consumers[vid] for o in self.tape.nodes[c].outs if o >= 0)

    def closure(self, vids: list[int], limit: int = 400, through: tuple[str, ...] = ("layout", "sum")) -> list[int]:
        """Values that are these, moved or added to: ends first."""
        seen, queue = dict.fromkeys(vids), list(vids)
        while queue and len(seen) < limit:
            vid = queue.pop(0)
            end = self.is_end(vid)
            for c in self.tape.consumers[vid]:
                kind = self.kind(self.tape.nodes[c])
                if end and kind == "sum" and self._of_two(self.tape.nodes[c]):
                    continue  # there it stands for itself
                if kind in through:
                    for o in self.tape.nodes[c].outs:
                        if o >= 0 and o not in seen:
                            seen[o] = None
                            queue.append(o)
        outputs = set(self.tape.outputs())
        return sorted(seen, key=lambda v: (not (self.is_end(v) or v in outputs), v))

    def used_bare(self, vid: int) -> bool:
        """Is it an end of a sum that no weight scales?"""
        consumers = [self.tape.nodes[c] for c in self.tape.consumers[vid]]
        scaled = any(self.kind(c) == "scale" for c in consumers)
        return not scaled and (self.is_end(vid) or vid in self.tape.outputs())

    def _of_two(self, node: Node) -> bool:
        return sum(self.tape.values[i].data for i in node.inputs) > 1

    def sharing(self, site: Site, present: Tensor) -> list[int]:
        """The products that may read rows of this input: those that hold its first row, and those whose first row it
        holds. Convolutions are compared as a whole, by whoever asks."""
        if self._rows is None:
            self._rows = RowIndex(self._plain_sites())
        rows = site.linear() if not site.conv else None
        found = set(self.products) - self._rows.nodes
        found |= set(self._rows.sharing(site, present)) if rows is not None else self._rows.nodes
        return sorted(found)

    def _plain_sites(self) -> Iterator[tuple[int, Site]]:
        """The products of rows with one matrix or several, by node; a node with a convolution is left out."""
        for i in self.products:
            try:
                sites = [t.site for t in self.terms(self.tape.nodes[i].outs[0]) if t.site is not None]
            except NotAffine:
                continue
            if sites and not any(s.conv for s in sites):
                yield from ((i, s) for s in sites)

    def occurs(self, value: Tensor) -> bool:
        """Is there a value like this, a part of one, or one that tells nothing?"""
        f = fingerprint(value)
        return (
            f is None or bool(self.index.find(f)) or bool(self.slices(value.numel()).find(f)) or self._among_rows(value)
        )

    def _among_rows(self, value: Tensor) -> bool:
        """Is it some of the rows of a table that was looked up?"""
        return any(self.holds_rows(vid, value) for vid in self.pure)

    def holds_rows(self, vid: int, value: Tensor) -> bool:
        """Are the rows of a value some of those of a larger one?"""
        shape = self.tape.values[vid].shape
        if value.ndim < 2 or len(shape) < 2 or shape[-1] != value.shape[-1] or math.prod(shape) <= value.numel():
            return False
        t = self.known(vid)
        rows = value.reshape(-1, value.shape[-1])
        return (
            t is not None
            and match_rows(rows, torch.arange(len(rows)), t.reshape(-1, t.shape[-1]), part=False) is not None
        )

    def values_of(self, numbers: Tensor) -> Tensor:
        """The values of weight elements, in float64; 0 where the number is 0."""
        flat = numbers.reshape(-1)
        out = torch.zeros(len(flat), dtype=torch.float64)
        for first, size, name, where in self.holders(flat):
            src = self._stored(self.tape.params[name])
            if isinstance(where, slice):
                if len(flat) == size and int(flat[0]) == first and bool((flat[1:] - flat[:-1] == 1).all()):
                    return src.to(torch.float64, copy=True).reshape(numbers.shape)
                return src[flat - first].to(torch.float64).reshape(numbers.shape)
            out[where] = src[flat[where] - first].to(torch.float64)
        if flat.numel() and int(flat.max()) >= self.real_end:
            lo, hi = int(flat.min()), int(flat.max())
            computed: list[Virtual | Derived] = [*self.virtual.values(), *self.derived]
            for c in computed:
                if c.offset > hi or c.offset + c.size <= lo:
                    continue
                here = (flat >= c.offset) & (flat < c.offset + c.size)
                if bool(here.any()):
                    src = c.value.reshape(-1) if isinstance(c, Derived) else self._computed_flat(c)
                    out[here] = src[flat[here] - c.offset]
            for p in self.multiplied:
                here = (flat >= p.offset) & (flat < p.offset + p.size)
                if bool(here.any()):
                    out[here] = math.prod(map(self.values_of, p.at(flat[here] - p.offset)), start=torch.ones(()))
        return out.reshape(numbers.shape)

    def fetch(self, numbers: Grid) -> Tensor:
        """The values of weight elements, in the type that they are stored in: a view where one tensor holds them in
        even steps. Every number must be that of a weight."""
        found = self.holder(numbers.lo)
        if found is not None and numbers.hi < found[0] + found[1]:
            return read(self._stored(self.tape.params[found[2]]), numbers.shifted(-found[0]))
        if (made := self.product_holder(numbers.lo, numbers.hi)) is not None:
            whole = math.prod((self.fetch(f).to(torch.float64) for f in made.factors), start=torch.ones(made.shape))
            return read(whole.to(torch.float64).reshape(-1), numbers.shifted(-made.offset))
        made_by = next((d for d in self.derived if d.offset <= numbers.lo and numbers.hi < d.offset + d.size), None)
        if made_by is not None:
            return read(made_by.value.reshape(-1), numbers.shifted(-made_by.offset))
        if numbers.lo > 0 and (parted := cut(numbers, self.firsts)) is not None and len(parted[1]) > 1:
            axis, runs = parted
            return torch.cat([self.fetch(numbers.narrow(axis, start, n)) for start, n in runs], axis)
        return self.values_of(numbers.dense())

    def _stored(self, vid: int) -> Tensor:
        t = self.tape.values[vid].tensor
        assert t is not None
        return t.reshape(-1)

    def _computed_flat(self, u: Virtual) -> Tensor:
        t = self.known(u.vid)
        assert t is not None
        return (t.reciprocal() if u.how else t).reshape(-1)

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

    def times(self, numbers: Grid, by: float) -> Grid:
        """Numbers for these elements times a constant. A tensor is scaled as a whole and once, so that one element of
        it has one number however it is come by."""
        by = float(f"{by:.15g}")  # a constant that was measured and one that was read are one
        if by == 1.0:
            return numbers
        spans = [(first, size) for first, size, _ in self.names]
        spans += [(u.offset, u.size) for u in self.virtual.values()] + [(d.offset, d.size) for d in self.derived]
        spans += [(p.offset, p.size) for p in self.multiplied]
        for first, size in spans:
            if first <= numbers.lo and numbers.hi < first + size:
                return numbers.shifted(self._scaled_whole(first, size, by) - first)
        flat = numbers.flat()
        out = torch.zeros_like(flat)
        for first, size in spans:
            if numbers.hi < first or numbers.lo >= first + size:
                continue
            offset = self._scaled_whole(first, size, by)
            here = (flat >= first) & (flat < first + size)
            out[here] = flat[here] - first + offset
        return Grid.of(out.reshape(numbers.shape))

    def _scaled_whole(self, first: int, size: int, by: float) -> int:
        """Where the numbers of a whole tensor times a constant begin."""
        if (first, by) not in self.multiples:
            held = self.holder(first)
            shape = self.tape.values[self.tape.params[held[2]]].shape if held is not None else (size,)
            numbers = Grid.whole(first, shape)

            def value() -> Tensor:
                return DERIVE["scale"](self.fetch(numbers).to(torch.float64), by=by)

            self._add_derived(Derived(self.next, tuple(shape), "scale", {"by": by}, numbers, value))
            self.multiples[first, by] = self.derived[-1].offset
        return self.multiples[first, by]

    def plain(self, number: int) -> int:
        """The element itself, where a number stands for a multiple of one."""
        for (first, _), offset in self.multiples.items():
            if offset <= number:
                d = next(d for d in self.derived if d.offset == offset)
                if number < offset + d.size:
                    return number - offset + first
        return number

    def spans(self) -> list[int]:
        return [*super().spans(), *self.multiples.values()]

    def shape_of(self, number: int) -> tuple[int, tuple[int, ...]] | None:
        """(first number, shape) of the tensor, or the multiple of one, that holds an element."""
        plain = self.plain(number)
        held = self.holder(plain)
        if held is None:
            return None
        return number - plain + held[0], self.tape.values[self.tape.params[held[2]]].shape

    def told_by(self, number: int) -> int:
        """The stored element that a computed one is made of (the first factor of a product), for who wants its name."""
        while True:
            p = self.product_holder(number, number)
            d = next(
                (d for d in self.derived if d.offset <= number < d.offset + d.size == d.offset + d.numbers.numel()),
                None,
            )
            if p is not None:
                number = int(p.at(torch.tensor([number - p.offset]))[0])
            elif d is not None:
                number = int(d.numbers.flat()[number - d.offset])
            else:
                return number

    def product_holder(self, lo: int, hi: int) -> Product | None:
        """The product that holds all elements from lo to hi."""
        return next((p for p in self.multiplied if p.offset <= lo and hi < p.offset + p.size), None)

    def multiply(self, factors: Sequence[Grid]) -> Grid:
        """Numbers for the products of source elements; the factors broadcast to one shape."""
        shape = torch.broadcast_shapes(*(f.shape for f in factors))
        p = Product(self.next, tuple(shape), tuple(factors))
        self.multiplied.append(p)
        self.next += p.size
        return Grid.whole(p.offset, p.shape)

    def derive(self, fn: str, params: dict[str, Any], numbers: Tensor) -> Tensor:
        """Numbers for fn(these elements): source values that a target weight needs and no source tensor holds."""
        value = DERIVE[fn](self.values_of(numbers.to(torch.int64)), **params)
        d = Derived(self.next, tuple(value.shape), fn, params, Grid.of(numbers.to(torch.int64)), lambda: value)
        self._add_derived(d)
        return torch.arange(d.offset, d.offset + d.size).reshape(value.shape)

    def ones(self, count: int, of: int) -> Tensor:
        """Numbers for ones in place of target weights of which `of` is the first: the same when asked for again."""
        if (count, of) not in self._ones:
            self._ones[count, of] = self.next
            none = Grid.of(torch.zeros(0, dtype=torch.int64))
            ones = torch.ones(count, dtype=torch.float64)
            self._add_derived(Derived(self.next, (count,), "ones", {}, none, lambda: ones))
        return torch.arange(self._ones[count, of], self._ones[count, of] + count)

    def _add_derived(self, d: Derived) -> None:
        self.derived.append(d)
        self.next += d.size
