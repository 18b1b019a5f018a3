"""Which weight of one sum stands for which of another, where several would fit: what stands beside it tells."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from surgery.mapper.terms import Term

MadeOf = Callable[[Term], frozenset[str]]  # the tensors that the weights of a term are computed from


@dataclass(frozen=True)
class Beside:
    """Two sums, and the products or scaled values of one that are paired with those of the other.

    Two norms by stored statistics that are added, `x * s + b - m * s`, have two shifts `m * s` of one shape. A shift is
    computed from a tensor that its own scale is computed from too, so the pairing of the scales tells the shifts apart.
    """

    target: Sequence[Term]
    source: Sequence[Term]
    pairs: Sequence[tuple[Term, Term]] = ()
    made_of: tuple[MadeOf, MadeOf] | None = None

    def shared(self, t: Term, r: Term) -> int:
        """In how many pairs both have a tensor in common with their side's term, less those in which one has."""
        if self.made_of is None:
            return 0
        mine, theirs = self.made_of
        a, b = mine(t), theirs(r)
        alike = [(bool(a & mine(x)), bool(b & theirs(y))) for x, y in self.pairs]
        return sum(x and y for x, y in alike) - sum(x != y for x, y in alike)

    def near(self, t: Term, r: Term) -> bool:
        """Of weights of which each pair has one, do both belong to the same? It keeps a bias with its norm where two
        biases could as well change places."""
        mine, theirs = self._nth(self.target, 0, t), self._nth(self.source, 1, r)
        return mine is not None and mine == theirs

    def _nth(self, terms: Sequence[Term], side: int, weight: Term) -> int | None:
        """The pair that stands in the order of its side where this weight stands among its like."""
        at = {id(t): k for k, t in enumerate(terms)}
        alike = [id(t) for t in terms if t.kind == "weight" and t.coef == weight.coef]
        order = sorted(range(len(self.pairs)), key=lambda k: at[id(self.pairs[k][side])])
        return order[alike.index(id(weight))] if len(alike) == len(order) else None
