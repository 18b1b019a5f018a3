"""Departures in the search: what a module gives that computes something else on purpose is a hole in the target's run.

Its weights are settled as any others are, as far as the run shows them. What goes on after it is one of the activations
that the reference computes from what the module takes (surgery.standing); the search forks, and what follows decides.
What of the module's own weights no run shows is filled by names and shapes, from what the reference uses in that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import nn

from surgery.expr import Expr, Name, names
from surgery.mapper.names import likeness
from surgery.mapper.record import Replaced, Tape
from surgery.standing import Theirs, between, candidates

if TYPE_CHECKING:
    from surgery.checkpoint import Checkpoint
    from surgery.mapper.hypothesis import Hypothesis
    from surgery.mapper.reference import Reference

INSIDE = "inside a departure: by names and shapes only"


class Holes:
    """The holes of a target's run."""

    def __init__(self, tape: Tape, reference: Reference) -> None:
        self.places = {place.given: place for place in tape.replaced}
        self.theirs = Theirs(reference.tape, reference.known)
        self.reference = reference

    def open(self, h: Hypothesis, vids: Iterable[int]) -> list[int]:
        """Those of these values that are holes, and not yet filled."""
        return [v for v in vids if v in self.places and v not in h.env and v not in h.tainted and v not in h.gone]

    def filled(self, h: Hypothesis, vid: int) -> tuple[list[Hypothesis], list[Hypothesis]]:
        """A hypothesis for each activation of the reference that may stand here, and those that are to be tried if all
        of these fail; what the module takes is settled."""
        place = self.places[vid]
        if any(v in h.tainted for v in place.taken):
            h.tainted.add(vid)
            return [h], []
        at = self._taken(h, place)
        own = None if place.own in h.tainted else h.known(place.own)
        shape = h.tape.values[vid].shape
        out: list[Hypothesis] = []
        later: list[Hypothesis] = []
        weights = sum(t.numel() for n, t in h.own.items() if n.startswith(f"{place.module}.") and t.is_floating_point())
        for i, (likely, stand) in enumerate(candidates(self.theirs, shape, own, at, weights)):
            value = self.theirs.value(stand, shape)
            if value is None:
                continue
            g = h.fork()
            g.env[vid] = value
            g.stood[vid] = self.theirs.by_key[stand.key]
            g.score -= 0.5 * i
            g.last = [None]
            (out if likely else later).append(g)
        if not out and not later:
            h.tainted.add(vid)
            h.stuck = h.stuck or place.module
            return [h], []
        return (out, later) if out else (later, [])

    def _taken(self, h: Hypothesis, place: Replaced) -> list[int]:
        found = []
        for v in place.taken:
            if not h.tape.values[v].dtype.is_floating_point:
                continue
            if v in h.where:
                found.append(h.where[v])
            elif (t := h.known(v)) is not None:
                found += self.theirs.equal(t, 1e-9) or self.theirs.pieces(t)
        return found or [i for i, v in enumerate(self.reference.tape.values) if v.origin == "input"]


def completed(
    h: Hypothesis,
    target: nn.Module,
    open_names: Iterable[str],
    exprs: Mapping[str, Expr],
    links: Mapping[str, Expr],
    source: Checkpoint,
) -> dict[str, Expr]:
    """Expressions for tensors inside departures that no run settled, from what the reference uses in that place."""
    found: dict[str, Expr] = {}
    missing = set(open_names)
    for place in h.tape.replaced:
        prefix = f"{place.module}." if place.module else ""
        inside = [n for n in missing if n.startswith(prefix) and n not in found]
        if not inside or place.given not in h.stood:
            continue
        tape = h.reference.tape
        ends = Holes(h.tape, h.reference)._taken(h, place)
        live = between(tape, ends, h.stood[place.given])
        sources = dict.fromkeys(s for n in live if n in links for s in names(links[n]))
        elsewhere = {s for n, e in exprs.items() if not n.startswith(prefix) for s in names(e)}
        found |= _by_name(target.get_submodule(place.module), prefix, inside, list(sources), elsewhere, exprs, source)
    return found


def _by_name(
    module: nn.Module,
    prefix: str,
    inside: list[str],
    sources: list[str],
    elsewhere: set[str],
    exprs: Mapping[str, Expr],
    source: Checkpoint,
) -> dict[str, Expr]:
    from surgery.mapper import static

    if not sources:
        return {}
    plan = static.find(source.view(sources), module)
    rows = {prefix + r.target: r.expr for r in plan.rows if r.expr is not None}
    agrees = all(rows.get(n) == e for n, e in exprs.items() if n.startswith(prefix))
    if plan.verdict == "consistent" and agrees:
        return {n: e for n, e in rows.items() if n in inside and not elsewhere.intersection(names(e))}
    used = elsewhere | {s for n, e in exprs.items() if n.startswith(prefix) for s in names(e)}
    own = module.state_dict(keep_vars=True)
    found: dict[str, Expr] = {}
    more = True
    while more:  # what one takes is not for another: that may settle it
        more = False
        for name in (n for n in inside if n not in found):
            shape = tuple(own[name.removeprefix(prefix)].shape)
            fits = [s for s in sources if s not in used and tuple(source[s].shape) == shape]
            alike = sorted((likeness(name, s) for s in fits), reverse=True)
            if len(fits) == 1 or (len(fits) > 1 and alike[0] > alike[1]):
                best = max(fits, key=partial(likeness, name))
                found[name], more = Name(best), True
                used.add(best)
    return found
