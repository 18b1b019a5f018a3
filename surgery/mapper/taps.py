"""Convolutions as sums of products, one for each place of the kernel: how some write them out, over shifted inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from surgery.mapper.terms import Site, Term

MOST = 64  # places of a kernel that is taken apart


def _count(t: Term) -> int:
    """The places of a convolution's kernel, where it can be taken apart; 0 of any other term."""
    s = t.site
    if s is None or not s.conv or s.transposed or s.geometry[5] != 1 or len(s.w.shape) not in (3, 4):
        return 0
    return math.prod(s.w.shape[2:])


def products(terms: list[Term]) -> int:
    return sum(t.kind == "product" for t in terms)


def taps(terms: list[Term]) -> list[Term] | None:
    """The same sum with every convolution as a sum of products, one a place of its kernel; None where there is none."""
    counts = [_count(t) for t in terms]
    if not any(1 < n <= MOST for n in counts):
        return None
    out = []
    for t, n in zip(terms, counts, strict=True):
        out += _apart(t, n) if 1 < n <= MOST else [t]
    return out


def taps_for(wanted: int) -> Callable[[list[Term]], list[Term]]:
    """Take convolutions apart where that makes so many products of a sum; else the sum is left as it is."""

    def cut(terms: list[Term]) -> list[Term]:
        made = sum(_count(t) or 1 for t in terms if t.kind == "product")
        return rows_told(taps(terms) or terms) if made == wanted > products(terms) else list(terms)

    return cut


def _apart(t: Term, n: int) -> list[Term]:
    assert t.site is not None
    whole = t.site.linear()
    if whole is None:
        return [t]
    rows, matrix = whole
    out = []
    for j in range(n):
        of = torch.arange(j, matrix.shape[0], n)  # the columns of one place: channels come first
        site = Site(t.site.node, rows[:, of].contiguous(), -1, matrix.take(0, of))
        out.append(Term("product", t.coef, site=site, row=t.row, col=t.col))
    return out


def rows_told(terms: list[Term]) -> list[Term]:
    """The same sum without the rows of zeros (of padding): one of them is like the other, and they add nothing."""
    return [_without_zeros(t) if t.site is not None and not t.site.conv else t for t in terms]


def _without_zeros(t: Term) -> Term:
    assert t.site is not None
    assert t.row is not None
    assert t.col is not None
    told = torch.cat([torch.zeros(1, dtype=torch.bool), (t.site.x != 0).any(1)])
    if bool(told[1:].all()):
        return t
    here = told[t.row.to(torch.int64)]
    return Term("product", t.coef, site=t.site, row=torch.where(here, t.row, 0.0), col=torch.where(here, t.col, 0.0))
