"""The addends of a value: what is known, a product with a weight matrix, a scale by weights, weights alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.mapper.grid import Grid


@dataclass
class Site:
    """A product of rows with a weight matrix (or a convolution with a kernel)."""

    node: int
    x: Tensor  # linear: rows [N, K]; convolution: its input
    x_vid: int
    w: Grid  # numbers of the weight elements: [K, M]; convolution: the kernel's own shape
    geometry: tuple[Any, ...] = ()  # of a convolution: stride, padding, dilation, transposed, output padding, groups
    pieces: list[Tensor] | None = None  # where x is a concatenation along the contracted axis: the columns of each part

    keys: Tensor | None = field(default=None, repr=False)  # sums of its rows, where they were asked for
    _linear: tuple[Tensor, Grid] | None = field(default=None, repr=False)

    @property
    def conv(self) -> bool:
        return bool(self.geometry)

    @property
    def transposed(self) -> bool:
        return self.conv and bool(self.geometry[3])

    def kernel(self) -> Grid:
        """The numbers of a convolution's kernel as [channels out, channels in of one group, *space]; a transposed one's
        is stored with the channels that go in first."""
        if not self.transposed:
            return self.w
        groups, (a, b, *space) = self.geometry[5], self.w.shape
        apart = self.w.reshape(groups, a // groups, b, *space)
        return apart.transpose(1, 2).reshape(groups * b, a // groups, *space)

    def linear(self) -> tuple[Tensor, Grid] | None:
        """(rows [N, K], weight numbers [K, M]); a plain convolution as the product of its unfolded input."""
        if not self.conv:
            return self.x, self.w
        if self._linear is None:
            stride, padding, dilation, transposed, _, groups = self.geometry
            dims = self.x.ndim - 2
            if transposed or groups != 1 or dims not in (1, 2):
                return None
            x, kernel = self.x, list(self.w.shape[2:])
            stride, padding, dilation = (
                list(g) * dims if len(g) == 1 else list(g) for g in (stride, padding, dilation)
            )
            if dims == 1:
                x, kernel = x.unsqueeze(2), [1, *kernel]
                stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
            if math.prod(kernel) == 1 and not any(padding) and all(s == 1 for s in stride):
                rows = x.flatten(2)
            else:
                size = x.numel() * math.prod(kernel)
                if size > 1 << 26:
                    return None
                rows = F.unfold(x, tuple(kernel), tuple(dilation), tuple(padding), tuple(stride))
            self._linear = (
                rows.transpose(1, 2).reshape(-1, rows.shape[1]),
                self.w.reshape(self.w.shape[0], -1).transpose(0, 1),
            )
        return self._linear


@dataclass
class Term:
    """One addend of a value. kind: known | product | scale | weight. The tensors have the value's shape."""

    kind: str
    coef: float
    value: Tensor | None = None  # known, scale: the known factor
    ids: Tensor | None = None  # scale, weight: weight elements, 0 where there is none
    place: Tensor | None = None  # weight, of a table that was looked up: the element's place in it plus 1, 0 where none
    site: Site | None = None  # product
    row: Tensor | None = None  # product: row of the site plus 1, 0 where the term is absent
    col: Tensor | None = None
    vid: int = -1  # known, scale: the value it came from

    def tensors(self) -> list[str]:
        if self.kind == "weight":
            return ["ids"] if self.place is None else ["place", "ids"]
        return {"known": ["value"], "scale": ["value", "ids"], "product": ["row", "col"]}[self.kind]

    def mapped(self, f: Callable[[Tensor], Tensor]) -> Term:
        new = self.scaled(1.0)
        for name in self.tensors():
            setattr(new, name, f(getattr(self, name)))
        if (
            self.kind in ("known", "scale")
            and new.value is not None
            and new.value.shape != (self.value.shape if self.value is not None else ())
        ):
            new.vid = self.vid
        return new

    def scaled(self, c: float) -> Term:
        return replace(self, coef=self.coef * c)


@dataclass
class Virtual:
    """Weights computed from weights (weight norm, exp of a logit scale): numbered like any others."""

    vid: int
    offset: int
    size: int
    how: str = ""  # "reciprocal" where a division by the value was met


def compact(t: Tensor) -> Tensor:
    """An expanded tensor without its repetitions: length 1 along the axes of which it holds one line."""
    for a, (n, s) in enumerate(zip(t.shape, t.stride(), strict=True)):
        if n > 1 and s == 0:
            t = t.narrow(a, 0, 1)
    return t


def varying(t: Tensor) -> list[int]:
    return [a for a, n in enumerate(t.shape) if n > 1]


def cells(table: Tensor, row: Tensor, col: Tensor) -> Tensor:
    """table[row - 1, col - 1], where rows and columns mostly vary along axes of their own: then nothing is gathered."""
    r, c = compact(row), compact(col)
    ra, ca = varying(r), varying(c)
    rows, cols = (r.to(torch.int64) - 1).clamp_min(0), (c.to(torch.int64) - 1).clamp_min(0)
    if set(ra) & set(ca):
        return table[rows, cols].expand(row.shape)
    picked = _lines(_lines(table, 0, rows.reshape(-1)), 1, cols.reshape(-1))
    picked = picked.reshape([*(row.shape[a] for a in ra), *(row.shape[a] for a in ca)])
    axes = ra + ca
    picked = picked.permute([axes.index(a) for a in sorted(axes)])
    return picked.reshape([row.shape[a] if a in axes else 1 for a in range(row.ndim)]).expand(row.shape)


def _lines(t: Tensor, axis: int, index: Tensor) -> Tensor:
    if len(index) == t.shape[axis] and bool((index == torch.arange(len(index))).all()):
        return t
    return t.index_select(axis, index)


def apart(terms: list[Term]) -> list[Term] | None:
    """The same sum with every product of a concatenation as a sum of products; None where there is no such product."""
    out: list[Term] = []
    for t in terms:
        if t.site is None or not t.site.pieces or len(t.site.pieces) < 2:
            out.append(t)
            continue
        s = t.site
        for g in s.pieces or ():
            part = Site(s.node, s.x[:, g], s.x_vid, s.w.take(0, g))
            out.append(Term("product", t.coef, site=part, row=t.row, col=t.col))
    return out if len(out) > len(terms) else None


def informative(x: Tensor) -> bool:
    """Rows that are zero say nothing of the weights that they meet."""
    return bool((x != 0).any())
