"""Checkpoints that stand beside the source, because a rule reads them: adapters, and the donor of a vocabulary.

Their tensors are sources like all others, their names after `lora:`, `donor:` or another word that the rule gives. So
the law of accounting holds for them, and a plan, which keeps the rule, can be applied again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from surgery.checkpoint import Checkpoint
from surgery.reader import Reader, Span
from surgery.rules import MergeLora, Rule, RuleError, Transplant, checked

if TYPE_CHECKING:
    from torch import Tensor


class JoinedReader(Reader):
    """A checkpoint, and others beside it, whose names each have a prefix."""

    def __init__(self, base: Checkpoint, others: Mapping[str, Checkpoint]) -> None:
        self.base = base
        self._held = {name: (base, name) for name in base}
        for prefix, other in others.items():
            self._held |= {f"{prefix}{name}": (other, name) for name in other}
        self.infos = {name: held[inner] for name, (held, inner) in self._held.items()}
        self.source = " and ".join([base.source, *(other.source for other in others.values())])
        self.files = (*base.files, *(file for other in others.values() for file in other.files))
        self.metadata = base.metadata
        self.notes = (*base.notes, *(note for other in others.values() for note in other.notes))

    def read(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        held, inner = self._held[name]
        return held.read(inner, slices)

    def span(self, name: str) -> Span | None:
        held, inner = self._held[name]
        return held.span(inner)


def prefix(rule: Rule) -> str:
    """What the names of the tensors begin with that a rule reads beside the source; empty where it reads none."""
    if isinstance(rule, MergeLora) or (isinstance(rule, Transplant) and rule.donor):
        return f"{rule.name}:"
    return ""


def joined(base: Checkpoint, rules: Iterable[Rule]) -> Checkpoint:
    """The checkpoint with what rules read beside it; itself where they read nothing, or where it has that already.
    RuleError or CheckpointError where an adapter or a donor cannot be read."""
    others: dict[str, Checkpoint] = {}
    for rule in rules:
        start = prefix(rule)
        if not start:
            continue
        if start in others:
            what = "adapters" if isinstance(rule, MergeLora) else "checkpoints"
            raise RuleError(
                f"{rule}: two {what} are called {start[:-1]}", hint=f'Name one: {str(rule)[:-1]}, name="b")'
            )
        if not any(name.startswith(start) for name in base):
            others[start] = _read(rule)
    return Checkpoint(JoinedReader(base, others)) if others else base


def _read(rule: Rule) -> Checkpoint:
    if isinstance(rule, MergeLora):
        from surgery.lora import Adapter

        return Adapter.read(rule).tensors
    from surgery.donor import Donor

    assert isinstance(rule, Transplant)
    return Donor.read(rule).tables


def alone(source: Checkpoint) -> Checkpoint:
    """The checkpoint without what stands beside it."""
    return source._reader.base if isinstance(source._reader, JoinedReader) else source


def joined_by(base: Checkpoint, rules: Sequence[object]) -> Checkpoint:
    """The same for rules as a plan keeps them."""
    return joined(base, checked(rules))


def prefixes(rules: Iterable[Rule]) -> tuple[str, ...]:
    """What the names of all that stands beside the source begin with."""
    return tuple(start for rule in rules if (start := prefix(rule)))
